"""Softmax algebra on logits whose vocabulary axis is split over tensor-parallel ranks.

Every sum over the vocabulary is taken on logits shifted by their maximum, each rank by its own; the
ranks' partial results then travel in one all-gather and are merged locally (a maximum and sums
cannot share an all-reduce). Unshifted, a KL of 5e-5 comes out 1e-3 wrong at a logit offset of 1e4
in float32; shifted, 6e-7.

Axes: N tokens, V this rank's columns that belong to the true vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

# torch 2.13 renamed it and warns at the old name; containers still carry older builds
_all_gather_single = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)

# Stands for log 0: finite, so that 0 x log 0 is 0 and never NaN.
LOG_ZERO = -1e30
# float32 elements of a row block that, with a few temporaries, stay in a core's cache
CACHE_ELEMENTS = 2**19
GPU_ELEMENTS = 2**26


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
        budget = GPU_ELEMENTS if logits_NV.device.type == "cuda" else CACHE_ELEMENTS
        rows = max(1, budget // max(width, 1))
    for begin in range(0, num_rows, rows):
        yield slice(begin, min(begin + rows, num_rows))


def shifted(logits_NV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits - row maximum) / temperature in float32 with -inf made finite, and the maximum [N].

    The maximum is subtracted first: dividing logits near 1e4 would round their differences. It is
    that of the logits, not divided. A rank with no valid column has maximum ``LOG_ZERO``.
    """
    z_NV = logits_NV.float()
    if z_NV.shape[1] == 0:
        return z_NV, z_NV.new_full((z_NV.shape[0],), LOG_ZERO)
    max_N = z_NV.amax(1).clamp_min(LOG_ZERO)
    z_NV = z_NV - max_N[:, None]
    if temperature != 1.0:
        z_NV.div_(temperature)
    return z_NV.clamp_min_(LOG_ZERO), max_N


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Row maximum and log of the sum of shifted exponentials over the whole vocabulary, [N] each.

    Kept apart: their sum would round the small part away at large logits.
    """

    max_N: torch.Tensor
    log_sum_N: torch.Tensor

    def log_probs(
        self, logits_NV: torch.Tensor, rows: slice, *, valid: int, temperature: float
    ) -> torch.Tensor:
        """Log-probabilities of a row block over this rank's valid columns: float32."""
        z, local_max = shifted(logits_NV[rows, :valid], temperature)
        moved = (self.max_N[rows] - local_max) / temperature
        return z.sub_((moved + self.log_sum_N[rows])[:, None]).clamp_min_(LOG_ZERO)


def all_gather(packed: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    """[...] on every rank -> [ranks, ...]."""
    if tp_group is None or tp_group.size() == 1:
        return packed[None]
    packed = packed.contiguous()
    gathered = packed.new_empty((tp_group.size() * packed.shape[0], *packed.shape[1:]))
    _all_gather_single(gathered, packed, group=tp_group)
    return gathered.view(tp_group.size(), *packed.shape)


def all_reduce(values: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    """Sum over the group, in place."""
    if group_size(tp_group) > 1:
        torch.distributed.all_reduce(values, group=tp_group)
    return values


@torch.no_grad()
def target_log_probs(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Log-probability of each target token at temperature 1: float32 [N], nats; no gradient.

    Args:
        logits_NV: [N, v/tp], any float dtype.
        targets_N: int64, ids in the whole vocabulary.
    """
    width = logits_NV.shape[1]
    first = 0 if tp_group is None else tp_group.rank() * width
    valid = valid_columns(width, vocab_size, tp_group)
    stats_3N = logits_NV.new_empty((3, logits_NV.shape[0]), dtype=torch.float32)
    local_N = targets_N - first
    mine_N = (local_N >= 0) & (local_N < valid)
    for rows in row_blocks(logits_NV, None):
        z_NV, stats_3N[0, rows] = shifted(logits_NV[rows, :valid], 1.0)
        stats_3N[1, rows] = z_NV.exp().sum(1)
        index = torch.where(mine_N[rows], local_N[rows], 0)[:, None]
        at_target = z_NV.gather(1, index)[:, 0] if valid else torch.zeros_like(stats_3N[0, rows])
        stats_3N[2, rows] = torch.where(mine_N[rows], at_target, LOG_ZERO)
    gathered_R3N = all_gather(stats_3N, tp_group)
    max_RN, sum_RN, target_RN = gathered_R3N.unbind(1)
    max_N = max_RN.amax(0)
    log_sum_N = ((max_RN - max_N).exp() * sum_RN).sum(0).log()
    # only the owner's entry is above LOG_ZERO
    return (target_RN + (max_RN - max_N).clamp_min(LOG_ZERO)).amax(0) - log_sum_N
