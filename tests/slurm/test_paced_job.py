"""launchers/paced.sbatch on a real SLURM: stages over nodes, servers on a node of their own,
warning, requeue, resume, failure."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "nemo_paced" / "quickstart" / "assets"
STEPS = 8
QUICK = (
    f"trainer.max_steps={STEPS} weights.num_rollouts=2 references.source=solution "
    "evaluation.samples=1 exp_manager.create_tensorboard_logger=false "
    "exp_manager.checkpoint_callback_params.every_n_train_steps=100"
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def submit(slurm, run_dir, *flags, **variables):
    """The job's number; its output is run_dir.out. It trains on a few problems."""
    problems = run_dir.with_suffix(".jsonl")
    lines = (ASSETS / "problems_train.jsonl").read_text().splitlines(keepends=True)
    problems.write_text("".join(lines[:64]))
    slurm.environment |= {
        "VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "CONFIG": "quickstart",
        "RUN_DIR": str(run_dir),
        "MASTER_ADDR": "127.0.0.1",  # the nodes' names are not this machine's
        "ROLLOUT_NODES": "0",
        **variables,
    }
    slurm.environment["OVERRIDES"] += f" data.problems={problems}"
    script = ROOT / "launchers" / "paced.sbatch"
    out = slurm.run("sbatch", "--parsable", f"--output={run_dir}.out", *flags, script)
    return out.strip()


def finished(slurm, job):
    return slurm.state(job)["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


def processes_of(job, run_dir):
    """What runs on any node with the job's environment, or writes to one of its logs: vLLM's
    processes write their title over their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            logs = any(file.path.startswith(f"{run_dir}/") for file in process.open_files())
            if logs or process.environ().get("SLURM_JOB_ID") == job:
                found.append(process)
        except psutil.Error:  # it has just ended
            pass
    return found


def steps_of(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_job_with_a_node_of_servers_is_warned_queued_again_and_completes(slurm, tmp_path):
    """Two nodes train, TP 2 x DP 2; the third one serves."""
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, "--nodes=3", "--ntasks-per-node=2", "--time=30",
                 ROLLOUT_NODES="1", ROLLOUT_HOST="lo", STAGES="pass-rates train export-hf evaluate",
                 OVERRIDES=f"{QUICK} model.tensor_model_parallel_size=2")  # fmt: skip
    out = Path(f"{run_dir}.out")
    metrics = run_dir / "metrics.jsonl"

    def said():
        return out.read_text() if out.exists() else ""

    slurm.wait(
        lambda: (metrics.exists() and metrics.read_text().count("\n") >= 2) or finished(slurm, job),
        "the first steps", 900,
    )  # fmt: skip
    assert not finished(slurm, job), said()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: "start 1:" in said() or finished(slurm, job), "the second start", 300)
    stopped_at = len(steps_of(run_dir))
    assert 2 <= stopped_at < STEPS, said()
    kept = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert kept == [f"step_{stopped_at:08d}"]

    slurm.wait(lambda: finished(slurm, job), "the whole job", 1200)
    state = slurm.state(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "pass-rates is done" in said(), "the second start leaves out what the first has done"
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    assert (run_dir / "checkpoints" / f"step_{STEPS:08d}" / "paced.json").exists()
    assert (run_dir / "hf" / "model.safetensors").exists()
    assert set(json.loads((run_dir / "results.json").read_text())["models"]) == {"model"}
    first, second = (run_dir / "slurm" / f"{job}.{start}" for start in range(2))
    assert {f"train.{rank}.log" for rank in range(4)} == {
        p.name for p in second.glob("train.?.log")
    }
    resumed = (second / "train.0.log").read_text()
    assert f"resumed from {run_dir}/checkpoints/step_{stopped_at:08d}" in resumed
    keys = [(start / "servers/n3/servers/student/api_key") for start in (first, second)]
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    assert keys[0].read_text() != keys[1].read_text()
    assert not list(run_dir.rglob("endpoints.json")), "the servers ended in order"
    assert not (run_dir / "servers" / "student" / "server.log").exists(), (
        "the trainers started none"
    )
    slurm.wait(lambda: not processes_of(job, run_dir), "the last process's end", 15)


def test_servers_that_are_gone_end_the_job_with_their_name_and_exit_code(slurm, tmp_path):
    run_dir = tmp_path / "lost"
    job = submit(slurm, run_dir, "--nodes=2", "--ntasks-per-node=2", "--time=30",
                 ROLLOUT_NODES="1", ROLLOUT_HOST="lo", STAGES="train",
                 OVERRIDES=f"{QUICK} rollout.max_restarts=0 trainer.max_steps=1000")  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    slurm.wait(
        lambda: (metrics.exists() and metrics.read_text()) or finished(slurm, job),
        "the first step", 600,
    )  # fmt: skip
    # what watches over it is left to clean up after it
    entry = ["-m", "vllm.entrypoints.openai.api_server"]
    servers = [p for p in processes_of(job, run_dir) if p.cmdline()[1:3] == entry]
    assert servers, Path(f"{run_dir}.out").read_text()
    key = (run_dir / "slurm" / f"{job}.0/servers/n2/servers/student/api_key").read_text().strip()
    assert not any(key in " ".join(process.cmdline()) for process in processes_of(job, run_dir))
    for server in servers:
        server.kill()
    slurm.wait(lambda: finished(slurm, job), "the job", 120)
    said = Path(f"{run_dir}.out").read_text()
    assert (slurm.state(job)["JobState"], slurm.state(job)["ExitCode"]) == ("FAILED", "2:0"), said
    assert "rollout-server failed with exit code 2" in said
    assert "died 1 times (rollout.max_restarts 0)" in said
    slurm.wait(lambda: not processes_of(job, run_dir), "the last process's end", 15)


def test_a_part_that_fails_ends_the_job_with_its_name_and_exit_code(slurm, tmp_path):
    run_dir = tmp_path / "wrong"
    job = submit(slurm, run_dir, "--nodes=1", "--ntasks-per-node=2", "--time=30",
                 STAGES="train evaluate", OVERRIDES="model.optim.lr=-1")  # fmt: skip
    slurm.wait(lambda: finished(slurm, job), "the job", 300)
    state = slurm.state(job)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    said = Path(f"{run_dir}.out").read_text()
    assert "train failed with exit code 2" in said and "model.optim.lr is -1" in said
    assert "evaluate" not in said
