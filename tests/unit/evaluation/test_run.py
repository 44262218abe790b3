import json
from dataclasses import asdict

import pytest

from nemo_paced.config import DataConfig, EvaluationConfig, PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation import run
from nemo_paced.evaluation.results import read_results, read_settings
from nemo_paced.training.checkpoint_files import RunState, record_sizes
from nemo_paced.training.convert import find_checkpoint
from nemo_paced.training.sampler import make_replicas
from tests.runs import accuracy, write_run


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"id": "a", "problem": "x", "answer": "1"}) + "\n")
    return path


@pytest.fixture
def served(monkeypatch):
    """Records (label, directory, suites, config) instead of serving a model."""
    calls = []

    def serve(config, hf_dir, suites, run_dir, label, bar):
        calls.append((label, hf_dir, list(suites), config))
        return {suite: accuracy(0.5, seed=len(calls)) for suite in suites}

    monkeypatch.setattr(run, "_serve_and_evaluate", serve)
    return calls


def hf_directory(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_model_and_baseline_are_evaluated_on_every_suite(tmp_path, problems, served, capsys):
    model, base, out = (tmp_path / name for name in ("model", "base", "out.json"))
    hf_directory(model), hf_directory(base)
    arguments = ["--config-name", "quickstart", model, "--problems", problems, "--problems",
                 f"forgetting={problems}", "--baseline", base, "--samples", 3, "--out", out,
                 "evaluation.temperature=0.9"]  # fmt: skip
    run.main([str(argument) for argument in arguments])
    assert [call[:3] for call in served] == [
        ("baseline", base, ["few", "forgetting"]),
        ("model", model, ["few", "forgetting"]),
    ]
    config = served[0][3]
    assert config.evaluation == EvaluationConfig(samples=3, temperature=0.9)
    assert config.grading.verifier == "exact", "the recipe's, though named before the model"
    assert list(read_results(out)) == ["baseline", "model"]
    assert read_settings(out)["temperature"] == 0.9
    shown = capsys.readouterr().out
    assert shown.count("model - baseline") == 2 and "forgetting, 120 problems" in shown


@pytest.mark.parametrize("inside", ["", "hf", "checkpoints/step_00000060"])
def test_a_model_is_asked_with_the_configuration_of_its_run(tmp_path, problems, served, inside):
    directory = write_run(tmp_path / "run")
    saved = (directory / "config.yaml").read_text()
    saved = saved.replace("verifier: math", "verifier: multiple_choice")
    saved = saved.replace("endpoints: []", "endpoints: ['http://127.0.0.1:1']")
    (directory / "config.yaml").write_text(saved)
    model = directory / inside
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text("{}")
    run.main([str(model), "--problems", str(problems)])
    (_, _, _, config), = served  # fmt: skip
    assert config.grading.verifier == "multiple_choice" and config.trainer.max_steps == 60
    assert config.rollout.endpoints == [], "the servers of that run are gone"


def test_without_files_the_suites_are_those_of_the_configuration(tmp_path, problems, served):
    model = str(hf_directory(tmp_path / "model"))
    run.main([model, "--config-name", "quickstart"])
    assert served[0][2] == ["heldout", "forgetting"]
    with pytest.raises(ConfigError, match="--problems is not given and the configuration has"):
        run.main([model])


def test_a_recipe_that_is_named_overrides_that_of_the_run(tmp_path, problems, served):
    directory = write_run(tmp_path / "run")
    (directory / "config.json").write_text("{}")
    run.main([str(directory), "--problems", str(problems), "--config-name", "quickstart"])
    assert served[0][3].trainer.max_steps != 60


def test_what_cannot_be_evaluated_is_named_before_anything_starts(tmp_path, problems, served):
    model = str(hf_directory(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"'/none' is no directory: give a Hugging Face"):
        run.main(["/none", "--problems", str(problems)])
    with pytest.raises(ConfigError, match=r"'/none' is no directory"):
        run.main([model, "--problems", str(problems), "--baseline", "/none"])
    with pytest.raises(ConfigError, match=r"--problems is '/none.jsonl': no such file"):
        run.main([model, "--problems", "/none.jsonl"])
    with pytest.raises(ConfigError, match=r"two files are named 'few'; say NAME=FILE"):
        run.main([model, "--problems", str(problems), "--problems", str(problems)])
    with pytest.raises(ConfigError, match=r"evaluation\.samples"):
        run.main([model, "--problems", str(problems), "--samples", "0"])
    assert not served


def test_a_run_that_holds_an_export_is_still_a_run(tmp_path):
    newest = tmp_path / "checkpoints" / "step_00000002"
    newest.mkdir(parents=True)
    state = RunState(step=2, consumed_problems=8, skipped_steps=0, config={}, layout=(1, 1))
    (newest / "paced.json").write_text(json.dumps(asdict(state)))
    (newest / "metadata.json").write_text("{}")
    record_sizes(newest)
    hf_directory(tmp_path / "hf")
    assert find_checkpoint(tmp_path) == find_checkpoint(newest) == newest


@pytest.mark.parametrize(("evaluated", "length"), [(None, 96), (40, 96), (500, 516)])
def test_the_server_has_room_for_the_longest_response(tmp_path, evaluated, length):
    config = PacedConfig(
        data=DataConfig(max_response_length=80),
        evaluation=EvaluationConfig(max_response_length=evaluated),
    )
    replicas = make_replicas(config, tmp_path, 16, tmp_path / "log")
    assert [s.max_model_len for s in replicas.sidecars.values()] == [length]
