"""launchers/paced.sbatch refuses, before any part is started, what could not work."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launchers" / "paced.sbatch"
ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "paced",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "CONFIG": "quickstart",
    "VENV": "/venv",
}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"CONFIG": ""}, "name a recipe of conf/"),
        ({"VENV": ""}, "name what to run in: VENV=DIR or CONTAINER=IMAGE"),
        ({"SLURM_NTASKS_PER_NODE": ""}, "say sbatch --ntasks-per-node"),
        ({"ROLLOUT_NODES": "2", "ROLLOUT_HOST": "ib0"}, "is 2 of 2 nodes: none is left to train"),
        ({"ROLLOUT_NODES": "1"}, "name the interface that their servers listen on"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(variables, told, tmp_path):
    done = subprocess.run(
        ["bash", LAUNCHER],
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), **ALLOCATION}
        | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2) and told in done.stderr
    assert not list(tmp_path.iterdir())
