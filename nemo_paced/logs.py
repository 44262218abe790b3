"""What a command shows of its log."""

from __future__ import annotations

import logging
import os
import warnings


def launcher_rank() -> int:
    """This process's rank as torchrun or srun gave it; 0 where neither did."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def set_up_logging(rank: int) -> None:
    """Rank 0 tells what happens; the others only what is wrong."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("nemo_paced").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
