import json
import shutil
import sys
from dataclasses import asdict

import pytest

from nemo_paced.commands import evaluate as command
from nemo_paced.compose import ASSETS
from nemo_paced.config import DataConfig, EvaluationConfig, PacedConfig, TrainerConfig
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import ResultsFile
from nemo_paced.evaluation.run import Job
from nemo_paced.rollout.served import training_length
from nemo_paced.run.checkpoint_files import RunState, find_checkpoint, record_sizes
from tests.runs import accuracy, write_run

CONTEXT = 32  # of the embedded models


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"id": "a", "problem": "solve s1 f2 =", "answer": "s3"}) + "\n")
    return path


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Records (label, directory, suites, config) instead of serving a model."""
    calls = []

    def ask(job, hf_dir, work_dir, *, label, bar):
        calls.append((label, hf_dir, list(job.problems), job.config))
        return {suite: accuracy(0.5, seed=len(calls)) for suite in job.problems}

    monkeypatch.setattr(Job, "ask", ask)
    monkeypatch.chdir(tmp_path)
    return calls


def hf_directory(path, context=CONTEXT):
    """The embedded student's tokenizer and configuration."""
    path.mkdir(parents=True, exist_ok=True)
    for file in (ASSETS / "student").glob("*.json"):
        shutil.copy(file, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return path


def run(*arguments):
    command.main([str(argument) for argument in arguments])


def test_model_and_baseline_are_evaluated_on_every_suite(tmp_path, problems, served, capsys):
    model, base, out = (tmp_path / name for name in ("model", "base", "out.json"))
    hf_directory(model), hf_directory(base, context=40)
    run("--config-name", "quickstart", model, "--problems", problems, "--problems",
        f"forgetting={problems}", "--baseline", base, "--samples", 3, "--out", out,
        "evaluation.temperature=0.9")  # fmt: skip
    assert [call[:3] for call in served] == [
        ("baseline", base, ["few", "forgetting"]),
        ("model", model, ["few", "forgetting"]),
    ]
    config = served[0][3]
    assert config.evaluation == EvaluationConfig(
        samples=3, temperature=0.9, max_response_length=None
    )
    assert config.grading.verifier == "exact", "the recipe's, though named before the model"
    file = ResultsFile.read(out)
    assert list(file.models) == ["baseline", "model"]
    assert file.settings["temperature"] == 0.9 and file.settings["dtype"] == "float32"
    assert file.sources["baseline"].path == str(base)
    assert file.sources["baseline"].fingerprint != file.sources["model"].fingerprint
    assert {"nemo-paced", "transformers"} <= file.versions.keys()
    shown = capsys.readouterr().out
    assert "forgetting: 120 problems, 8 samples each" in shown
    assert shown.count("baseline - model") == 1


@pytest.mark.parametrize("inside", ["", "hf", "checkpoints/step_00000060"])
def test_a_model_is_asked_with_the_configuration_of_its_run(tmp_path, problems, served, inside):
    directory = write_run(tmp_path / "run")
    saved = (directory / "config.yaml").read_text()
    saved = saved.replace("verifier: math", "verifier: multiple_choice")
    saved = saved.replace("endpoints: []", "endpoints: ['http://127.0.0.1:1']")
    (directory / "config.yaml").write_text(saved)
    run(hf_directory(directory / inside, context=4096), "--problems", problems)
    (_, _, _, config), = served  # fmt: skip
    assert config.grading.verifier == "multiple_choice" and config.trainer.max_steps == 60
    assert config.rollout.endpoints == [], "the servers of that run are gone"


def test_without_files_the_suites_are_those_of_the_configuration(tmp_path, served):
    model = hf_directory(tmp_path / "model")
    run(model, "--config-name", "quickstart")
    assert served[0][2] == ["heldout", "forgetting"]
    with pytest.raises(ConfigError, match="neither --problems nor --lm-eval is given"):
        run(model)


def test_without_a_file_named_results_lie_beside_the_runs(tmp_path, problems, served):
    run(hf_directory(tmp_path / "model"), "--problems", problems, "--config-name", "quickstart",
        f"exp_manager.exp_dir={tmp_path}/runs")  # fmt: skip
    (path,) = tmp_path.glob("runs/evaluation/model-*/results.json")
    assert list(ResultsFile.read(path).models) == ["model"]


def test_a_recipe_that_is_named_overrides_that_of_the_run(tmp_path, problems, served):
    directory = write_run(tmp_path / "run")
    run(hf_directory(directory), "--problems", problems, "--config-name", "quickstart")
    assert served[0][3].trainer.max_steps != 60


def test_what_cannot_be_evaluated_is_named_before_anything_starts(tmp_path, problems, served):
    model = hf_directory(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"'/none' is no directory: give a Hugging Face"):
        run("/none", "--problems", problems)
    with pytest.raises(ConfigError, match=r"'/none' is no directory: .* or the results\.json"):
        run(model, "--problems", problems, "--baseline", "/none")
    with pytest.raises(ConfigError, match=r"--problems is '/none.jsonl': no such file"):
        run(model, "--problems", "/none.jsonl")
    with pytest.raises(ConfigError, match=r"two files are named 'few'; say NAME=FILE"):
        run(model, "--problems", problems, "--problems", problems)
    with pytest.raises(ConfigError, match=r"evaluation\.samples"):
        run(model, "--problems", problems, "--samples", "0")
    with pytest.raises(ConfigError, match=r"running servers hold one model"):
        run(model, "--problems", problems, "--baseline", model, "--config-name", "quickstart",
            "rollout.endpoints=['http://127.0.0.1:1']")  # fmt: skip
    assert not served


def test_lm_eval_that_is_not_installed_is_named_with_its_extra(tmp_path, served, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # what an absent package does
    with pytest.raises(ConfigError, match=r"\['mmlu'\] .* pip install 'nemo-paced\[eval\]'"):
        run(hf_directory(tmp_path / "model"), "--lm-eval", "mmlu", "--config-name", "quickstart")
    assert not served


class TestBaselineOfAnEarlierEvaluation:
    @pytest.fixture
    def earlier(self, tmp_path, problems, served):
        self.common = ["--problems", problems, "--config-name", "quickstart"]
        self.model = hf_directory(tmp_path / "model")
        out = tmp_path / "base" / "results.json"
        run(hf_directory(tmp_path / "base"), *self.common, "--out", out)
        served.clear()
        return out

    def test_is_not_asked_again(self, tmp_path, earlier, served):
        out = tmp_path / "results.json"
        said = json.loads(earlier.read_text())
        said["settings"]["max_tokens_from"] = "the context of another"  # of as many tokens
        earlier.write_text(json.dumps(said))
        run(self.model, *self.common, "--baseline", earlier, "--out", out, "model.seed=7")
        assert [call[0] for call in served] == ["model"]
        before, after = ResultsFile.read(earlier), ResultsFile.read(out)
        assert list(after.models) == ["baseline", "model"]
        assert after.models["baseline"] == before.models["model"]
        assert after.sources["baseline"] == before.sources["model"]

    def test_must_have_been_asked_alike(self, earlier, served):
        with pytest.raises(ConfigError, match=r"temperature 0\.6, now 0\.9"):
            run(self.model, *self.common, "--baseline", earlier, "evaluation.temperature=0.9")
        with pytest.raises(ConfigError, match=r"\(temperature 0\.6, now 0\.9\)"):
            run(self.model, *self.common, "--baseline", earlier, "evaluation.temperature=0.9",
                "model.seed=7")  # fmt: skip
        with pytest.raises(ConfigError, match=r"'few' holds other problems, or asked them with"):
            run(self.model, *self.common, "--baseline", earlier,
                "data.prompt_template='again {problem}'")  # fmt: skip
        with pytest.raises(ConfigError, match=r"has no suite 'forgetting'"):
            run(self.model, "--config-name", "quickstart", "--baseline", earlier,
                "--problems", f"forgetting={self.common[1]}")  # fmt: skip
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


@pytest.mark.parametrize(
    ("interval", "evaluated", "length"),
    [(0, 500, 96), (5, None, 96), (5, 40, 96), (5, 500, 516), (5, 30_000, 600)],
)
def test_a_trainers_server_has_room_for_what_it_is_asked(tmp_path, interval, evaluated, length):
    """Validation counts where there is one, up to the model's 600 positions."""
    config = PacedConfig(
        trainer=TrainerConfig(val_check_interval=interval),
        data=DataConfig(max_response_length=80, validation_problems="heldout.jsonl"),
        evaluation=EvaluationConfig(max_response_length=evaluated),
    )
    model = hf_directory(tmp_path / "model", context=600)
    assert training_length(config, model, 16) == length
