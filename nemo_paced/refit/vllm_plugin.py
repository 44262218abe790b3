"""Weight-transfer backends for files and for gloo that run inside vLLM's processes.

vLLM finds them through the entry point group ``vllm.general_plugins``. Its own backends move
weights between GPUs; these serve the CPU build, trainers that share only a disk with the server
(``file``), and those that share only a network with it (``gloo``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory


def register() -> None:
    """Register both backends; vLLM calls it in every process that it starts."""
    if "file" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("file", FileWeightTransferEngine)
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """First message of the file backend: there is nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Update message of the file backend.

    Attributes:
        path: a safetensors file with Hugging Face names, on a disk that this process reads too.
    """

    path: str


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """First message of the gloo backend: where the group meets, and this server's ranks in it.

    Attributes:
        world_size: the trainer's rank 0 and all workers of all servers.
        rank_offset: rank of this server's first worker.
    """

    master_address: str
    master_port: int
    world_size: int
    rank_offset: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Update message of the gloo backend: what rank 0 is about to broadcast, in its order.

    Attributes:
        names: Hugging Face names.
        dtype_names: torch's, such as ``bfloat16``.
        shapes: of whole parameters.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
UpdateInfo = TypeVar("UpdateInfo", bound=WeightTransferUpdateInfo)


class _CheckpointEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Base of both: hands tensors with Hugging Face names to the model's own checkpoint loader."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # the base class would synchronise an accelerator, which the CPU build has not
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        model: Any = self.model
        model.load_weights(tensors)

    def _repack_tied_head(self) -> None:
        """On CPU a tied LM head keeps a prepacked copy, which the reload leaves as it was."""
        head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and self.model_config.hf_config.tie_word_embeddings and head:
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None:
        pass


class FileWeightTransferEngine(_CheckpointEngine[FileInitInfo, FileUpdateInfo]):
    """Backend ``file``: each update message is one safetensors file to load."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        from safetensors import safe_open

        with safe_open(update_info.path, framework="pt") as file:
            self._load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


class GlooWeightTransferEngine(_CheckpointEngine[GlooInitInfo, GlooUpdateInfo]):
    """Backend ``gloo``: each worker receives whole parameters, one at a time, in host memory."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        from nemo_paced.refit.gloo_group import join_group

        config = self.parallel_config
        worker = config.data_parallel_index * config.world_size + config.rank
        self._group = join_group(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank=init_info.rank_offset + worker,
            world_size=init_info.world_size,
        )

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        self._load(self._received(update_info))

    def _received(self, info: GlooUpdateInfo) -> Iterable[tuple[str, torch.Tensor]]:
        from nemo_paced.refit.gloo_group import broadcast

        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            broadcast(self._group, tensor)
            yield name, tensor
