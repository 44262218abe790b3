"""Token weights from problem weights: a loss is a sum, divided once by one global number.

    token_sum      (1/N) sum_i w_i sum_t D_it                      the paper's
    sequence_mean  (1/N) sum_i w_i (1/len_i) sum_t D_it
    token_mean     (1/n) sum_i w_i sum_t D_it,  n = response tokens of the global batch

N is the number of problems in the global batch, those of weight 0 included. Nothing is ever divided
by the sum of the weights: they have mean 1 over the training set, and a batch of hard problems is
meant to count less. As the divisor is known before the batch is cut, the loss is the same for every
cut into micro-batches and data-parallel ranks.

Megatron, for its part, divides all gradients by the number of tokens that the loss functions
report, summed over the global batch. It is told the tokens that went through the model: with that
divisor its auxiliary losses (MoE load balancing) come out as means over micro-batches, as in
pre-training. The loss here is multiplied by the same number first (:func:`for_megatron`).
"""

from __future__ import annotations

import torch


def token_weight(
    reduction: str,
    *,
    weight: float,
    response_length: int,
    num_problems: int,
    total_tokens: int,
) -> float:
    """Factor of every token's divergence in one response.

    Args:
        reduction: ``token_sum``, ``sequence_mean`` or ``token_mean``.
        weight: the problem's, of mean 1 over the training set.
        response_length: tokens of this response.
        num_problems: N of the global batch.
        total_tokens: n, response tokens of the global batch.

    Raises:
        ValueError: another reduction.
    """
    if reduction == "token_sum":
        return weight / num_problems
    if reduction == "sequence_mean":
        return weight / (num_problems * response_length)
    if reduction == "token_mean":
        return weight / total_tokens
    raise ValueError(f"reduction is {reduction!r}: choose token_sum, sequence_mean or token_mean")


def for_megatron(
    loss: torch.Tensor, *, num_tokens: int, total_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First two return values of Megatron's ``loss_func`` under ``calculate_per_token_loss``.

    Args:
        loss: scalar, the sum to minimise: this micro-batch's part of it.
        num_tokens: sequence positions of this micro-batch that this rank ran (of a sequence cut by
            context parallelism: its own slice, so that the sum over ranks counts each once).
        total_tokens: sum of ``num_tokens`` over micro-batches, data- and context-parallel ranks.

    Returns:
        (loss to differentiate, int32 token count).
    """
    # filled there: a copy from the host would wait for the GPU
    count = torch.full((), num_tokens, dtype=torch.int32, device=loss.device)
    return loss * total_tokens, count
