"""The Beta kernel averaged over what is known of a pass rate, instead of taken at its estimate.

With K = 8 a problem of true pass rate 0.05 is drawn as exactly 0 or 1 with probability 0.66, and
the kernel at the estimate then drops it for good. Its posterior mean has no hard zeros.
"""

from __future__ import annotations

from math import exp

import numpy as np
from scipy.special import betaln


def posterior_weight(
    num_correct: float,
    num_rollouts: float,
    alpha: float = 1.0,
    beta: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> float:
    """E[p^alpha (1-p)^beta | c of K correct] under a Beta(a0, b0) prior.

    = B(c + a0 + alpha, K - c + b0 + beta) / B(c + a0, K - c + b0), not normalised over problems.

    Args:
        num_correct: c, in [0, num_rollouts]; may be a discounted (fractional) count.
        prior: a0, b0, both above 0.
    """
    a, b = num_correct + prior[0], num_rollouts - num_correct + prior[1]
    return float(exp(betaln(a + alpha, b + beta) - betaln(a, b)))


def posterior_weights(
    num_correct: np.ndarray,
    num_rollouts: np.ndarray,
    alpha: float = 1.0,
    beta: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """:func:`posterior_weight` of many problems at once: float64 arrays of one shape."""
    a, b = num_correct + prior[0], num_rollouts - num_correct + prior[1]
    return np.exp(betaln(a + alpha, b + beta) - betaln(a, b))


def posterior_variance(
    num_correct: np.ndarray,
    num_rollouts: np.ndarray,
    alpha: float = 1.0,
    beta: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Var[p^alpha (1-p)^beta | c of K correct]: the square of a weight has twice the exponents."""
    second = posterior_weights(num_correct, num_rollouts, 2 * alpha, 2 * beta, prior)
    return second - posterior_weights(num_correct, num_rollouts, alpha, beta, prior) ** 2
