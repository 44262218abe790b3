"""Hugging Face tensors as the ranks of a layout hold them: each its tensor-parallel part.

Transports that reshard on the way (``rollout.refit=nccl_m2n``) take these. Unlike in
:mod:`nemo_paced.hf.export_weights`, a rank puts a parameter together only where its part is no
equal part of a Hugging Face tensor, and one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.export_weights import gather_shards, stage_of
from nemo_paced.hf.model import PacedGPTModel, local_parameters
from nemo_paced.hf.rows import ParameterLayout, ParameterRow
from nemo_paced.hf.shards import join, split_qkv
from nemo_paced.parallel.groups import Parallel


def shard_dim(row: ParameterRow, tp_size: int) -> int | None:
    """The dimension along which tensor-parallel ranks hold equal parts of a row's tensors.

    ``None``: :func:`iter_local_shards` yields them whole.
    """
    if tp_size == 1 or row.expert is not None or row.layout is ParameterLayout.replicated:
        return None
    if row.layout is ParameterLayout.vocabulary:
        return None  # padded: its parts are not equal parts of the Hugging Face tensor
    return 1 if row.layout is ParameterLayout.row else 0


def iter_local_shards(
    chunks: Sequence[PacedGPTModel], parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, this rank's part) of every parameter of the whole model.

    The order is that of ``Architecture.rows``. Collective over all ranks. What lies on one pipeline
    stage or one expert-parallel rank is broadcast to its counterparts, a parameter at a time, so
    that every rank yields every name: 1/tp of a tensor along :func:`shard_dim`, or all of it.
    """
    architecture = chunks[0].architecture
    held = {(row, layer): p.detach() for p, row, layer in local_parameters(chunks)}
    for row, layer in architecture.rows():
        stage = stage_of(chunks, row, layer, parallel)
        own: list[torch.Tensor] | None = None
        if parallel.pp_rank == stage and (row, layer) in held:
            own = _parts(row, held[row, layer], architecture, parallel)
        shapes = _part_shapes(row, architecture, parallel.tp_size)
        for index, name in enumerate(row.hf):
            part = own[index].contiguous() if own is not None else None
            if part is None:
                some = next(chunks[0].parameters())
                part = torch.empty(shapes[index], dtype=some.dtype, device=parallel.device)
            if row.expert is not None and parallel.pp_rank == stage:
                _send(part, chunks[0].expert_owner(row.expert), parallel.groups.ep)
            _send(part, stage, parallel.pp_group)
            yield name.format(layer=layer), part


def _parts(
    row: ParameterRow, shard: torch.Tensor, architecture: Architecture, parallel: Parallel
) -> list[torch.Tensor]:
    """A rank's Megatron parameter as its parts of the row's Hugging Face tensors."""
    if shard_dim(row, parallel.tp_size) is None:
        return join(row, gather_shards(row, shard, parallel), architecture)
    if row.layout is ParameterLayout.row:
        return [shard]
    if row.layout is ParameterLayout.gate_up:
        return list(shard.chunk(2))
    return split_qkv(shard, architecture)


def _part_shapes(
    row: ParameterRow, architecture: Architecture, tp_size: int
) -> list[tuple[int, ...]]:
    dim = shard_dim(row, tp_size)
    return [
        tuple(size // tp_size if axis == dim else size for axis, size in enumerate(shape))
        for shape in architecture.hf_shapes(row)
    ]


def _send(tensor: torch.Tensor, source: int, group: torch.distributed.ProcessGroup) -> None:
    """Broadcast a tensor in place from the group's ``source``-th rank to the others."""
    if group.size() > 1:
        torch.distributed.broadcast(tensor, group=group, group_src=source)
