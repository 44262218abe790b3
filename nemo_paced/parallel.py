"""Process groups of a run: built once from the configuration, then passed down as arguments.

Also the way rank 0 tells the others something without a collective: JSON through the key-value
store that torch.distributed starts with, so that a wait of hours times out nothing.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from nemo_paced import cpu_megatron
from nemo_paced.config import ModelConfig
from nemo_paced.errors import ConfigError

logger = logging.getLogger(__name__)

# Experts are whole: the narrow ones of today's models (768 columns) gain nothing from being cut,
# and the tensor-parallel ranks serve as expert-parallel or expert-data-parallel ones instead.
EXPERT_TENSOR_PARALLEL_SIZE = 1


@dataclass(frozen=True, slots=True)
class Parallel:
    """This rank's place in the layout.

    Attributes:
        groups: Megatron's collection, for its models, schedules and optimizers.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection

    @property
    def tp_group(self) -> ProcessGroup:
        return self.groups.tp

    @property
    def pp_group(self) -> ProcessGroup:
        return self.groups.pp

    @property
    def dp_group(self) -> ProcessGroup:
        return self.groups.dp

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def ep_size(self) -> int:
        return self.groups.ep.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialize(
    model: ModelConfig, *, accelerator: str = "auto", timeout_s: float = 1800
) -> Parallel:
    """Join the job (torchrun's environment variables, or alone without them) and build all groups.

    Raises:
        ConfigError: the ranks do not fit the layout, or the accelerator is not there.
    """
    on_gpu = _on_gpu(accelerator)
    if not on_gpu:
        cpu_megatron.enable()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    _join(backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    _check_layout(model, torch.distributed.get_world_size(), on_gpu=on_gpu)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=EXPERT_TENSOR_PARALLEL_SIZE,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # fractions work
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(model.seed)
    return Parallel(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def shutdown() -> None:
    """Leave the job; safe to call twice."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def publish(key: str, value: Any) -> None:
    """Give the other ranks a JSON value under a key of its own."""
    payload: Any = zlib.compress(json.dumps(value).encode(), level=1)
    _store().set(key, payload)


def await_value(key: str, timeout_s: float) -> Any:
    """Wait for :func:`publish` of the same key on another rank.

    Raises:
        torch.distributed.DistStoreError: after ``timeout_s``.
    """
    store = _store()
    store.wait([key], timedelta(seconds=timeout_s))
    return json.loads(zlib.decompress(store.get(key)))


def forget(key: str) -> None:
    """Drop a key that every rank has read."""
    if torch.distributed.get_world_size() > 1:
        _store().delete_key(key)


def _on_gpu(accelerator: str) -> bool:
    available = torch.cuda.is_available()
    if accelerator == "gpu" and not available:
        raise ConfigError(
            "trainer.accelerator is gpu and torch sees no GPU: install a CUDA build of torch, or "
            "set trainer.accelerator=cpu"
        )
    return available and accelerator != "cpu"


def _join(backend: str, timeout: timedelta) -> None:
    if torch.distributed.is_initialized():
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def _check_layout(model: ModelConfig, world_size: int, *, on_gpu: bool) -> None:
    ranks = model.model_parallel_size
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks were started, and model.tensor_model_parallel_size x "
            f"pipeline_model_parallel_size x context_parallel_size is {ranks}, which does not "
            "divide them"
        )
    if world_size % model.expert_layout_size:
        raise ConfigError(
            f"{world_size} ranks were started, and model.expert_model_parallel_size x "
            f"pipeline_model_parallel_size is {model.expert_layout_size}, which does not divide "
            "them"
        )
    if model.context_parallel_size > 1:
        raise ConfigError(
            f"model.context_parallel_size is {model.context_parallel_size}: only 1 is supported so "
            "far; use tensor, pipeline or data parallelism"
        )


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
