"""Commands as a user starts them, on the embedded quickstart models."""

import contextlib
import json
import os
import subprocess
import sys
import uuid

import psutil

STEPS = 6
JOB = "NEMO_PACED_TEST_JOB"  # in the environment of a command and all that it starts
_started = []


def command(*arguments, **environment):
    """The process, with a mark of its own as ``job``."""
    job = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_paced.cli", *map(str, arguments)],
        env={**os.environ, JOB: job, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    process.job = job
    _started.append(job)
    return process


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


def left_of(process):
    """Processes that a :func:`command` started and that still run, whatever became of it."""
    found = []
    for each in psutil.process_iter():
        try:
            if each.environ().get(JOB) == process.job:
                found.append(each.cmdline())
        except psutil.Error:  # gone meanwhile
            continue
    return found


def end_all():
    """Kill what is left of every :func:`command` so far."""
    jobs = {_started.pop() for _ in range(len(_started))}
    for each in psutil.process_iter() if jobs else ():
        with contextlib.suppress(psutil.Error):
            if each.environ().get(JOB) in jobs:
                each.kill()


def left_running(marker):
    found = subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True).stdout.split()
    return [pid for pid in found if int(pid) != os.getpid()]
