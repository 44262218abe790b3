"""``rollout.num_replicas`` servers of one model: started together, started again one by one."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nemo_paced.config import RolloutConfig, RolloutPlacement
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.serving.backends import choose_backend
from nemo_paced.serving.engine import Served
from nemo_paced.serving.sidecar import Sidecar, free_ports, listen_address
from nemo_paced.serving.vllm_engine import gpu_count

logger = logging.getLogger(__name__)


class Replicas:
    """Context manager around the servers of one model, which all require the same API key.

    :meth:`start` starts them, and leaving the context ends them.

    Args:
        model_dir: Hugging Face directory to serve.
        max_model_len: longest prompt plus response, tokens.
        dtype: ``float32`` or ``bfloat16``.
        log_path: the first server's log; those of the others have their number behind the name.
        api_key: the key; ``None``: one is made for these servers.
        trainer_gpus: how many of this node's GPUs, the first ones, a trainer uses meanwhile.

    Raises:
        ConfigError: fewer GPUs than the servers need.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: RolloutConfig,
        *,
        max_model_len: int,
        dtype: str,
        log_path: Path,
        api_key: str | None = None,
        trainer_gpus: int = 0,
    ) -> None:
        self.config = config
        self.api_key = api_key or secrets.token_urlsafe(32)
        count = config.num_replicas
        ports = [config.port + i for i in range(count)] if config.port else None
        gpus, visible = gpu_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        colocated = config.placement is RolloutPlacement.colocated
        devices = replica_devices(config, gpus, visible, first=0 if colocated else trainer_gpus)
        self.sleep = bool(colocated and gpus and trainer_gpus)  # while the trainer uses their GPUs
        host = listen_address(config.host)
        self.backend = choose_backend(config, gpus, [host])
        self.sidecars = {
            sidecar.endpoint: sidecar
            for index, port in enumerate(ports or free_ports(host, count))
            for sidecar in [
                Sidecar(
                    Served(
                        Path(model_dir),
                        config,
                        host=host,
                        port=port,
                        max_model_len=max_model_len,
                        dtype=dtype,
                        api_key=self.api_key,
                        devices=devices[index],
                        refit=self.backend,
                        sleeps=self.sleep,
                    ),
                    log_path.with_stem(f"{log_path.stem}_{index}") if index else log_path,
                )
            ]
        }
        self.restarts = dict.fromkeys(self.sidecars, 0)
        self._locks = {endpoint: threading.Lock() for endpoint in self.sidecars}

    @property
    def endpoints(self) -> list[str]:
        return list(self.sidecars)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(
        self,
        progress: Callable[[str], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Start all servers at once and wait until each is healthy.

        Args:
            meanwhile: what this thread does before it waits.

        Raises:
            RolloutError: one did not start, with the end of its log; the others are stopped.
        """
        (model,) = {sidecar.served.model_dir.name for sidecar in self.sidecars.values()}
        logger.info("starting vLLM on %s: %s", model, ", ".join(self.endpoints))
        with ThreadPoolExecutor(len(self.sidecars)) as pool:
            try:
                started = [pool.submit(s.start, progress) for s in self.sidecars.values()]
                if meanwhile:
                    meanwhile()
                for future in as_completed(started):
                    future.result()
            except BaseException:
                self.stop()  # ends the waiting of the other threads
                raise
        if progress:
            progress("")

    def stop(self) -> None:
        """End every server's process tree; safe to call twice."""
        with ThreadPoolExecutor(len(self.sidecars)) as pool:
            for future in [pool.submit(s.stop) for s in self.sidecars.values()]:
                future.result()

    def ended(self, within_s: float = 0.0) -> list[str]:
        """Endpoints of the servers that have ended, after waiting ``within_s`` for a first one."""
        deadline = time.monotonic() + within_s
        while True:
            ended = [endpoint for endpoint, s in self.sidecars.items() if not s.alive()]
            if ended or time.monotonic() >= deadline:
                return ended
            time.sleep(0.1)  # a dying one takes a moment

    def restart(self, endpoint: str, progress: Callable[[str], None] | None = None) -> None:
        """Start one server anew, with the weights of ``model_dir``: newer ones must be sent after.

        Raises:
            RolloutError: it died more than ``rollout.max_restarts`` times, or does not start.
        """
        sidecar = self.sidecars[endpoint]
        with self._locks[endpoint]:
            if sidecar.alive():  # another thread found it dead too
                return
            if self.restarts[endpoint] >= self.config.max_restarts:
                raise RolloutError(
                    f"the rollout server {endpoint} died {self.restarts[endpoint] + 1} times "
                    f"(rollout.max_restarts {self.config.max_restarts}); see {sidecar.log_path}"
                )
            self.restarts[endpoint] += 1
            logger.warning("the rollout server %s died: starting it again", endpoint)
            sidecar.restart(progress)

    def restart_all(self, progress: Callable[[str], None] | None = None) -> None:
        """Start every server anew, the dead as in :meth:`restart` and those that are well too.

        Raises:
            RolloutError: as in :meth:`restart`.
        """

        def one(endpoint: str) -> None:
            with self._locks[endpoint]:
                sidecar = self.sidecars[endpoint]
                if sidecar.alive():
                    logger.info("starting the rollout server %s again, beside another", endpoint)
                    sidecar.restart(progress)
                    return
            self.restart(endpoint, progress)

        with ThreadPoolExecutor(len(self.sidecars)) as pool:
            list(pool.map(one, self.sidecars))


def replica_devices(
    config: RolloutConfig, gpus: int, visible: str | None, *, first: int = 0
) -> list[str | None]:
    """``CUDA_VISIBLE_DEVICES`` of each replica: its own GPUs, as many as it is split over.

    Args:
        gpus: how many this process sees; 0 for the CPU build.
        visible: ``CUDA_VISIBLE_DEVICES`` of this process.
        first: index of the first of these GPUs that servers may have.

    Raises:
        ConfigError: fewer GPUs than the replicas need.
    """
    count, width = config.num_replicas, config.tensor_parallel_size
    if not gpus:
        return [None] * count
    if first + count * width > gpus:
        beside = f" beside the trainer's {first}" if first else ""
        remedy = "lower one of them"
        if first:
            remedy += ", set rollout.placement=colocated, or give rollout.endpoints of other nodes"
        raise ConfigError(
            f"rollout.num_replicas {count} x rollout.tensor_parallel_size {width} needs "
            f"{count * width} GPUs{beside} and {gpus} are visible: {remedy}"
        )
    names = (visible.split(",") if visible else [str(index) for index in range(gpus)])[first:]
    return [",".join(names[i * width : (i + 1) * width]) for i in range(count)]
