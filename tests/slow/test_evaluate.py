"""``evaluate`` with a real server: sampled problems, lm-eval's tasks, running servers, going on."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from nemo_paced.compose import ASSETS
from nemo_paced.config import WeightSwap
from nemo_paced.evaluation.results import ResultsFile
from nemo_paced.refit.file_transfer import send_files
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.client import RolloutClient
from tests.rollout_servers import make_sidecar

pytestmark = pytest.mark.slow

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm_eval is not installed (pip install '.[eval]'; scripts/setup.sh does)",
)
STATES = tuple(f"s{i}" for i in range(4))
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl, dev: {folder}/dev.jsonl}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: {kind}
doc_to_text: "{{{{question}}}}"
target_delimiter: " "
fewshot_delimiter: " "
doc_to_target: answer
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
{extra}
"""


def run(*arguments, status=0, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "nemo_paced.cli", "evaluate", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.jsonl"
    lines = (ASSETS / "problems_heldout.jsonl").read_text().splitlines()[:12]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tasks(tmp_path):
    """``chains``, two tasks of 24 and 12 multiple-choice questions, and ``said``, generated."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = f"doc_to_choice: {list(STATES)}"
    generated = 'generation_kwargs: {until: ["s3"], max_gen_toks: 4}'
    for name, kind, metric, extra, count in (
        ("chains_a", "multiple_choice", "acc", choices, 24),
        ("chains_b", "multiple_choice", "acc", choices, 12),
        ("said", "generate_until", "exact_match", generated, 6),
    ):
        rows = [
            {"question": f"solve s{i % 20} f{i % 5} =", "answer": f"s{i % 4}"} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        task = TASK.format(name=name, folder=folder, kind=kind, metric=metric, extra=extra)
        (folder / f"{name}.yaml").write_text(task)
    (folder / "dev.jsonl").write_text(
        "".join(
            json.dumps({"question": f"solve s{i} f1 =", "answer": "s1"}) + "\n" for i in range(2)
        )
    )
    group = {"group": "chains", "task": ["chains_a", "chains_b"]}
    (folder / "chains.yaml").write_text(json.dumps(group))
    return folder


def chosen_by_transformers(hf_dir, prompt):
    """The likeliest state after the prompt."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
    return max(STATES, key=lambda state: logits[tokenizer.convert_tokens_to_ids(state)])


@needs_lm_eval
def test_model_and_baseline_on_problems_and_tasks_and_again(few, tasks, tmp_path):
    student, teacher, out = ASSETS / "student", ASSETS / "teacher", tmp_path / "results.json"
    command = (
        teacher, "--baseline", student, "--problems", few, "--samples", 4,
        "--lm-eval", "chains,said", "--lm-eval-tasks", tasks,
        "--lm-eval-args", "num_fewshot=2,limit=18", "--config-name", "quickstart", "--out", out,
        "evaluation.max_response_length=30000",
    )  # fmt: skip
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    told = run(*command, **environment)
    file = ResultsFile.read(out)
    assert "responses are limited to" in told and "64" in file.settings["max_tokens_from"]
    assert file.settings["max_tokens"] < 64
    assert list(file.models) == ["baseline", "model"]
    for hf_dir, measured in ((student, file.models["baseline"]), (teacher, file.models["model"])):
        assert measured["few"].samples == 4 and len(measured["few"].per_problem) == 12
        chains = measured["chains"]
        assert {k: len([q for q in chains.per_problem if k in q]) for k in chains.groups} == {
            "chains_a": 12,
            "chains_b": 6,
        }, "18 questions in proportion"
        shots = "solve s0 f1 = s1 solve s1 f1 = s1 "
        for question, right in list(chains.per_problem.items())[::3]:
            i = int(question.rpartition("/")[2])
            chosen = chosen_by_transformers(hf_dir, f"{shots}solve s{i % 20} f{i % 5} =")
            assert right == (chosen == f"s{i % 4}"), question
        assert len(measured["said"].per_problem) == 6
    assert file.models["model"]["few"].mean > file.models["baseline"]["few"].mean
    assert "Forgetting: baseline - model" in told
    # again, with more samples: what is there is not asked for a second time
    logs = sorted((tmp_path / "evaluation").glob("*/rollouts/rollouts.log"))
    before = [log.read_bytes() for log in logs]
    assert len(before) == 2 and all(len(text.splitlines()) == 48 for text in before)
    run(*command, "evaluation.samples=5", **environment)
    for log, text in zip(logs, before, strict=True):
        after = log.read_bytes()
        assert after.startswith(text) and len(after.splitlines()) == 60
    again = ResultsFile.read(out)
    assert again.models["model"]["chains"] == file.models["model"]["chains"]


@needs_lm_eval
def test_a_task_that_does_not_exist_is_named_before_a_server_starts(tasks, tmp_path):
    told = run(
        ASSETS / "student", "--lm-eval", "chainz", "--lm-eval-tasks", tasks,
        "--config-name", "quickstart", "--out", tmp_path / "results.json", status=2,
    )  # fmt: skip
    assert "evaluation.lm_eval.tasks names 'chainz'" in told
    assert not (tmp_path / "evaluation").exists()


def test_running_servers_are_asked_within_their_context(few, tmp_path):
    model, out = ASSETS / "student", tmp_path / "results.json"
    sidecar = make_sidecar(model, tmp_path, max_model_len=32)
    common = ("--problems", few, "--samples", 2, "--config-name", "quickstart", "--out", out,
              f"rollout.endpoints=['{sidecar.endpoint}']")  # fmt: skip
    with sidecar:
        sidecar.start()
        environment = {API_KEY_VARIABLE: sidecar.served.api_key}
        told = run(model, *common, "evaluation.max_response_length=30000", **environment)
        assert f"the context of {sidecar.endpoint} is 32" in told and "serves" not in told
        assert 8 <= ResultsFile.read(out).settings["max_tokens"] < 32
        told = run(ASSETS / "teacher", *common, **environment)
        assert f"serves {model}; what it answers is put down to" in told
        client = RolloutClient([sidecar.endpoint], sidecar.served.api_key)
        sync = WeightSync(client, WeightSwap.between_requests)
        send_files(sync, [ASSETS / "student" / "model.safetensors"], "step 7")
        told = run(model, *common, **environment)
        assert "serves weights that it was sent (step 7)" in told
