"""What a command shows of its log."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

PART_VARIABLE = "NEMO_PACED_PART"  # in the environment of a command that another one runs


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what ``sys.stderr`` is now: a progress bar puts itself there and stays below."""

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
    """Rank 0 tells what happens; the others only what is wrong."""
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
