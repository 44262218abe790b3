"""Softmax algebra on logits whose vocabulary axis is split over tensor-parallel ranks.

Every sum over the vocabulary is taken on logits shifted by their maximum, each rank by its own; the
ranks' partial results then travel in one all-gather and are merged locally (a maximum and sums
cannot share an all-reduce). Unshifted, a KL of 5e-5 comes out 1e-3 wrong at a logit offset of 1e4
in float32; shifted, 6e-7.

Axes: N tokens, V this rank's columns that belong to the true vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup

# torch 2.13 renamed all_gather_into_tensor and warns at that name; containers carry older builds
_all_gather_single = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)

# Stands for log 0: finite, so that 0 x log 0 is 0 and never NaN.
LOG_ZERO = -1e30
# float32 elements of a row block, for each thread, that with a few temporaries stay in cache
CACHE_ELEMENTS = 2**18
# float32 elements of a row block on a GPU, where top-k and target log-probabilities alone go over
# row blocks
GPU_ELEMENTS = 2**24


def group_size(tp_group: ProcessGroup | None) -> int:
    return 1 if tp_group is None else tp_group.size()


def valid_columns(local_width: int, vocab_size: int | None, tp_group: ProcessGroup | None) -> int:
    """How many of this rank's columns belong to the true vocabulary (the rest is padding)."""
    if vocab_size is None:
        return local_width
    rank = 0 if tp_group is None else tp_group.rank()
    return min(max(vocab_size - rank * local_width, 0), local_width)


def row_blocks(logits_NV: torch.Tensor, rows: int | None) -> Iterator[slice]:
    """Slices of rows small enough that a block of float32 logits stays in cache."""
    num_rows, width = logits_NV.shape
    if rows is None:
        if logits_NV.device.type == "cuda":
            rows = max(1, GPU_ELEMENTS // max(width, 1))
        else:  # each thread takes whole rows, and has a cache of its own
            rows = torch.get_num_threads() * -(-CACHE_ELEMENTS // max(width, 1))
    for begin in range(0, num_rows, rows):
        yield slice(begin, min(begin + rows, num_rows))


class Begun:
    """A collective under way; :meth:`wait` gives its result."""

    def __init__(self, result: torch.Tensor, work: torch.distributed.Work | None) -> None:
        self.result = result
        self.work = work

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


def begin_all_gather(packed: torch.Tensor, tp_group: ProcessGroup | None) -> Begun:
    """Start to gather a tensor [...] of every rank into [ranks, ...]."""
    if tp_group is None or tp_group.size() == 1:
        return Begun(packed[None], None)
    packed = packed.contiguous()
    gathered = packed.new_empty((tp_group.size() * packed.shape[0], *packed.shape[1:]))
    work = _all_gather_single(gathered, packed, group=tp_group, async_op=True)
    return Begun(gathered.view(tp_group.size(), *packed.shape), work)


def begin_all_reduce(values: torch.Tensor, tp_group: ProcessGroup | None) -> Begun:
    """Start to sum ``values`` over the group, in place."""
    if group_size(tp_group) == 1:
        return Begun(values, None)
    work = torch.distributed.all_reduce(values, group=tp_group, async_op=True)
    return Begun(values, work)


def all_gather(packed: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    """A tensor [...] of every rank, gathered into [ranks, ...]."""
    return begin_all_gather(packed, tp_group).wait()


def all_reduce(values: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    """``values`` summed over the group, in place."""
    return begin_all_reduce(values, tp_group).wait()


def sum_gradient(hidden: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    """``hidden`` as it is; its gradient is summed over the group (one all-reduce)."""
    if group_size(tp_group) == 1:
        return hidden
    return _SumGradient.apply(hidden, tp_group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, tp_group: ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.tp_group = tp_group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return all_reduce(grad.contiguous(), ctx.tp_group), None


def own_logits(
    logits_NV: torch.Tensor, ids_N: torch.Tensor, valid: int, tp_group: ProcessGroup | None
) -> torch.Tensor:
    """Logit of one token of each row, float32 [N]; ``LOG_ZERO`` where another rank holds it.

    Args:
        logits_NV: [N, v/tp], any float dtype.
        ids_N: int64, ids in the whole vocabulary.
        valid: columns of this rank that belong to the true vocabulary.
    """
    first = 0 if tp_group is None else tp_group.rank() * logits_NV.shape[1]
    local_N = ids_N - first
    mine_N = (local_N >= 0) & (local_N < valid)
    own_N = logits_NV.gather(1, torch.where(mine_N, local_N, 0)[:, None])[:, 0]
    return torch.where(mine_N, own_N.float().clamp_min(LOG_ZERO), LOG_ZERO)


@torch.no_grad()
def target_log_probs(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, valid: int, tp_group: ProcessGroup | None
) -> torch.Tensor:
    """Log-probability of each target token at temperature 1: float32 [N], nats; no gradient.

    One all-gather of three numbers a token. Arguments as for :func:`own_logits`.
    """
    stats_3N = logits_NV.new_zeros((3, logits_NV.shape[0]), dtype=torch.float32)
    stats_3N[0], stats_3N[2] = LOG_ZERO, own_logits(logits_NV, targets_N, valid, tp_group)
    if valid:
        for rows in row_blocks(logits_NV, None):
            z_NV = logits_NV[rows, :valid].float()
            max_N1 = z_NV.amax(1, keepdim=True).clamp_min_(LOG_ZERO)
            stats_3N[0, rows] = max_N1[:, 0]
            stats_3N[1, rows] = (z_NV - max_N1).exp_().sum(1)
    max_RN, sum_RN, target_RN = all_gather(stats_3N, tp_group).unbind(1)
    max_N = max_RN.amax(0)
    log_sum_N = ((max_RN - max_N).exp() * sum_RN).sum(0).log()
    # only the owner's entry is above LOG_ZERO
    return (target_RN.amax(0) - max_N) - log_sum_N
