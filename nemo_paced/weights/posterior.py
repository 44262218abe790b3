"""The Beta kernel averaged over the posterior of a pass rate, instead of taken at its estimate.

With K = 8 rollouts a problem of true pass rate 0.05 is estimated as exactly 0 or 1 with probability
0.66, and the kernel at the estimate then drops it for good. Its posterior mean has no hard zeros.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from scipy.special import betaln

Counts = TypeVar("Counts", float, np.ndarray)


def posterior_weight(
    num_correct: Counts,
    num_rollouts: Counts,
    alpha: float = 1.0,
    beta: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> Counts:
    """E[p^alpha (1-p)^beta | c of K correct] under a Beta(a0, b0) prior.

    = B(c + a0 + alpha, K - c + b0 + beta) / B(c + a0, K - c + b0), not normalised over problems.

    Args:
        num_correct: c, in [0, num_rollouts]; may be a discounted (fractional) count. A number or a
            float64 array of problems.
        num_rollouts: K, of the same shape.
        prior: a0, b0, both above 0.
    """
    a, b = num_correct + prior[0], num_rollouts - num_correct + prior[1]
    return np.exp(betaln(a + alpha, b + beta) - betaln(a, b))


def posterior_variance(
    num_correct: Counts,
    num_rollouts: Counts,
    alpha: float = 1.0,
    beta: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> Counts:
    """Var[p^alpha (1-p)^beta | c of K correct]; arguments as for :func:`posterior_weight`.

    The square of a weight has twice the exponents.
    """
    second = posterior_weight(num_correct, num_rollouts, 2 * alpha, 2 * beta, prior)
    return second - posterior_weight(num_correct, num_rollouts, alpha, beta, prior) ** 2
