"""Logging of the commands to standard error, by rank."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

PART_VARIABLE = "NEMO_PACED_PART"  # in the environment of a command that another runs: its pid


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Log handler on the current ``sys.stderr``, which a progress bar replaces to stay below."""

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


def launcher_rank() -> int:
    """This process's rank as torchrun or srun gave it; 0 where neither did."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def set_up_logging(rank: int) -> None:
    """Send logs to standard error: from INFO on for rank 0, from WARNING on for the others."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s [{rank}] %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_CurrentStderr()],
    )
    logging.getLogger("nemo_paced").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
