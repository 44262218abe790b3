"""The paper's theory of the Beta kernel (arXiv 2603.11178): exponents, efficiency, variance.

Where a value is named :data:`Values` it is a float or a float64 array, elementwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import betaln

from nemo_paced.errors import ConfigError
from nemo_paced.weights.beta_kernel import beta_weight

Values = TypeVar("Values", float, np.ndarray)


@dataclass(frozen=True, slots=True)
class Exponents:
    """Exponents of the Beta kernel, matched to the moments of pass rates.

    Attributes:
        alpha, beta: at least 0.
        mean, variance: of the pass rates they come from.
        num_problems: how many pass rates lay in [1/K, 1-1/K].
        clipped: a formula gave less than 0, which is no weight to train with (infinite at an end).
    """

    alpha: float
    beta: float
    mean: float
    variance: float
    num_problems: int
    clipped: bool


def moment_matched_exponents(
    pass_rates: Sequence[float], num_rollouts: float | Sequence[float]
) -> Exponents:
    """Exponents under which p^alpha (1-p)^beta, as a density, has the moments of the data.

    Of the pass rates in Z = [1/K, 1-1/K] with mean m and variance v: s = m(1-m)/v - 1,
    alpha = m s - 1, beta = (1-m) s - 1. The paper defines them where v < m(1-m)/3
    (alpha + beta > 0); both are at least 0 only where v <= m(1-m) r/(1+r), r = min(m, 1-m), and
    beyond that what is below 0 is set to 0.

    Args:
        pass_rates: one a problem.
        num_rollouts: K; one a problem where it differs (Z is then where some were right and some
            were wrong, as it is with one K).

    Raises:
        ConfigError: fewer than two different pass rates in Z.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    end = 1 / np.asarray(num_rollouts, dtype=np.float64)
    inside = rates[(rates >= end - 1e-9) & (rates <= 1 - end + 1e-9)]
    mean, variance = (float(inside.mean()), float(inside.var())) if len(inside) else (0.0, 0.0)
    if variance < 1e-12:  # equal pass rates leave no more than rounding
        raise ConfigError(
            f"{len(inside)} of {len(rates)} pass rates lie in [1/K, 1-1/K] and no "
            "two of them differ: there is no spread to match; estimate "
            "pass rates with more rollouts, or of more problems"
        )
    total = mean * (1 - mean) / variance - 1
    alpha, beta = mean * total - 1, (1 - mean) * total - 1
    return Exponents(
        alpha=max(alpha, 0.0),
        beta=max(beta, 0.0),
        mean=mean,
        variance=variance,
        num_problems=len(inside),
        clipped=min(alpha, beta) < 0,
    )


def optimal_weight(snr_squared: Values) -> Values:
    """Optimal weight w* of a problem, up to the learning rate's scale: SNR^2 / (1 + SNR^2).

    It maximises the bound on a step's descent, Delta(w) = eta w ||E g||^2 - (eta^2 / 2) w^2
    E||g||^2 lambda_max, with E||g||^2 = ||E g||^2 + tr Cov g. Where SNR is low it is SNR^2.

    Args:
        snr_squared: ||E g||^2 / tr Cov g over problems of one pass rate; above -1 (unbiased
            estimates may lie below 0).
    """
    return snr_squared / (1 + snr_squared)


def efficiency(rho: Values) -> Values:
    """Share of the optimal weight's descent that a weight w makes: 2 rho - rho^2.

    Args:
        rho: w / w*; from 2 on the step goes up instead of down.
    """
    return 2 * rho - rho**2


def minimax_efficiency(delta: Values) -> Values:
    """Worst-case efficiency of :func:`minimax_weight`: sech^2(delta) >= 1 - delta^2.

    Args:
        delta: nats; w* is p^a'(1-p)^b' phi with |log phi| <= delta.
    """
    return 1 / np.cosh(delta) ** 2


def minimax_weight(
    pass_rate: Values, delta: float, alpha: float = 1.0, beta: float = 1.0
) -> Values:
    """Minimax weight sech(delta) p^alpha (1-p)^beta: the best one against the worst phi.

    phi and delta are those of :func:`minimax_efficiency`. Of the kernel times c the worst
    efficiencies are those at the ends of the range of phi, efficiency(c e^delta) and
    efficiency(c e^-delta); they meet at c = 1 / cosh(delta), where both are sech^2(delta).
    """
    return beta_weight(pass_rate, alpha, beta) / np.cosh(delta)  # type: ignore[operator, no-any-return]


def variance_ratio(
    alpha: float, beta: float, a_s: float, b_s: float, a_prime: float, b_prime: float
) -> float:
    """R = E[w^2 V] / (E[w]^2 E[V]) over uniform pass rates: weighted over unweighted variance.

    The kernel p^alpha (1-p)^beta with its mean made 1, and noise V = ||E g||^2 / SNR^2 proportional
    to p^g1 (1-p)^g2, g1 = 2 a_s - a', g2 = 2 b_s - b':

        R = B(2 alpha + g1 + 1, 2 beta + g2 + 1) / (B(alpha + 1, beta + 1)^2 B(g1 + 1, g2 + 1))

    Args:
        a_s, b_s: exponents of the signal, ||E g|| proportional to p^a_s (1-p)^b_s.
        a_prime, b_prime: exponents of SNR^2, proportional to p^a' (1-p)^b'.

    Raises:
        ConfigError: the noise has no mean, since it grows too fast towards an end.
    """
    g1, g2 = 2 * a_s - a_prime, 2 * b_s - b_prime
    for name, value in (("2 a_s - a'", g1), ("2 b_s - b'", g2)):
        if value <= -1:
            raise ConfigError(
                f"variance ratio: {name} is {value:g}: unweighted, the gradient would have "
                "infinite variance; it must be above -1"
            )
    weighted, mean, unweighted = betaln(
        np.array([2 * alpha + g1 + 1, alpha + 1, g1 + 1]),
        np.array([2 * beta + g2 + 1, beta + 1, g2 + 1]),
    )
    return float(np.exp(weighted - 2 * mean - unweighted))
