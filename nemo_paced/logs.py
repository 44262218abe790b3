"""What a command shows of its log."""

from __future__ import annotations

import logging
import warnings


def set_up_logging(rank: int) -> None:
    """Rank 0 tells what happens; the others only what is wrong."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("nemo_paced").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
