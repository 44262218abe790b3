"""One server beside the trainer: vLLM's OpenAI-compatible server as a child process."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx

from nemo_paced.config import RefitBackend, RolloutConfig
from nemo_paced.errors import RolloutError
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.completions import SERVED_NAME
from nemo_paced.serving.vllm_platform import FORK_VARIABLE

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 25


class Sidecar:
    """Starts, watches and ends one vLLM server; use as a context manager.

    The server listens on ``rollout.host`` (loopback unless told otherwise), asks for a key made for
    this run on every route, and dies with this process, whatever ends it.

    Args:
        model_dir: Hugging Face directory to serve.
        max_model_len: longest prompt plus response, tokens.
        dtype: ``float32`` or ``bfloat16``.
        log_path: where the server's output goes.
        port: where it listens.
        api_key: what every route asks for.
        devices: ``CUDA_VISIBLE_DEVICES`` of the server; ``None`` for those of this process.
        refit: how it gets new weights.
        sleeps: its GPUs are somebody else's too.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: RolloutConfig,
        *,
        max_model_len: int,
        dtype: str,
        log_path: Path,
        port: int,
        api_key: str,
        devices: str | None = None,
        refit: RefitBackend = RefitBackend.file,
        sleeps: bool = False,
    ) -> None:
        self.model_dir = Path(model_dir)
        self.config = config
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.log_path = log_path
        self.host = listen_address(config.host)
        self.port = port
        self.api_key = api_key
        self.devices = devices
        self.refit = refit
        self.sleeps = sleeps
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

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
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_paced.serving.supervisor", *self._command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # outlives a killed group just long enough to clean up
            )
        self._wait_until_healthy(progress)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ended(self, within_s: float) -> bool:
        """Whether the server is gone, or goes within that time (a dying one takes a moment)."""
        deadline = time.monotonic() + within_s
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.alive()

    def restart(self, progress: Callable[[str], None] | None = None) -> None:
        """Start anew on the same port with the weights of ``model_dir``: send newer ones after."""
        self.stop()
        self.start(progress)

    def stop(self) -> None:
        """End the whole process tree; safe to call twice."""
        if self._process is None:
            return
        assert self._process.stdin is not None, "started with a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _command(self) -> list[str]:
        arguments = {
            "--model": str(self.model_dir),
            "--served-model-name": SERVED_NAME,
            "--host": self.host,
            "--port": str(self.port),
            "--dtype": self.dtype,
            "--max-model-len": str(self.max_model_len),
            "--max-num-seqs": str(self.config.max_num_seqs),
            "--tensor-parallel-size": str(self.config.tensor_parallel_size),
            # the model's generation_config.json must not change how we sample
            "--generation-config": "vllm",
            "--middleware": "nemo_paced.serving.api_key.ApiKeyMiddleware",
            "--weight-transfer-config": json.dumps({"backend": self.refit.value}),
        }
        python = self.config.python or sys.executable
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in arguments.items():
            command += [name, value]
        # token ids travel: the server needs no tokenizer
        command += ["--skip-tokenizer-init", "--disable-uvicorn-access-log"]
        command += ["--enable-scale-out"]  # /inference/v1/generate
        if self.sleeps:
            command.append("--enable-sleep-mode")
        if gpu_count():
            return [*command, "--gpu-memory-utilization", str(self.config.gpu_memory_utilization)]
        # On CPU vLLM 0.32 dies on a seeded request whose prefill is cut in two ("CPU Generator does
        # not use offset"), so prompts are prefilled whole.
        batched_tokens = max(self.max_model_len, 4096)
        return [
            *command,
            "--enforce-eager",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            str(batched_tokens),
        ]

    def _environment(self) -> dict[str, str]:
        special = {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}
        if self.refit is RefitBackend.ipc:  # handles travel pickled, on a route that our key guards
            special["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if not gpu_count():
            special[FORK_VARIABLE] = "1"
            # a core for HTTP, as vLLM reserves it
            threads = str(max(1, len(os.sched_getaffinity(0)) - 1))
            special["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
        return {
            **_without_torchrun(os.environ),
            **special,
            API_KEY_VARIABLE: self.api_key,
            "VLLM_SERVER_DEV_MODE": "1",  # opens the weight routes, which our key guards
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(self.config.kv_cache_gib))),
            "VLLM_PLUGINS": "nemo_paced",  # every installed package may bring some: seconds each
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _wait_until_healthy(self, progress: Callable[[str], None] | None) -> None:
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {self.api_key}"}
        with httpx.Client(trust_env=False, timeout=5.0, headers=headers) as client:
            while True:
                waited = time.monotonic() - began
                if not self.alive():
                    raise RolloutError(
                        f"the rollout server ended while starting.\n{self._log_tail()}"
                    )
                if waited > self.config.start_timeout_s:
                    self.stop()
                    raise RolloutError(
                        f"the rollout server was not healthy after {waited:.0f} s "
                        f"(rollout.start_timeout_s {self.config.start_timeout_s:g}).\n"
                        f"{self._log_tail()}"
                    )
                try:
                    if client.get(f"{self.endpoint}/health").status_code == httpx.codes.OK:
                        if progress:
                            progress("")
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                if progress:
                    progress(f"starting vLLM on {self.model_dir.name}, {waited:.0f} s")
                time.sleep(0.5)

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"Last lines of {self.log_path}:\n  " + "\n  ".join(lines)


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((host, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def listen_address(host: str) -> str:
    """The IPv4 address of a network interface; a host name or an address as it is."""
    import psutil

    for address in psutil.net_if_addrs().get(host, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    return host


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _without_torchrun(environment: os._Environ[str]) -> dict[str, str]:
    """vLLM would take the trainer's rank variables for its own."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {k: v for k, v in environment.items() if k not in own and not k.startswith(prefixes)}
