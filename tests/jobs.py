"""Commands as a user starts them, on the embedded quickstart models."""

import json
import os
import subprocess
import sys

STEPS = 6


def command(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_paced.cli", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments, **environment):
    process = command(*arguments, **environment)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-4000:]
    return out


def train_arguments(folder, name, *overrides):
    return (
        "train",
        "--config-name",
        "quickstart",
        f"exp_manager.exp_dir={folder}",
        f"exp_manager.name={name}",
        f"trainer.max_steps={STEPS}",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
        "references.source=solution",
        "weights.num_rollouts=4",
        *overrides,
    )


def metrics(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def left_running(marker):
    found = subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True).stdout.split()
    return [pid for pid in found if int(pid) != os.getpid()]
