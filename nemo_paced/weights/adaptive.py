"""Adaptive allocation of rollouts: the next one goes where it makes the weights right soonest.

A rollout is worth the variance of a problem's posterior weight that it takes away. p(1-p) is flat
at 0.5, where a pass rate may be quite wrong without the weight being so; the error of a weight is
largest near 0.15 and 0.85. This module only decides; it samples nothing.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betaln, gammaln

from nemo_paced.config import WeightsConfig
from nemo_paced.weights.posterior import posterior_variance, posterior_weight
from nemo_paced.weights.prior import fit_prior

# A single rollout at c = 1 of 2 is worth nothing by itself (right or wrong, the weight is the same)
# though several are worth something: blocks of up to this many are looked at.
LOOK_AHEAD = 8


def prior_of(
    config: WeightsConfig, num_correct: np.ndarray, num_rollouts: np.ndarray
) -> tuple[float, float]:
    """Beta prior (a0, b0): ``weights.prior``, or by ``weights.fit_prior`` fitted to the counts."""
    if config.fit_prior:
        return fit_prior(num_correct, num_rollouts)
    a0, b0 = config.prior
    return a0, b0


def expected_error(
    config: WeightsConfig, num_correct: np.ndarray, num_rollouts: np.ndarray
) -> float:
    """Expected RMS error of weights of mean 1, their normaliser taken as known.

    Args:
        num_correct, num_rollouts: float64 arrays ``[problems]``.
    """
    state = (num_correct, num_rollouts, config.alpha, config.beta)
    prior = prior_of(config, num_correct, num_rollouts)
    mean = posterior_weight(*state, prior).mean()
    return float(np.sqrt(posterior_variance(*state, prior).mean()) / mean)


def variance_reduction(
    num_correct: np.ndarray,
    num_rollouts: np.ndarray,
    num_more: int,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Expected fall of Var[weight | data] after ``num_more`` rollouts of a problem, ``[problems]``.

    Of n more, j are right with the Beta-binomial probability C(n,j) B(a+j, b+n-j) / B(a, b); by the
    law of total variance the fall is sum_j P(j) m(a+j, b+n-j)^2 - m(a, b)^2, with m the posterior
    weight.
    """
    more = np.arange(num_more + 1.0)
    right = num_correct[:, None] + more
    total = np.broadcast_to(num_rollouts[:, None] + num_more, right.shape)
    a, b = num_correct[:, None] + prior[0], (num_rollouts - num_correct)[:, None] + prior[1]
    choose = gammaln(num_more + 1) - gammaln(more + 1) - gammaln(num_more - more + 1)
    probability = np.exp(choose + betaln(a + more, b + num_more - more) - betaln(a, b))
    after = posterior_weight(right, total, alpha, beta, prior)
    now = posterior_weight(num_correct, num_rollouts, alpha, beta, prior)
    return (probability * after**2).sum(1) - now**2


def allocate(
    config: WeightsConfig,
    num_correct: np.ndarray,
    num_rollouts: np.ndarray,
    budget: int,
    *,
    num_asked: np.ndarray | None = None,
) -> np.ndarray:
    """Number of the next ``budget`` rollouts that each problem gets, integers ``[problems]``.

    The choice is greedy on the worth of a rollout, which is that of the block of up to
    ``LOOK_AHEAD`` it is best asked in (the slopes of the upper concave envelope). Ties go to the
    earlier problem. The sum is below ``budget`` where ``weights.adaptive.max_rollouts`` leaves no
    room.

    Args:
        num_correct, num_rollouts: float64 arrays ``[problems]``.
        num_asked: integers ``[problems]``, rollouts that were sampled, those without a verdict
            included; ``None``: as many as ``num_rollouts``.
    """
    states, of = np.unique(np.stack([num_correct, num_rollouts], 1), axis=0, return_inverse=True)
    prior = prior_of(config, num_correct, num_rollouts)
    falls = [np.zeros(len(states))]
    falls += [
        variance_reduction(
            states[:, 0], states[:, 1], n, alpha=config.alpha, beta=config.beta, prior=prior
        )
        for n in range(1, LOOK_AHEAD + 1)
    ]
    worth = _envelope_slopes(np.stack(falls, 1))[of.reshape(-1)]
    asked = num_rollouts if num_asked is None else num_asked
    worth *= ((num_rollouts + 1) / (asked + 1))[:, None]  # a verdict is not certain to come
    room = config.adaptive.max_rollouts - asked
    worth[np.arange(LOOK_AHEAD) >= room[:, None]] = -np.inf
    best = np.argsort(-worth, axis=None, kind="stable")[:budget]
    best = best[worth.reshape(-1)[best] > -np.inf]
    return np.bincount(best // LOOK_AHEAD, minlength=len(num_correct))


def _envelope_slopes(falls: np.ndarray) -> np.ndarray:
    """Slopes of the upper concave envelope of each row: ``[states, n+1] -> [states, n]``."""
    slopes = np.empty((falls.shape[0], falls.shape[1] - 1))
    for row, values in enumerate(falls):
        begin = 0
        while begin < slopes.shape[1]:
            each = (values[begin + 1 :] - values[begin]) / np.arange(1, len(values) - begin)
            steepest = int(np.argmax(each))
            slopes[row, begin : begin + steepest + 1] = each[steepest]
            begin += steepest + 1
    return slopes
