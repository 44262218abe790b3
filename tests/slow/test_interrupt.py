"""Ctrl-C, which a terminal sends to every process of a command, ends it with a line and no more."""

import os
import signal
import time

import pytest

from tests.jobs import command, left_of, train_arguments

pytestmark = pytest.mark.slow


def quickstart_arguments(folder):
    return (
        *("quickstart", "--out", folder, "--steps", "4000", "--arms", "paced"),
        *("weights.num_rollouts=2", "schedule=forward_kl"),
    )


@pytest.mark.parametrize(
    ("which", "file"),
    [
        ("train", "run/servers/student/server.log"),
        ("train", "run/metrics.jsonl"),
        ("quickstart", "shared/servers/teacher/server.log"),
        ("quickstart", "paced/metrics.jsonl"),
    ],
)
def test_ctrl_c_ends_a_command_with_one_line_and_leaves_nothing(which, file, tmp_path):
    arguments = quickstart_arguments(tmp_path)
    if which == "train":
        arguments = train_arguments(tmp_path, "run", "trainer.max_steps=4000")
    process = command(*arguments)
    deadline = time.monotonic() + 200
    while not (tmp_path / file).exists() or not (tmp_path / file).read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    # killed by SIGINT where Python was inside an `exec` of its own; a shell says 130 of both
    assert process.returncode in (130, -signal.SIGINT)
    assert out.splitlines()[-1] == "nemo-paced: interrupted"
    assert out.count("interrupted") == 1 and "Traceback" not in out
    deadline = time.monotonic() + 15
    while left_of(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_of(process)
