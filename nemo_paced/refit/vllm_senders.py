"""vLLM's trainer-side weight-transfer engines over the Megatron student.

This is the only module of the trainer that imports vLLM. Nothing here has run on a GPU yet; a test
holds every call to the signatures of the installed vLLM.
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
from nemo_paced.refit.meeting import Meeting
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.refit.weight_sync import WeightSync


class VllmSender:
    """Sender that is vLLM's engine of ``meeting.backend``.

    Making one joins the servers' group; collective.
    """

    again = None  # the servers' group is formed anew with all ranks

    def __init__(
        self,
        meeting: Meeting,
        sync: WeightSync | None,
        chunks: Sequence[PacedGPTModel],
        parallel: Parallel,
    ) -> None:
        client: Any = sync  # the other ranks' engines never call it
        weights: Any = source(meeting, chunks, parallel)  # structurally vLLM's class
        self._engine = WeightTransferTrainerFactory.trainer_init(
            init_info(meeting, parallel), client=client, source=weights
        )

    def prepare(self) -> None:
        """Nothing: parameters are gathered one at a time, while they are sent."""

    def send_weights(self) -> None:
        self._engine.send_weights()

    def abandon(self) -> bool:
        """``False``: the ranks may be anywhere in vLLM's collectives."""
        return False

    def shutdown(self) -> None:
        self._engine.shutdown()


def init_info(meeting: Meeting, parallel: Parallel) -> TrainerInitInfo:
    """The first message of ``meeting.backend``, by whose type vLLM's factory picks the engine."""
    if meeting.backend is RefitBackend.ipc:
        return IPCTrainerInitInfo(rank=parallel.rank, packed=True)
    workers = sum(meeting.workers)
    place: dict[str, Any] = {"master_address": meeting.address, "master_port": meeting.port}
    if meeting.backend is RefitBackend.nccl:
        return NCCLTrainerInitInfo(rank=parallel.rank, world_size=1 + workers, **place)
    # (servers, ranks of one): the servers, which are of equal size, replicate; the ranks shard
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
    """The weight source of ``meeting.backend``.

    It yields whole parameters on rank 0 (nccl) or on every rank (ipc), or each rank's shards (m2n).
    """
    if meeting.backend is RefitBackend.nccl:
        return MegatronWeightSource(chunks, parallel)
    if meeting.backend is RefitBackend.ipc:
        return EverywhereSource(chunks, parallel)
    return ShardSource(chunks, parallel)


class EverywhereSource(MegatronWeightSource):
    """Source for ``ipc``: every rank gets every whole parameter.

    A server's worker reads the copy of the rank that is on its GPU.
    """

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        shapes = {meta.name: meta.shape for meta in self.metadata()}
        for name, tensor in super().__iter__():
            if tensor is None:
                tensor = torch.empty(shapes[name], dtype=self.dtype, device=self.parallel.device)
            if self.parallel.world_size > 1:
                torch.distributed.broadcast(tensor, src=0)
            yield name, tensor

    def held_names(self) -> set[str] | None:
        """``None``: every rank receives every parameter."""
        return None


class ShardSource(M2NWeightSource):
    """Source for ``nccl_m2n``: each rank yields its tensor-parallel part of every parameter.

    m2n sends each part straight to the workers that hold it. What ``shard_dim`` does not cut (the
    vocabulary's, the experts') every rank yields whole.
    """

    def __init__(self, chunks: Sequence[PacedGPTModel], parallel: Parallel) -> None:
        self.chunks = chunks
        self.parallel = parallel
        self.dtype = next(chunks[0].parameters()).dtype

    def mesh(self) -> M2NMesh:
        """The trainer's ranks as ``[world / tp, tp]``: along the first axis they replicate.

        Tensor-parallel neighbours are next to each other in Megatron's order of ranks.
        """
        tensor = self.parallel.tp_size
        return M2NMesh((self.parallel.world_size // tensor, tensor), start_rank=0)

    def metadata(self) -> list[VllmParamMeta]:
        """Name, dtype, whole shape and placement of every parameter, on every rank."""
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
