"""A run that is asked to stop: where it stops, and that it goes on as if never stopped."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nemo_paced.errors import Stopped
from tests.jobs import STEPS, command, left_running, metrics, run, train_arguments
from tests.slow.test_main_job import replay

pytestmark = pytest.mark.slow


def start_ranks(count, arguments, folder):
    """Each as ``srun`` starts its tasks."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = []
    for rank in range(count):
        variables = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with (folder / f"rank{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "nemo_paced.cli", *map(str, arguments)],
                    env={**os.environ, **variables},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return ranks


def wait_for(condition, processes):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.01)


def test_a_signal_to_any_rank_stops_all_at_one_step_and_the_run_goes_on(uninterrupted, tmp_path):
    name = "asked-to-stop"
    replay(uninterrupted, name)
    run_dir = uninterrupted / name
    arguments = train_arguments(
        uninterrupted, name, "exp_manager.checkpoint_callback_params.every_n_train_steps=100"
    )
    ranks = start_ranks(2, arguments, tmp_path)
    path = run_dir / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= 1, ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    statuses = [rank.wait(120) for rank in ranks]
    told = (tmp_path / "rank0.log").read_text()
    assert statuses == [Stopped.EXIT_STATUS] * 2, told
    stopped_at = len(metrics(uninterrupted, name))
    assert 1 <= stopped_at < STEPS and f"stopped on request after step {stopped_at}" in told
    kept = [directory.name for directory in (run_dir / "checkpoints").iterdir()]
    assert kept == [f"step_{stopped_at:08d}"]
    assert not left_running(str(run_dir))

    out = run(*arguments)
    assert f"at step {stopped_at}" in out
    whole, resumed = metrics(uninterrupted, "whole"), metrics(uninterrupted, name)
    assert [(a["step"], a["loss"], a["grad_norm"]) for a in whole] == [
        (b["step"], b["loss"], b["grad_norm"]) for b in resumed
    ]


def test_the_command_passes_the_signal_to_its_ranks_even_while_they_sample(uninterrupted):
    name = "stopped-sampling"
    run_dir = uninterrupted / name
    process = command(*train_arguments(uninterrupted, name, "weights.num_rollouts=2000"))
    log = run_dir / "rollouts" / "rollouts.log"
    wait_for(lambda: log.exists() and log.stat().st_size > 0, [process])
    began = time.monotonic()
    os.kill(process.pid, signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == Stopped.EXIT_STATUS, out
    assert time.monotonic() - began < 40, "sampling itself would take minutes"
    assert not (run_dir / "checkpoints").exists() and not left_running(str(run_dir))
