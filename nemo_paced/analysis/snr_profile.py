"""SNR against pass rate as a whole: exponents, how far the kernel is off, what that guarantees.

Bins are independent samples: the variance of anything computed from all of them is the sum, over
bins, of the jackknife's variance when blocks of that bin alone are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from nemo_paced.analysis.snr import CONFIDENCE, BinEstimate, Estimate, jackknife_variance
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.theory import minimax_efficiency, optimal_weight

MIN_BINS = 4  # c, a' and b' take three
EXPONENT_BOUNDS = (-5.0, 10.0)
DRAWS = 4000  # of the noise, for its part in a maximum


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured bins, ascending.

    Attributes:
        pass_rate_J: mean pass rate of each bin's problems, in (0, 1).
        bins: the estimates, aligned.
    """

    pass_rate_J: np.ndarray
    bins: Sequence[BinEstimate]

    @property
    def snr_squared_J(self) -> np.ndarray:
        return np.array([b.snr_squared.value for b in self.bins])

    @property
    def error_J(self) -> np.ndarray:
        """Standard errors of ``snr_squared_J``."""
        return np.array([b.snr_squared.standard_error for b in self.bins])


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """value = c p^a (1-p)^b."""

    a: Estimate
    b: Estimate
    scale: float

    def at(self, pass_rate: np.ndarray) -> np.ndarray:
        return self.scale * pass_rate**self.a.value * (1 - pass_rate) ** self.b.value


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far w* = SNR^2 / (1 + SNR^2) is from the kernel, in nats, the scale being free.

    Attributes:
        delta: half the range of log(w* / kernel) over the bins as measured. Noise inflates it: it
            is half a maximum minus a minimum.
        corrected: ``delta`` less what noise adds by a parametric bootstrap; at least ``low``.
        low, high: of the true one with 95 % confidence, by intervals that hold for all bins at
            once (Bonferroni); ``high`` is infinite where a bin's SNR may be 0.
        noise: the ``delta`` that the same noise would show if the kernel were exact.
        bins: how many the point estimate is made of: those with SNR^2 above two standard errors.
    """

    delta: float
    corrected: float
    low: float
    high: float
    noise: float
    bins: int

    @property
    def efficiency(self) -> float:
        """sech^2 of the corrected delta."""
        return float(minimax_efficiency(self.corrected))

    @property
    def guaranteed_efficiency(self) -> float:
        """sech^2 of ``high``: at least so much of the best weights' descent, with 95 % confidence
        and for the pass rates that were measured."""
        return float(minimax_efficiency(self.high)) if np.isfinite(self.high) else 0.0


def fit_power_law(
    profile: Profile, figure: Callable[[BinEstimate], tuple[Estimate, np.ndarray]]
) -> PowerLaw | None:
    """c p^a (1-p)^b by least squares, each bin weighted with its inverse variance.

    On the figure's own scale and not on its logarithm: an unbiased estimate may be below 0.

    Args:
        figure: of a bin, with its values without each block.

    Returns:
        ``None`` with fewer than ``MIN_BINS`` bins, or where none of them is above 0.
    """
    measured = [figure(b) for b in profile.bins]
    value_J = np.array([estimate.value for estimate, _ in measured])
    error_J = np.array([estimate.standard_error for estimate, _ in measured])
    if len(value_J) < MIN_BINS or (value_J > 0).sum() < MIN_BINS - 1:
        return None
    fit = _PowerFit(profile.pass_rate_J, error_J)
    found = fit.solve(value_J, fit.start(value_J))
    variance = np.zeros(3)
    degrees = []
    for j, (bin_estimate, (_, without_B)) in enumerate(zip(profile.bins, measured, strict=True)):
        refits = [found]
        for value in without_B:
            moved = value_J.copy()
            moved[j] = value
            refits.append(fit.solve(moved, found))
        refit_E3, count_B = np.array(refits), bin_estimate.count_B
        variance += [jackknife_variance(refit_E3[:, k], count_B) for k in range(3)]
        degrees.append(len(count_B) - 1)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, min(degrees)))
    a, b = (
        Estimate(x, e, x - reach * e, x + reach * e)
        for x, e in zip(found[1:], np.sqrt(variance[1:]), strict=True)
    )
    return PowerLaw(a, b, float(np.exp(found[0])))


class _PowerFit:
    """Least squares in (log c, a, b)."""

    def __init__(self, pass_rate_J: np.ndarray, error_J: np.ndarray) -> None:
        ones = np.ones_like(pass_rate_J)
        self.terms_J3 = np.stack([ones, np.log(pass_rate_J), np.log1p(-pass_rate_J)], 1)
        self.error_J = error_J

    def start(self, value_J: np.ndarray) -> np.ndarray:
        """In logarithms, from the bins above 0."""
        there = value_J > 0
        weight = (value_J / self.error_J)[there]
        terms = self.terms_J3[there]
        found, *_ = np.linalg.lstsq(
            terms * weight[:, None], np.log(value_J[there]) * weight, rcond=None
        )
        found[1:] = np.clip(found[1:], *EXPONENT_BOUNDS)
        return found

    def solve(self, value_J: np.ndarray, start_3: np.ndarray) -> np.ndarray:
        low, high = EXPONENT_BOUNDS
        return optimize.least_squares(
            lambda x: (np.exp(self.terms_J3 @ x) - value_J) / self.error_J,
            np.clip(start_3, [-50, low + 1e-6, low + 1e-6], [50, high - 1e-6, high - 1e-6]),
            bounds=([-np.inf, low, low], [np.inf, high, high]),
        ).x


def deviation(profile: Profile, alpha: float, beta: float, *, seed: int = 0) -> Deviation | None:
    """The run's delta; ``None`` where fewer than two bins have a SNR^2 above two standard errors.

    Args:
        alpha, beta: of the kernel that is compared with, p^alpha (1-p)^beta.
        seed: of the bootstrap's draws.
    """
    log_kernel_J = np.log(beta_weight(profile.pass_rate_J, alpha, beta))
    snr_squared_J, error_J = profile.snr_squared_J, profile.error_J
    sure_J = snr_squared_J > 2 * error_J
    if sure_J.sum() < 2:
        return None
    log_ratio = np.log(optimal_weight(snr_squared_J[sure_J])) - log_kernel_J[sure_J]
    # d log w* / d SNR^2 = 1 / (SNR^2 (1 + SNR^2))
    log_error = error_J[sure_J] / (snr_squared_J[sure_J] * (1 + snr_squared_J[sure_J]))
    noise = np.random.default_rng(seed).standard_normal((DRAWS, len(log_ratio))) * log_error
    delta = float(np.ptp(log_ratio) / 2)
    inflated = float((np.ptp(log_ratio + noise, axis=1) / 2).mean())
    low, high = _bounds(profile, log_kernel_J)
    return Deviation(
        delta=delta,
        corrected=float(np.clip(2 * delta - inflated, low, high)),
        low=low,
        high=high,
        noise=float((np.ptp(noise, axis=1) / 2).mean()),
        bins=int(sure_J.sum()),
    )


def _bounds(profile: Profile, log_kernel_J: np.ndarray) -> tuple[float, float]:
    """Of delta: the least and the largest half range that the bins' simultaneous intervals hold."""
    tail = (1 - CONFIDENCE) / (2 * len(profile.bins))
    reach_J = np.array([stats.t.ppf(1 - tail, len(b.count_B) - 1) for b in profile.bins])
    reach_J = reach_J * profile.error_J
    low_J, high_J = (
        _log(optimal_weight(np.maximum(profile.snr_squared_J + sign * reach_J, 0.0))) - log_kernel_J
        for sign in (-1, 1)
    )
    return max(0.0, float(low_J.max() - high_J.min()) / 2), float(high_J.max() - low_J.min()) / 2


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(values)
