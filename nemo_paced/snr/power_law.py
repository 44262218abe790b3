"""Power laws c p^a (1-p)^b fitted to figures over pass rates p, and the variance ratio of two.

Bins are independent samples: the variance of anything computed from all of them is the sum, over
bins, of the jackknife's variance when blocks of that bin alone are left out.

Axes: J bins; E the estimate from all blocks followed by those without each one of a bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from nemo_paced.errors import ConfigError
from nemo_paced.snr.estimates import CONFIDENCE, BinEstimate, SnrEstimate, jackknife_variance
from nemo_paced.snr.profile import Profile
from nemo_paced.weights.theory import variance_ratio

MIN_BINS = 4  # through three bins some law goes exactly: it has three parameters
EXPONENT_BOUNDS = (-5.0, 10.0)
AT_BOUND = 0.01  # distance from a bound at which a fit has ended there; the solver stays inside


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Fitted law: value = c p^a (1-p)^b.

    Attributes:
        a, b: the exponents, with infinite intervals where the fit ends at ``EXPONENT_BOUNDS``.
        scale: c.
        refits_JE2: for each bin, a and b of a fit to all blocks, then without each of its blocks.
        counts_JB: problems of each bin's blocks.
    """

    a: SnrEstimate
    b: SnrEstimate
    scale: float
    refits_JE2: Sequence[np.ndarray]
    counts_JB: Sequence[np.ndarray]

    @property
    def is_bounded(self) -> bool:
        """Whether both exponents have finite intervals."""
        return bool(np.isfinite([self.a.standard_error, self.b.standard_error]).all())

    def at(self, pass_rate: np.ndarray) -> np.ndarray:
        """The law's values at these pass rates, elementwise."""
        return self.scale * pass_rate**self.a.value * (1 - pass_rate) ** self.b.value


def fit_power_law(
    profile: Profile, figure: Callable[[BinEstimate], tuple[SnrEstimate, np.ndarray]]
) -> PowerLaw | None:
    """Fit c p^a (1-p)^b by least squares, each bin weighted with its inverse variance.

    The fit is on the figure's own scale and not on its logarithm, as an unbiased estimate may be
    below 0.

    Args:
        figure: picks a bin's figure and its values [B] without each block.

    Returns:
        ``None`` with fewer than ``MIN_BINS`` bins, or where fewer than three of them are above two
        standard errors: a curve through noise has exponents too.
    """
    measured = [figure(b) for b in profile.bins]
    value_J = np.array([estimate.value for estimate, _ in measured])
    error_J = np.array([estimate.standard_error for estimate, _ in measured])
    if len(value_J) < MIN_BINS or (value_J > 2 * error_J).sum() < MIN_BINS - 1:
        return None
    fit = _PowerFit(profile.pass_rate_J, error_J)
    found = fit.solve(value_J, fit.start(value_J))
    refits_JE2 = []
    for j, (_, without_B) in enumerate(measured):
        refits = [found]
        for value in without_B:
            moved = value_J.copy()
            moved[j] = value
            refits.append(fit.solve(moved, found))
        refits_JE2.append(np.array(refits)[:, 1:])
    counts_JB = [b.count_B for b in profile.bins]
    a, b = (_exponent([refit[:, k] for refit in refits_JE2], counts_JB) for k in range(2))
    return PowerLaw(a, b, float(np.exp(found[0])), refits_JE2, counts_JB)


def measured_ratio(
    alpha: float, beta: float, snr_law: PowerLaw, signal_law: PowerLaw
) -> SnrEstimate | None:
    """The variance ratio R of a kernel under fitted exponents (``theory.variance_ratio``).

    Its interval is that of log R, transformed.

    Args:
        alpha, beta: of the kernel p^alpha (1-p)^beta.
        snr_law: of SNR^2, with exponents a' and b'.
        signal_law: of ||E g||^2, whose exponents are 2 a_s and 2 b_s.

    Returns:
        ``None`` where R has no interval: an exponent is unbounded, or the fitted noise has no mean
        over uniform pass rates, if only without some block.
    """
    if not (snr_law.is_bounded and signal_law.is_bounded):
        return None
    try:
        logs_JE = [
            np.log([variance_ratio(alpha, beta, *s / 2, *n) for s, n in zip(own, snr, strict=True)])
            for own, snr in zip(signal_law.refits_JE2, snr_law.refits_JE2, strict=True)
        ]
    except ConfigError:
        return None
    log = _across_bins(logs_JE, snr_law.counts_JB)
    value = float(np.exp(log.value))
    low, high = np.exp([log.low, log.high])
    return SnrEstimate(value, value * log.standard_error, float(low), float(high))


def _exponent(value_JE: Sequence[np.ndarray], counts_JB: Sequence[np.ndarray]) -> SnrEstimate:
    found = _across_bins(value_JE, counts_JB)
    if np.abs(found.value - np.array(EXPONENT_BOUNDS)).min() > AT_BOUND:
        return found
    # at a bound the refits stay there too, and their variance would be too small
    return SnrEstimate(found.value, np.inf, -np.inf, np.inf)


def _across_bins(value_JE: Sequence[np.ndarray], counts_JB: Sequence[np.ndarray]) -> SnrEstimate:
    """The estimate from all blocks, with an interval from the bins' jackknife variances."""
    pairs = zip(value_JE, counts_JB, strict=True)
    error = float(np.sqrt(sum(jackknife_variance(value_E, count_B) for value_E, count_B in pairs)))
    degrees = min(len(count_B) for count_B in counts_JB) - 1
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
    value = float(value_JE[0][0])
    return SnrEstimate(value, error, value - reach, value + reach)


class _PowerFit:
    """Weighted least-squares fit of (log c, a, b) to the figures of all bins."""

    def __init__(self, pass_rate_J: np.ndarray, error_J: np.ndarray) -> None:
        ones = np.ones_like(pass_rate_J)
        self.terms_J3 = np.stack([ones, np.log(pass_rate_J), np.log1p(-pass_rate_J)], 1)
        self.error_J = error_J

    def start(self, value_J: np.ndarray) -> np.ndarray:
        """Starting point: a linear fit of the logarithms, from the bins above 0."""
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
