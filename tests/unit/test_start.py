"""What a command imports before it answers: seconds of every start are made of it."""

import subprocess
import sys

import pytest

from tests.runs import write_run

HEAVY = ("torch", "megatron", "lightning", "nemo", "transformers", "vllm", "torchmetrics")
PROGRAM = """\
import sys
from nemo_paced.cli import main
status = main(sys.argv[1:])
found = sorted(set({heavy!r}) & set(sys.modules))
print("IMPORTED", status, len(sys.modules), *found)
"""
RECIPE = "qwen3_1.7b_from_8b_2n8g_tp4"
MODELS = ["student.hf_path=tests/models/Qwen3-1.7B", "teacher.hf_path=tests/models/Qwen3-8B"]


def imported(*arguments, cwd="."):
    """Exit status, number of modules and the heavy ones of them, after a command in its process."""
    program = PROGRAM.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd,
    )  # fmt: skip
    assert "IMPORTED" in done.stdout, done.stderr
    status, count, *heavy = done.stdout.rpartition("IMPORTED")[2].split()
    return int(status), int(count), set(heavy)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        write_run(folder / name, steps=4)
    (folder / "responses.jsonl").write_text('{"response": "it is 7", "answer": "7"}\n')
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (["plan", "--config-name", RECIPE, *MODELS], 800),
        (["train", "--config-name", "quickstart", "--cfg", "job"], 800),
        (["weights", "--pass-rates", "RUNS/a/pass_rates.parquet", "weights.beta=2"], 2500),
        (["grade", "RUNS/responses.jsonl"], 2500),
        (["report", "RUNS/a"], 2500),
        (["report", "--compare", "RUNS/a", "RUNS/b"], 2500),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_without_a_model_imports_no_torch(arguments, most, runs):
    status, count, heavy = imported(*(a.replace("RUNS", runs) for a in arguments))
    assert (status, heavy) == (0, set())
    assert count < most, "about a millisecond a module"


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (
            ["preflight", "--config-name", "quickstart", "data.problems=no_such_file"],
            {"torch", "transformers"},
        ),
        (
            ["train", "--config-name", "quickstart", "data.problems=no_such_file"],
            {"torch", "transformers"},
        ),
        (["pass-rates", "data.problems=no_such_file"], set()),
        (["references", "--config-name", "quickstart", "data.problems=no_such_file"], set()),
        (["evaluate", "no_such_model"], set()),
        (["export-hf", "no_such_run", "out"], set()),
        (["rollout-server", "student.hf_path=no_such_model"], set()),
        (["snr", "no_such_run"], set()),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_before_megatron_is_imported(arguments, allowed, tmp_path):
    status, _, heavy = imported(*arguments, cwd=tmp_path)
    assert status == 2
    assert heavy <= allowed


def test_a_rank_imports_neither_nemo_nor_lightning():
    program = f"""\
import sys
import nemo_paced.commands.worker, nemo_paced.preflight.ranks, nemo_paced.training.loop
print(*sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["megatron", "torch"], done.stderr
