"""A rollout server beside the trainer, as a child process."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from nemo_paced.errors import RolloutError
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.engine import Engine, Served
from nemo_paced.serving.vllm_engine import VLLM

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 25
STOP_TIMEOUT_S = 30.0  # the supervisor has killed what does not end long before


class Sidecar:
    """One server as a child process, to be started, watched and ended.

    Leaving it as a context manager ends the server. The server requires a key on every route, and
    dies with this process, whatever ends it.

    Args:
        log_path: the server's output is appended here.
    """

    def __init__(self, served: Served, log_path: Path, engine: Engine = VLLM) -> None:
        self.served = served
        self.log_path = log_path
        self.engine = engine
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.served.host}:{self.served.port}"

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, progress: Callable[[str], None] | None = None) -> None:
        """Start the server and wait until it is healthy.

        Raises:
            RolloutError: it ended, or was not healthy within ``rollout.start_timeout_s``; with the
                end of its log.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            command = self.engine.command(self.served)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_paced.serving.supervisor", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.engine.environment(self.served),
                # the supervisor outlives our killed process group just long enough to clean up
                start_new_session=True,
            )
        self._wait_until_healthy(progress)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def restart(self, progress: Callable[[str], None] | None = None) -> None:
        """Start the server anew, on the same port and with the weights of ``model_dir``."""
        self.stop()
        self.start(progress)

    def stop(self) -> None:
        """End the server's whole process tree; safe to call twice."""
        if self._process is None:
            return
        assert self._process.stdin is not None, "started with a pipe"
        self._process.stdin.close()
        self._process.terminate()  # the pipe alone would not do if a fork of ours held it too
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("the rollout server did not end in %.0f s: killed", STOP_TIMEOUT_S)
            self._process.kill()
            self._process.wait()
        self._process = None

    def _wait_until_healthy(self, progress: Callable[[str], None] | None) -> None:
        began = time.monotonic()
        client = RolloutClient([self.endpoint], self.served.api_key, engine=self.engine)
        while not client.healthy(self.endpoint):
            waited = time.monotonic() - began
            if not self.alive():
                raise RolloutError(f"the rollout server ended while starting.\n{self._log_tail()}")
            if waited > self.served.config.start_timeout_s:
                self.stop()
                raise RolloutError(
                    f"the rollout server was not healthy after {waited:.0f} s "
                    f"(rollout.start_timeout_s {self.served.config.start_timeout_s:g}).\n"
                    f"{self._log_tail()}"
                )
            if progress:
                progress(f"starting vLLM on {self.served.model_dir.name}, {waited:.0f} s")
            time.sleep(0.5)
        if progress:
            progress("")

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"Last lines of {self.log_path}:\n  " + "\n  ".join(lines)


def free_ports(host: str, count: int) -> list[int]:
    """``count`` different ports of ``host``'s interface that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((host, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def listen_address(host: str) -> str:
    """The IPv4 address of the network interface named ``host``; a host or an address as it is."""
    import psutil

    for address in psutil.net_if_addrs().get(host, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    return host
