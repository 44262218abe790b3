"""Cutting Hugging Face tensors into a tensor-parallel rank's part, and putting parts together.

Both are pure functions on tensors, with a branch for each
:class:`~nemo_paced.hf.rows.ParameterLayout`. ``cut`` reads slices only (a safetensors slice works
as well as a tensor), so a rank never holds a whole matrix that it keeps a part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.rows import ParameterLayout, ParameterRow


def cut(
    row: ParameterRow,
    tensors: Sequence[Any],
    architecture: Architecture,
    *,
    rank: int,
    size: int,
    padded_vocab: int,
) -> torch.Tensor:
    """A tensor-parallel rank's part of a Megatron parameter.

    A weight comes out as [out/tp, in], one of ``Layout.row`` as [out, in/tp], a replicated one
    whole.

    Args:
        tensors: the row's Hugging Face tensors, or slices of them (``safe_open().get_slice``).
        rank, size: in the tensor-parallel group.
        padded_vocab: rows of the embedding over all ranks; rows beyond the model's are 0.
    """
    if row.layout is ParameterLayout.replicated:
        return tensors[0][:]
    if row.layout is ParameterLayout.row:
        width = architecture.hf_shapes(row)[0][1] // size
        return tensors[0][:, rank * width : (rank + 1) * width]
    if row.layout is ParameterLayout.vocabulary:
        return _cut_vocabulary(tensors[0], architecture.vocab_size, rank, padded_vocab // size)
    parts = [
        _rows(tensor, shape[0] // size, rank)
        for tensor, shape in zip(tensors, architecture.hf_shapes(row), strict=True)
    ]
    if row.layout is ParameterLayout.qkv:
        groups = architecture.num_kv_heads // size
        # [groups, heads of the group x head_dim, ...]: query heads, then key, then value
        return torch.cat([_grouped(part, groups) for part in parts], 1).flatten(0, 1)
    return torch.cat(parts)


def join(
    row: ParameterRow, shards: Sequence[torch.Tensor], architecture: Architecture
) -> list[torch.Tensor]:
    """The row's Hugging Face tensors from all tensor-parallel ranks' parts, in rank order."""
    if row.layout is ParameterLayout.replicated:
        return [shards[0]]
    if row.layout is ParameterLayout.row:
        return [torch.cat(list(shards), 1)]
    if row.layout is ParameterLayout.vocabulary:
        return [torch.cat(list(shards))[: architecture.vocab_size]]
    if row.layout is ParameterLayout.gate_up:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]
    return split_qkv(torch.cat(list(shards)), architecture)


def split_qkv(fused: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    """Query, key and value of a fused parameter, or of one rank's part of it.

    A weight [(q + 2 k)/tp, h] gives [q/tp, h], [k/tp, h] and [k/tp, h]; a bias likewise, without h.
    """
    per_group = architecture.num_heads // architecture.num_kv_heads + 2
    groups = fused.shape[0] // (per_group * architecture.head_dim)
    sizes = [(per_group - 2) * architecture.head_dim, architecture.head_dim, architecture.head_dim]
    return [part.flatten(0, 1) for part in _grouped(fused, groups).split(sizes, 1)]


def _rows(tensor: Any, count: int, rank: int) -> torch.Tensor:
    return tensor[rank * count : (rank + 1) * count]


def _grouped(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _cut_vocabulary(tensor: Any, vocab_size: int, rank: int, rows: int) -> torch.Tensor:
    begin, end = rank * rows, min((rank + 1) * rows, vocab_size)
    part = tensor[begin:end] if end > begin else tensor[:0]
    missing = rows - part.shape[0]
    if missing:
        part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
    return part
