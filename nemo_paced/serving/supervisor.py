"""A process that runs a server and ends its whole process tree when its own parent is gone.

It is started as ``python -m nemo_paced.serving.supervisor COMMAND...`` with a pipe as standard
input: the kernel closes the pipe when the parent dies, by SIGKILL too, and the end of file is the
order to stop.

The server's process group has a leader of ours, which holds the end of another such pipe: a
supervisor that is killed itself leaves nothing either. The leader does not outlive the server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

GRACE_S = 10.0  # between SIGTERM and SIGKILL
LEAD = "--lead"  # before the command: this process is the leader of its group


def main(command: list[str]) -> int:
    """Run the command in a session (hence process group) of its own; returns its exit code."""
    # the parent may have blocked them, and children inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
    leader = subprocess.Popen(
        [sys.executable, "-m", "nemo_paced.serving.supervisor", LEAD, *command],
        stdin=subprocess.PIPE,  # open as long as this process lives
        start_new_session=True,
    )
    ordered = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ordered.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, by closing the pipe
    _at_end_of_file(ordered.set)
    _in_thread(lambda: _end_group_when(ordered, leader))
    code = leader.wait()
    _signal_group(leader.pid, signal.SIGKILL)  # what is left of the group, such as helpers
    return code


def lead(command: list[str]) -> int:
    """Run the command in this process's group; returns its exit code."""
    _at_end_of_file(lambda: _signal_group(os.getpgrp(), signal.SIGKILL))
    # SIGTERM goes to the whole group: the server takes its time to end, and this process waits for
    # it. Not SIG_IGN, which the server would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()


def _at_end_of_file(act: Callable[[], None]) -> None:
    """Call ``act``, in a thread, once nobody holds the other end of standard input."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        act()

    _in_thread(wait)


def _in_thread(act: Callable[[], None]) -> None:
    threading.Thread(target=act, daemon=True).start()


def _end_group_when(ordered: threading.Event, leader: subprocess.Popen[bytes]) -> None:
    """End the leader's group, by force after ``GRACE_S``; in a thread, which ends with ``main``."""
    ordered.wait()
    _signal_group(leader.pid, signal.SIGTERM)
    time.sleep(GRACE_S)
    _signal_group(leader.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    led = sys.argv[1] == LEAD
    sys.exit(lead(sys.argv[2:]) if led else main(sys.argv[1:]))
