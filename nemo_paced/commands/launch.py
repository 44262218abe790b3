"""How a command starts its ranks on this node, or joins those that a launcher started."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
from pathlib import Path

from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError, Interrupted, PacedError, Stopped
from nemo_paced.parallel.gpu_environment import set_for_trainer
from nemo_paced.serving.backends import may_share_memory
from nemo_paced.training import stop

# task -> module:function, which every rank calls with the configuration and paths
TASKS = {
    "preflight": "nemo_paced.preflight.ranks:refuse_ranks",
    "train": "nemo_paced.training.loop:train",
    "import-hf": "nemo_paced.run.convert:import_hf",
    "export-hf": "nemo_paced.run.convert:export_hf",
    "snr": "nemo_paced.snr.measure:measure",
}

_WORKER = "nemo_paced.commands.worker"


def launch(task: str, config: PacedConfig, config_file: Path, *paths: Path) -> None:
    """Run a task on ``trainer.devices`` ranks of this node; under torchrun or srun, as one rank.

    Args:
        task: a key of ``TASKS``.
        config_file: where the configuration was saved: the ranks that are started read it.
        paths: the task's other arguments.

    Raises:
        ConfigError: several nodes without a launcher.
        PacedError: a rank failed; what it said is on standard error already.
        Interrupted: by SIGINT, SIGTERM or SIGHUP to this process.
        Stopped: the run was asked to stop and did; the ranks that are started here are asked by
            SIGUSR1 to this process.
    """
    if join_launcher():
        run_task(task, config, *paths)
        return
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes is {config.trainer.num_nodes}: start the command on every node "
            "with torchrun or srun, which set the ranks"
        )
    _start_ranks(config.trainer.devices, task, config_file, *paths)


def run_task(task: str, config: PacedConfig, *paths: Path) -> None:
    """Run this rank's part of a task; ``train`` begins with the checks that ranks make together."""
    if config.trainer.accelerator != "cpu":
        set_for_trainer(shares_memory=may_share_memory(config.rollout))
    if task == "train":
        run_task("preflight", config)
    module, _, function = TASKS[task].partition(":")
    getattr(importlib.import_module(module), function)(config, *paths)


def join_launcher() -> bool:
    """Whether torchrun or srun started this process; srun's variables become torchrun's.

    Raises:
        ConfigError: srun without ``MASTER_ADDR``.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return False
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "started by srun without MASTER_ADDR: export it with the name of the first node "
            "(scontrol show hostnames | head -n 1)"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    return True


def _start_ranks(count: int, task: str, *paths: Path) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # a failed rank has said why, and who interrupts knows it; the agent's report would repeat it
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=paths[-1].name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    if task == "train":
        stop.pass_on(_WORKER)
    try:
        elastic_launch(agent, sys.executable)("-m", _WORKER, task, *map(str, paths))
    except SignalException as ending:  # the agent has ended the ranks by it
        raise Interrupted(ending.sigval) from None
    except ChildFailedError as error:
        for failure in error.failures.values():
            with contextlib.suppress(ProcessLookupError):  # helpers that outlived their rank
                os.killpg(failure.pid, signal.SIGKILL)
        rank, failure = error.get_first_failure()
        if failure.exitcode == Stopped.EXIT_STATUS:
            raise Stopped from None
        if failure.exitcode == EXIT_SAID:
            raise AlreadySaid from None
        raise PacedError(
            f"rank {rank} ended with exit code {failure.exitcode}; its traceback is above"
        ) from None


EXIT_SAID = 2  # exit status of a rank that printed a PacedError


class AlreadySaid(PacedError):
    """A rank failed and has printed why; this error has no message."""
