"""Exponents of the Beta kernel from data (arXiv 2603.11178)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_paced.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Exponents:
    """Attributes:
    alpha, beta: at least 0.
    mean, variance: of the pass rates they come from.
    num_problems: so many pass rates lay in [1/K, 1-1/K].
    clipped: a formula gave less than 0, which is no weight to train with (infinite at an end).
    """

    alpha: float
    beta: float
    mean: float
    variance: float
    num_problems: int
    clipped: bool


def moment_matched_exponents(pass_rates: Sequence[float], num_rollouts: float) -> Exponents:
    """Exponents under which p^alpha (1-p)^beta, as a density, has the moments of the data.

    Of the pass rates in Z = [1/K, 1-1/K] with mean m and variance v: s = m(1-m)/v - 1,
    alpha = m s - 1, beta = (1-m) s - 1. The paper defines them where v < m(1-m)/3
    (alpha + beta > 0); both are at least 0 only where v <= m(1-m) r/(1+r), r = min(m, 1-m), and
    beyond that what is below 0 is set to 0.

    Args:
        num_rollouts: K behind each pass rate; the mean where it differs.

    Raises:
        ConfigError: fewer than two different pass rates in Z.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    end = 1 / num_rollouts
    inside = rates[(rates >= end - 1e-9) & (rates <= 1 - end + 1e-9)]
    mean, variance = (float(inside.mean()), float(inside.var())) if len(inside) else (0.0, 0.0)
    if variance == 0:
        raise ConfigError(
            f"{len(inside)} of {len(rates)} pass rates lie in [1/K, 1-1/K] with K = "
            f"{num_rollouts:g} and no two of them differ: there is no spread to match; estimate "
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
