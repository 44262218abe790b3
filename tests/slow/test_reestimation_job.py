"""Adaptive estimates and free re-estimation with real ranks and a real server."""

import os
import shutil
import signal
import time

import pandas
import pytest

from tests.jobs import STEPS, command, left_running, metrics, run, train_arguments

pytestmark = pytest.mark.slow

FREE = (
    "schedule=reverse_kl",
    "weights.estimator=posterior",
    "weights.fit_prior=true",
    "weights.adaptive.enabled=true",
    "weights.adaptive.rollouts_per_round=0.5",
    "weights.reestimate=free",
)
GRADED = STEPS * 32  # one rollout of each problem of each step


def test_a_killed_run_with_free_reestimation_ends_with_the_same_pass_rates(tmp_path):
    """The server answers anew where a rollout was lost, so the resumed run replays those of the
    whole one: what is compared is that each is counted once, at its step."""
    run(*train_arguments(tmp_path, "whole", *FREE))
    whole = pandas.read_parquet(tmp_path / "whole" / "pass_rates.parquet")
    assert whole["weight"].mean() == pytest.approx(1)
    assert whole["num_rollouts"].sum() == 4 * len(whole) + GRADED
    assert (whole["student_step"] == STEPS).all()
    lines = metrics(tmp_path, "whole")
    assert lines[0]["weights/mean_pass_rate"] != lines[-1]["weights/mean_pass_rate"]

    rollouts = tmp_path / "killed" / "rollouts"
    rollouts.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "rollouts" / "rollouts.log", rollouts)
    process = command(*train_arguments(tmp_path, "killed", *FREE))
    path = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while left_running(str(tmp_path / "killed")) and time.monotonic() < deadline:
        time.sleep(0.2)
    run(*train_arguments(tmp_path, "killed", *FREE))
    killed = pandas.read_parquet(tmp_path / "killed" / "pass_rates.parquet")
    pandas.testing.assert_frame_equal(killed, whole, check_exact=True)
