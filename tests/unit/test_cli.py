import subprocess
import sys
import time

import pytest

from nemo_paced.cli import COMMANDS, main


def test_help_of_every_command_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from nemo_paced.cli import COMMANDS, main\n"
        "assert all(main([name, '--help']) == 0 for name in COMMANDS)\n"
        "names = 'torch nemo vllm transformers hydra megatron'.split()\n"
        "heavy = set(names) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 5
    for name in COMMANDS:
        assert f"usage: nemo-paced {name}" in done.stdout


def test_every_command_exists():
    import importlib

    for command in COMMANDS.values():
        module, _, function = command.entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "no command 'trian'"),
        (["train", "--config-name", "quickstart", "model.optim.lr=-1"], "model.optim.lr is -1"),
        (["train"], "data.problems is"),
        (["train", "--config-name", "quickstart", "data.max_prompt_length=5"], "above data.max_"),
        (["export-hf", "nowhere", "out"], "nowhere is no checkpoint"),
        (["report", "nowhere"], "nowhere is no run directory"),
        (
            [
                "train",
                "--config-name",
                "quickstart",
                "model.tensor_model_parallel_size=4",
                "trainer.devices=4",
            ],
            "does not divide the 2 key-value heads",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert told in message and "Traceback" not in message


def test_flags_may_stand_behind_overrides(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", "model.optim.lr=0.25", "--cfg", "job", "--config-name", "quickstart"]) == 0
    )
    printed = capsys.readouterr().out
    assert "lr: 0.25" in printed and "name: quickstart" in printed


@pytest.mark.parametrize("override", ["schedule=reverse_kl", "references.source=solution"])
def test_references_that_no_stage_trains_on_are_not_sampled(override, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["references", "--config-name", "quickstart", override]) == 0
    assert list(tmp_path.iterdir()) == []


def test_preflight_tells_everything_at_once_and_exits_with_2(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    overrides = ["data.max_prompt_length=5", "data.max_response_length=60"]
    assert main(["preflight", "--config-name", "quickstart", *overrides]) == 2
    told = capsys.readouterr().err
    assert told.count("\nerror: ") + told.startswith("error: ") == 3
    assert list(tmp_path.iterdir()) == []
