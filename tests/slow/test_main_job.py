"""The main job with real ranks and a real server, as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas
import pytest

from nemo_paced.run.environment import read_starts
from nemo_paced.run.metric_names import METRICS
from tests.jobs import STEPS, command, left_of, left_running, metrics, run, train_arguments

pytestmark = pytest.mark.slow


def tensorboard_tags(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(run_dir / "logs")).Reload().Tags()["scalars"])


def test_a_run_directory_holds_what_is_promised(uninterrupted):
    run_dir = uninterrupted / "whole"
    lines = metrics(uninterrupted, "whole")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in lines] == ["forward_kl"] * 3 + ["reverse_kl"] * 3
    # the others are in no run on a CPU, without a cache, of a model that does not think
    expected = set(METRICS) - {"throughput/mfu", "teacher/cached", "problems"}
    expected -= {"rollout/mean_thinking_length", "rollout/unfinished_thoughts"}
    assert {key for line in lines for key in line} - {"problems"} == expected, (
        "all are described, and no other"
    )
    for line in lines:
        parts = sum(v for k, v in line.items() if k.startswith("time/") and k != "time/step_s")
        assert 0 < parts <= line["time/step_s"], "they do not overlap"
    for line in lines[3:]:
        assert line["rollout/logprob_gap"] < 1e-4 and line["rollout/staleness"] == 0
    assert "validation/accuracy" in lines[2] and "validation/accuracy" in lines[5]
    table = pandas.read_parquet(run_dir / "pass_rates.parquet")
    assert table["weight"].mean() == pytest.approx(1.0)
    assert (table["student_step"] == 3).all(), "estimated again at the switch"
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004", "step_00000006"]
    assert tensorboard_tags(run_dir) == expected - {"stage"}
    (start,) = read_starts(run_dir)
    assert start.step == 0 and sum(start.devices.values()) == 2
    assert start.preparation_s["pass_rates"] > 0.1 and start.preparation_s["servers"] > 1
    assert "Application startup complete" in (run_dir / "servers/student/server.log").read_text()
    assert not left_running(str(run_dir))


@pytest.mark.parametrize("kill_after", [1, 4])
def test_a_run_killed_at_any_step_goes_on_as_if_never_stopped(uninterrupted, kill_after):
    name = f"killed{kill_after}"
    arguments = train_arguments(uninterrupted, name)
    process = command(*arguments)
    path = uninterrupted / name / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or len(path.read_text().splitlines()) < kill_after:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert len(left_of(process)) > 4, "ranks, a server, helpers of checkpoint writers and graders"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while left_of(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_of(process), "all of them die with their parent"
    run(*arguments)
    whole, resumed = metrics(uninterrupted, "whole"), metrics(uninterrupted, name)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert len(read_starts(uninterrupted / name)) == 2
    # forward KL: exactly; the reverse-KL stage samples anew where no rollout was kept
    for a, b in zip(whole[:3], resumed[:3], strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


def replay(folder, name):
    """Give a new run the rollouts of the uninterrupted one."""
    rollouts = folder / name / "rollouts"
    rollouts.mkdir(parents=True)
    stored = (folder / "whole" / "rollouts" / "rollouts.log").read_bytes()
    (rollouts / "rollouts.log").write_bytes(stored)


def test_torchrun_may_start_the_ranks_instead(uninterrupted):
    replay(uninterrupted, "torchrun")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    arguments = train_arguments(uninterrupted, "torchrun")
    done = subprocess.run(
        [*launcher, "-m", "nemo_paced.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for a, b in zip(
        metrics(uninterrupted, "whole"), metrics(uninterrupted, "torchrun"), strict=True
    ):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (1, 1)])
def test_other_layouts_give_the_same_losses_on_replayed_rollouts(uninterrupted, tensor, pipeline):
    name = f"tp{tensor}pp{pipeline}"
    replay(uninterrupted, name)
    run(
        *train_arguments(uninterrupted, name),
        f"model.tensor_model_parallel_size={tensor}",
        f"model.pipeline_model_parallel_size={pipeline}",
        f"trainer.devices={tensor * pipeline}",
    )
    for a, b in zip(metrics(uninterrupted, "whole"), metrics(uninterrupted, name), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_cached_teacher_knows_every_response_before_it_is_trained_on(uninterrupted):
    """Also those of problems that get their first weight at the switch."""
    replay(uninterrupted, "cached")
    stage = "divergence:forward_kl,responses:references,fraction:0.5"
    stages = f"stages=[{{name:first,{stage}}},{{name:second,{stage},reestimate_pass_rates:true}}]"
    run(*train_arguments(uninterrupted, "cached", "teacher.placement=cached", stages))
    whole, cached = metrics(uninterrupted, "whole"), metrics(uninterrupted, "cached")
    for a, b in zip(whole[:3], cached[:3], strict=True):  # up to the switch they are the same
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [line["teacher/cached"] for line in cached] == [
        line["weights/active_problems"] for line in cached
    ]
    assert weighted(uninterrupted / "cached", 3) - weighted(uninterrupted / "cached", 0)


def weighted(run_dir, step):
    """Problems with a weight after an estimation."""
    table = pandas.read_parquet(run_dir / "pass_rates" / f"step_{step:08d}.parquet")
    return set(table.loc[table["weight"] > 0, "id"])


def test_a_run_exports_evaluates_and_reports(uninterrupted, tmp_path):
    run_dir = uninterrupted / "whole"
    run("export-hf", run_dir, tmp_path / "hf")
    problems = tmp_path / "few.jsonl"
    from nemo_paced.compose import ASSETS

    lines = (ASSETS / "problems_heldout.jsonl").read_text().splitlines()[:20]
    problems.write_text("\n".join(lines) + "\n")
    out = run(
        "evaluate",
        tmp_path / "hf",
        "--problems",
        problems,
        "--samples",
        2,
        "--baseline",
        ASSETS / "student",
        "--out",
        tmp_path / "results.json",
        "--config-name",
        "quickstart",
    )
    assert "baseline - model" in out
    results = json.loads((tmp_path / "results.json").read_text())["models"]
    assert set(results) == {"model", "baseline"} and results["model"]["few"]["samples"] == 2
    run("import-hf", tmp_path / "hf", tmp_path / "checkpoint", "trainer.precision=fp32")
    run("export-hf", tmp_path / "checkpoint", tmp_path / "again")
    first, second = (tmp_path / n / "model.safetensors" for n in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()
    page = run("report", run_dir)
    assert "report.html" in page and "<svg" in (run_dir / "report.html").read_text()


def test_nothing_sampled_needs_no_server(uninterrupted):
    given = {
        "given": f"weights.pass_rates={uninterrupted / 'whole/pass_rates/step_00000000.parquet'}",
        "free": "weights.scheme=unweighted",
    }
    lines = {"whole": metrics(uninterrupted, "whole")}
    for name, weights in given.items():
        once = ["schedule=forward_kl", "trainer.val_check_interval=0", weights]
        out = run(*train_arguments(uninterrupted, name, *once))
        assert "no rollout server is started: nothing is sampled from the student" in out
        assert not (uninterrupted / name / "servers").exists()
        lines[name] = metrics(uninterrupted, name)
        assert [line["step"] for line in lines[name]] == list(range(1, STEPS + 1))
        assert ("weights/mean_pass_rate" in lines[name][0]) is (name == "given")
    losses = {name: [line["loss"] for line in lines[name][:3]] for name in lines}
    assert losses["given"] == pytest.approx(losses["whole"], rel=1e-6), "the same weights"
    assert losses["free"] != losses["given"]
    run("report", uninterrupted / "free")


def test_a_changed_setting_is_refused(uninterrupted):
    process = command(*train_arguments(uninterrupted, "whole", "model.optim.lr=1.0"))
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "model.optim.lr was" in out and "is 1.0" in out


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    run_dir = uninterrupted / "whole"

    def content():
        names = ("config.yaml", "metrics.jsonl", "pass_rates.parquet")
        return [(run_dir / name).read_bytes() for name in names]

    before = content()
    for _ in range(2):
        overrides = ("trainer.val_check_interval=3", "evaluation.samples=2")
        out = run(*train_arguments(uninterrupted, "whole", *overrides))
        assert "trained to step 6 already" in out
    assert content() == before
