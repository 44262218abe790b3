"""launchers/paced.sbatch on a real SLURM: stages over nodes, warning, requeue, resume, failure."""

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
STEPS = 16
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
    """The job's number; its output is run_dir.out."""
    slurm.environment |= {
        "VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "CONFIG": "quickstart",
        "RUN_DIR": str(run_dir),
        "MASTER_ADDR": "127.0.0.1",  # the nodes' names are not this machine's
        "OVERRIDES": QUICK,
        "STAGES": "pass-rates references train export-hf evaluate",
        **variables,
    }
    script = ROOT / "launchers" / "paced.sbatch"
    out = slurm.run("sbatch", "--parsable", f"--output={run_dir}.out", *flags, script)
    return out.strip()


def finished(slurm, job):
    return slurm.state(job)["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


def steps_of(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_job_warned_of_its_time_limit_is_queued_again_and_completes(slurm, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, "--nodes=2", "--ntasks-per-node=2", "--time=30",
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
    logs = {path.name for path in (run_dir / "slurm" / f"{job}.1").iterdir()}
    assert {f"train.{rank}.log" for rank in range(4)} <= logs
    resumed = (run_dir / "slurm" / f"{job}.1" / "train.0.log").read_text()
    assert f"resumed from {run_dir}/checkpoints/step_{stopped_at:08d}" in resumed


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
