"""vLLM's CPU platform with an engine that is forked: a server starts in a third of the time.

vLLM spawns an engine process and from that a worker process, each of which imports 6,000 modules
again (7 s of processor time). It does so to set each worker's OpenMP threads and cores before its
library loads. Forked from the HTTP process, which has not computed anything yet, the engine has
all that is imported, runs the worker inside itself and takes its threads from OMP_NUM_THREADS.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ForkingCpuPlatform(CpuPlatform):
    """vLLM's CPU platform with one forked process for engine and worker of a model on one rank."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().check_and_update_config(vllm_config)
        if vllm_config.parallel_config.world_size == 1:
            vllm_config.parallel_config.distributed_executor_backend = "uni"
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
