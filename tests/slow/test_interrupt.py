"""A signal ends a command with one line and no more, and nothing of it runs on."""

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


def ctrl_c(process):
    """As a terminal sends it: to every process of the command."""
    os.killpg(process.pid, signal.SIGINT)


def sigterm(process):
    process.terminate()


def sigkill(process):
    process.kill()


# killed by SIGINT where Python was inside an `exec` of its own; a shell says 130 of both
INTERRUPTED = (128 + signal.SIGINT, -signal.SIGINT)


@pytest.mark.parametrize(
    ("which", "file", "end", "status"),
    [
        ("train", "run/servers/student/server.log", ctrl_c, INTERRUPTED),
        ("train", "run/metrics.jsonl", ctrl_c, INTERRUPTED),
        ("train", "run/metrics.jsonl", sigterm, (128 + signal.SIGTERM,)),
        ("quickstart", "shared/servers/teacher/server.log", ctrl_c, INTERRUPTED),
        ("quickstart", "paced/metrics.jsonl", sigterm, (128 + signal.SIGTERM,)),
        ("quickstart", "paced/metrics.jsonl", sigkill, (-signal.SIGKILL,)),
    ],
)
def test_a_signal_ends_a_command_with_one_line(which, file, end, status, tmp_path):
    arguments = quickstart_arguments(tmp_path)
    if which == "train":
        arguments = train_arguments(tmp_path, "run", "trainer.max_steps=4000")
    process = command(*arguments)
    deadline = time.monotonic() + 400
    while not (tmp_path / file).exists() or not (tmp_path / file).read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    end(process)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in status
    assert "Traceback" not in out
    if end is not sigkill:
        assert out.splitlines()[-1] == "nemo-paced: interrupted"
        assert out.count("interrupted") == 1
    deadline = time.monotonic() + 15
    while left_of(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_of(process)
