"""From problem weights to token weights: a loss is a sum, divided once by one global number.

    token_sum      (1/N) sum_i w_i sum_t D_it                      the paper's
    sequence_mean  (1/N) sum_i w_i (1/len_i) sum_t D_it
    token_mean     (1/n) sum_i w_i sum_t D_it,  n = response tokens of the global batch

N is the number of problems in the global batch, those of weight 0 included. Nothing is ever divided
by the sum of the weights: they have mean 1 over the training set, and a batch of hard problems is
meant to count less. As the divisor is known before the batch is cut, the loss is the same for every
cut into micro-batches and data-parallel ranks.
"""

from __future__ import annotations


def token_weight(
    reduction: str,
    *,
    weight: float,
    response_length: int,
    num_problems: int,
    total_tokens: int,
) -> float:
    """What each token's divergence of one response is multiplied by.

    Args:
        reduction: ``token_sum``, ``sequence_mean`` or ``token_mean``.
        weight: of the problem, unit mean over the training set.
        response_length: tokens of this response.
        num_problems: N of the global batch.
        total_tokens: n, response tokens of the global batch.
    """
    if reduction == "token_sum":
        return weight / num_problems
    if reduction == "sequence_mean":
        return weight / (num_problems * response_length)
    if reduction == "token_mean":
        return weight / total_tokens
    raise ValueError(f"reduction is {reduction!r}: choose token_sum, sequence_mean or token_mean")
