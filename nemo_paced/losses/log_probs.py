"""Log-probabilities of given tokens, when the vocabulary axis is split over ranks."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.vocab_parallel import LOG_ZERO, all_gather, row_blocks


@torch.no_grad()
def target_log_probs(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, valid: int, tp_group: ProcessGroup | None
) -> torch.Tensor:
    """Log-probability of each target token at temperature 1: float32 [N], nats; no gradient.

    One all-gather of three numbers a token.

    Args:
        logits_NV: [N, v/tp], any float dtype.
        targets_N: int64, ids in the whole vocabulary.
        valid: columns of this rank that belong to the true vocabulary.
    """
    stats_3N = logits_NV.new_zeros((3, logits_NV.shape[0]), dtype=torch.float32)
    stats_3N[0], stats_3N[2] = LOG_ZERO, LOG_ZERO
    if valid:
        first = 0 if tp_group is None else tp_group.rank() * logits_NV.shape[1]
        local_N = targets_N - first
        mine_N = (local_N >= 0) & (local_N < valid)
        index_N1 = torch.where(mine_N, local_N, 0)[:, None]
        for rows in row_blocks(logits_NV, None):
            z_NV = logits_NV[rows, :valid].float()
            max_N1 = z_NV.amax(1, keepdim=True).clamp_min_(LOG_ZERO)
            at_target_N = (z_NV.gather(1, index_N1[rows]) - max_N1)[:, 0]
            stats_3N[2, rows] = torch.where(mine_N[rows], at_target_N, LOG_ZERO)
            stats_3N[0, rows] = max_N1[:, 0]
            stats_3N[1, rows] = (z_NV - max_N1).exp_().sum(1)
    max_RN, sum_RN, target_RN = all_gather(stats_3N, tp_group).unbind(1)
    moved_RN = max_RN - max_RN.amax(0)
    log_sum_N = (moved_RN.exp() * sum_RN).sum(0).log()
    # only the owner's entry is above LOG_ZERO
    return (target_RN + moved_RN.clamp_min(LOG_ZERO)).amax(0) - log_sum_N
