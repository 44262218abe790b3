"""Runs a server and ends its whole process tree when the one who started it is gone.

``python -m nemo_paced.rollout.supervisor COMMAND...`` with a pipe as standard input: the kernel
closes the pipe when the parent dies, by SIGKILL too, and the end of file is the order to stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10.0


def main(command: list[str]) -> int:
    """Exit code of the command, which runs in a session (hence process group) of its own."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the parent may have it blocked
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: _end_group(server))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, by closing the pipe
    threading.Thread(target=_stop_at_end_of_file, args=(server,), daemon=True).start()
    code = server.wait()
    _signal_group(server, signal.SIGKILL)  # helpers that outlived the server
    return code


def _stop_at_end_of_file(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    _end_group(server)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    _signal_group(server, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(server, signal.SIGKILL)


def _signal_group(server: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
