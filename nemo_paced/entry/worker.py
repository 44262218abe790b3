"""One rank of a training run that ``launch`` started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from nemo_paced.errors import PacedError
from nemo_paced.logs import set_up_logging


def main() -> int:
    _die_with_parent()
    set_up_logging(int(os.environ["RANK"]))
    from nemo_paced.compose import load_config
    from nemo_paced.training.loop import train

    try:
        train(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
    except PacedError as error:
        print(f"nemo-paced: error: {error}", file=sys.stderr, flush=True)
        # the other ranks may wait in a collective: leave without saying goodbye to them
        os._exit(2)
    return 0


def _die_with_parent() -> None:
    """Linux: a killed launcher leaves no rank behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
