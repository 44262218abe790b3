"""One rank of a training run that ``launch`` started."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from nemo_paced.errors import PacedError


def main() -> int:
    _die_with_parent()
    set_up_logging(int(os.environ["RANK"]))
    from nemo_paced.entry.compose import load_config
    from nemo_paced.training.loop import train

    try:
        train(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
    except PacedError as error:
        print(f"nemo-paced: error: {error}", file=sys.stderr, flush=True)
        # the other ranks may wait in a collective: leave without saying goodbye to them
        os._exit(2)
    return 0


def set_up_logging(rank: int) -> None:
    """Rank 0 tells what happens; the others only what is wrong."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("nemo_paced").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _die_with_parent() -> None:
    """Linux: a killed launcher leaves no rank behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
