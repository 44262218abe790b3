"""Starts the ranks of a training run on this node, or joins those that a launcher started."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError, PacedError
from nemo_paced.logs import launcher_rank
from nemo_paced.training.prepare import save_config

CHECK_ONLY_FLAG = "--check-only"


def launch(config: PacedConfig, run_dir: Path, *, only_check: bool = False) -> None:
    """Train on ``trainer.devices`` ranks of this node; under torchrun or srun, as one rank.

    Args:
        only_check: end after the checks that ranks make together.

    Raises:
        PacedError: a rank failed; what it said is on standard error already.
    """
    if _join_launcher():
        run_rank(config, run_dir, only_check=only_check)
        return
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes is {config.trainer.num_nodes}: start the command on every node "
            "with torchrun or srun, which set the ranks"
        )
    if not only_check:
        _start_ranks(config.trainer.devices, run_dir / "config.yaml", run_dir)
        return
    with tempfile.TemporaryDirectory() as folder:  # nothing is left of a check
        save_config(config, Path(folder))
        _start_ranks(config.trainer.devices, Path(folder) / "config.yaml", run_dir, CHECK_ONLY_FLAG)


def run_rank(config: PacedConfig, run_dir: Path, *, only_check: bool) -> None:
    """One rank: the checks that all make together, then training.

    Raises:
        PacedError: without a message where rank 0 has said it.
    """
    from nemo_paced.preflight.findings import refuse
    from nemo_paced.preflight.ranks import check_ranks

    refuse(check_ranks(config), shown=launcher_rank() == 0)
    if not only_check:
        from nemo_paced.training.loop import train

        train(config, run_dir)


def _join_launcher() -> bool:
    """Whether torchrun or srun started this process; srun's variables become torchrun's."""
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


def _start_ranks(count: int, config_file: Path, run_dir: Path, *flags: str) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # a failed rank has said why; the agent's report would repeat it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=run_dir.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(agent, sys.executable)(
            "-m", "nemo_paced.entry.worker", str(config_file), str(run_dir), *flags
        )
    except ChildFailedError as error:
        for failure in error.failures.values():
            with contextlib.suppress(ProcessLookupError):  # helpers that outlived their rank
                os.killpg(failure.pid, signal.SIGKILL)
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_SAID:
            raise AlreadySaid from None
        raise PacedError(
            f"rank {rank} ended with exit code {failure.exitcode}; its traceback is above"
        ) from None


EXIT_SAID = 2  # of a rank that printed a PacedError


class AlreadySaid(PacedError):
    """The message was printed by the rank that failed."""
