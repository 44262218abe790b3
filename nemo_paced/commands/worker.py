"""The program of one rank that ``launch`` started: ``TASK CONFIG_FILE PATH...``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from nemo_paced.errors import PacedError, Stopped
from nemo_paced.logs import set_up_logging
from nemo_paced.training import stop

PARENT_POLL_S = 0.5
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}  # the launcher's to ranks
_LAUNCHER = os.getppid()


def main() -> int:
    if sys.argv[1] == "train":
        stop.listen()
    _end_group_with_parent()
    set_up_logging(int(os.environ["RANK"]))
    from nemo_paced.commands.launch import EXIT_SAID, run_task
    from nemo_paced.compose import load_config

    try:
        task, config_file, *paths = sys.argv[1:]
        run_task(task, load_config(Path(config_file)), *map(Path, paths))
    except Stopped as stopped:
        if str(stopped):
            print(f"nemo-paced: {stopped}", file=sys.stderr, flush=True)
        return Stopped.EXIT_STATUS
    except PacedError as error:
        if str(error):
            print(f"nemo-paced: error: {error}", file=sys.stderr, flush=True)
        # the other ranks may wait in a collective: leave without saying goodbye to them
        if os.getpgrp() == os.getpid() and os.getppid() != _LAUNCHER:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # nobody else will end this rank's helpers
        os._exit(EXIT_SAID)
    return 0


def _end_group_with_parent() -> None:
    """End this rank's helpers with it, also when the launcher is killed.

    Megatron's checkpoint writer keeps server processes that outlive a rank which does not exit by
    itself. They are in this rank's process group; threads wait for the launcher's signal (the one
    that ended it), and for the launcher to be gone, and end the whole group. (The rollout server
    has a session and a watcher of its own.) Threads, since the main one may be in a collective.
    """
    if os.getpgrp() != os.getpid():
        return  # not started by our launcher: the group is somebody else's
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def end_when_told() -> None:
        signal.sigwait(ENDING)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def end_with_launcher() -> None:
        while os.getppid() == _LAUNCHER:
            time.sleep(PARENT_POLL_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    for watch in (end_when_told, end_with_launcher):
        threading.Thread(target=watch, daemon=True, name="parent watch").start()


if __name__ == "__main__":
    sys.exit(main())
