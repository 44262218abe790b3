"""vLLM's trainer-side weight-transfer engines over the Megatron student.

The only module of the trainer that imports vLLM. Nothing here has run on a GPU yet; a test holds
every call to the signatures of the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta as VllmParamMeta
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.m2n_common import REPLICATE, REPLICATED, M2NMesh, M2NParamMeta
from vllm.distributed.weight_transfer.m2n_source import M2NWeightSource
from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from nemo_paced.config import RefitBackend
from nemo_paced.hf.local_shards import iter_local_shards, shard_dim
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel.groups import Parallel
from nemo_paced.refit.meeting import Meeting, Sender
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.refit.weight_sync import WeightSync


def make_vllm_sender(
    meeting: Meeting,
    sync: WeightSync | None,
    chunks: Sequence[PacedGPTModel],
    parallel: Parallel,
) -> Sender:
    """The engine of ``meeting.backend``, joined with the servers; collective."""
    client: Any = sync  # the other ranks' engines never call it
    weights: Any = source(meeting, chunks, parallel)  # structurally vLLM's class
    return WeightTransferTrainerFactory.trainer_init(
        init_info(meeting, parallel), client=client, source=weights
    )


def init_info(meeting: Meeting, parallel: Parallel) -> TrainerInitInfo:
    """What vLLM's factory picks the engine by."""
    if meeting.backend is RefitBackend.ipc:
        return IPCTrainerInitInfo(rank=parallel.rank, packed=True)
    workers = sum(meeting.workers)
    place: dict[str, Any] = {"master_address": meeting.address, "master_port": meeting.port}
    if meeting.backend is RefitBackend.nccl:
        return NCCLTrainerInitInfo(rank=parallel.rank, world_size=1 + workers, **place)
    # servers of equal size replicate, the ranks of one shard
    mesh = (len(meeting.workers), meeting.workers[0])
    return M2NTrainerInitInfo(
        rank=parallel.rank,
        num_trainer_ranks=parallel.world_size,
        world_size=parallel.world_size + workers,
        dst_mesh_dims=mesh,
        **place,
    )


def source(
    meeting: Meeting, chunks: Sequence[PacedGPTModel], parallel: Parallel
) -> WeightSource | MegatronWeightSource:
    """Whole parameters on rank 0 (nccl) or on every rank (ipc), or each rank's shards (m2n)."""
    if meeting.backend is RefitBackend.nccl:
        return MegatronWeightSource(chunks, parallel)
    if meeting.backend is RefitBackend.ipc:
        return EverywhereSource(chunks, parallel)
    return ShardSource(chunks, parallel)


class EverywhereSource(MegatronWeightSource):
    """Every rank gets every parameter: the server's worker on a GPU reads that GPU's copy."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        shapes = {meta.name: meta.shape for meta in self.metadata()}
        for name, tensor in super().__iter__():
            if tensor is None:
                tensor = torch.empty(shapes[name], dtype=self.dtype, device=self.parallel.device)
            if self.parallel.world_size > 1:
                torch.distributed.broadcast(tensor, src=0)
            yield name, tensor

    def held_names(self) -> set[str] | None:
        return None


class ShardSource(M2NWeightSource):
    """Each rank's tensor-parallel parts: m2n sends them straight to whom they belong."""

    def __init__(self, chunks: Sequence[PacedGPTModel], parallel: Parallel) -> None:
        self.chunks = chunks
        self.parallel = parallel
        self.dtype = next(chunks[0].parameters()).dtype

    def mesh(self) -> M2NMesh:
        """Tensor-parallel neighbours are next to each other; all else replicates."""
        tensor = self.parallel.tp_size
        return M2NMesh((self.parallel.world_size // tensor, tensor), start_rank=0)

    def metadata(self) -> list[VllmParamMeta]:
        architecture = self.chunks[0].architecture
        return [
            M2NParamMeta(
                name=name.format(layer=layer),
                dtype=self.dtype,
                shape=shape,
                placements=REPLICATED if dim is None else (REPLICATE, dim),
            )
            for row, layer in architecture.rows()
            for dim in [shard_dim(row, self.parallel.tp_size)]
            for name, shape in zip(row.hf, architecture.hf_shapes(row), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter_local_shards(self.chunks, self.parallel)
