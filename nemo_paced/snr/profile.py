"""Comparison of SNR over pass rates with the Beta kernel: as a whole, and at both ends.

As a whole: how far the kernel is from w* = SNR^2 / (1 + SNR^2), and which efficiency that
guarantees. At the ends: whether SNR falls towards an end of the pass rates, as the kernel does. An
end is the outermost measured bin; it is compared with the middle in w*. Two readings compete: that
w* falls by the kernel's own ratio there, and that it does not fall (ratio 1). The outermost bin's
mean pass rate is not 0 or 1 (few rollouts draw problems of all kinds into it): the kernel's ratio
may be 0.6 and more, so that the two readings differ by less than a factor of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

from nemo_paced.snr.estimates import CONFIDENCE, BinEstimate
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.theory import minimax_efficiency, optimal_weight

DRAWS = 4000  # of the noise, to estimate how much it widens a range
MIDDLE = 0.75  # the middle is the bins where the kernel has this share of its peak, or more
ERRORS = 2.0  # standard errors by which a reading is excluded
LEVEL = 0.9  # the kernel's ratio from which the two readings cannot be told apart


@dataclass(frozen=True, slots=True)
class Profile:
    """SNR over pass rates: the measured bins' estimates, in ascending order of pass rate.

    Attributes:
        pass_rate_J: mean pass rate of each bin's problems, in (0, 1).
        bins: their estimates, aligned.
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
class Deviation:
    """How far w* = SNR^2 / (1 + SNR^2) is from the kernel, in nats, the scale being free.

    Attributes:
        delta: half the range of log(w* / kernel) over the bins as measured. Noise inflates it, as
            it widens the range between a maximum and a minimum.
        corrected: ``delta`` less what noise adds by a parametric bootstrap; within ``low`` and
            ``high``.
        low, high: 95 % interval of the true delta, by intervals that hold for all bins at once
            (Bonferroni); ``high`` is infinite where a bin's SNR may be 0.
        noise: the ``delta`` that the same noise would show if the kernel were exact.
        bins: number of bins behind the point estimate: those with SNR^2 above two standard errors.
    """

    delta: float
    corrected: float
    low: float
    high: float
    noise: float
    bins: int

    @property
    def efficiency(self) -> float:
        """sech^2 of the corrected delta: what is kept of the best weights' descent."""
        return float(minimax_efficiency(self.corrected))

    @property
    def guaranteed_efficiency(self) -> float:
        """sech^2 of ``high``: the least share of the best weights' descent, at 95 % confidence.

        It holds for the pass rates that were measured.
        """
        return float(minimax_efficiency(self.high)) if np.isfinite(self.high) else 0.0


def deviation(profile: Profile, alpha: float, beta: float, *, seed: int = 0) -> Deviation | None:
    """Deviation of the measured w* from a kernel, with an interval.

    Args:
        alpha, beta: of the kernel that is compared with, p^alpha (1-p)^beta.
        seed: of the bootstrap's draws.

    Returns:
        ``None`` where fewer than two bins have a SNR^2 above two standard errors.
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
    """Bounds of delta: the least and the largest half range within the bins' joint intervals."""
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


class EndVerdict(Enum):
    """Verdict on an end of a profile: whether SNR falls towards it as the kernel does.

    Where the opposite is true, ``falls`` and ``does_not_fall`` are each given a few times in 100.
    """

    falls = "falls"  # ratio below 1 by two standard errors, and nearer to the kernel's
    does_not_fall = "does_not_fall"  # ratio above the kernel's by two, and nearer to 1
    not_shown = "not_shown"  # neither, or the kernel's own ratio is near 1


@dataclass(frozen=True, slots=True)
class End:
    """Comparison of an end of the profile with its middle, in w*.

    The middle is the other bins where the kernel has at least 3/4 of its peak, weighted by their
    numbers of problems.

    Attributes:
        pass_rate: mean pass rate of the outermost measured bin.
        ratio: w* of that bin over that of the middle.
        standard_error: of ``ratio``.
        kernel: the kernel at that bin over the kernel in the middle.
        verdict: which reading is shown; the nearer one is so in logarithms.
        norm_ratio: mean gradient norm at the end over that in the middle.
    """

    pass_rate: float
    ratio: float
    standard_error: float
    kernel: float
    verdict: EndVerdict
    norm_ratio: float

    @property
    def is_level(self) -> bool:
        """Whether the kernel itself hardly falls, so that no number of problems gives a verdict."""
        return self.kernel >= LEVEL


def compare_end(profile: Profile, at: int, alpha: float, beta: float) -> End | None:
    """Compare an end of the profile with its middle.

    Args:
        at: index of the end's bin: 0 or -1.
        alpha, beta: of the kernel that is compared with, p^alpha (1-p)^beta.

    Returns:
        ``None`` with fewer than three bins, or where there is no middle with a signal.
    """
    if len(profile.bins) < 3:
        return None
    kernel_J = beta_weight(profile.pass_rate_J, alpha, beta)
    share_J = np.array([float(b.problems) for b in profile.bins])
    share_J[kernel_J < MIDDLE * kernel_J.max()] = 0.0
    share_J[at] = 0.0
    weight_J = optimal_weight(profile.snr_squared_J)
    error_J = profile.error_J / (1 + profile.snr_squared_J) ** 2  # d w* / d SNR^2
    norm_J = np.array([b.gradient_norm.value for b in profile.bins])
    middle = float(share_J @ weight_J)
    if not middle > 0:
        return None
    share_J /= share_J.sum()
    middle, middle_error = float(share_J @ weight_J), float(np.linalg.norm(share_J * error_J))
    end, end_error = float(weight_J[at]), float(error_J[at])
    expected = float(kernel_J[at] / (share_J @ kernel_J))

    def above(ratio: float) -> float:
        """By how many standard errors the end lies above ``ratio`` times the middle."""
        return (end - ratio * middle) / float(np.hypot(end_error, ratio * middle_error))

    return End(
        pass_rate=float(profile.pass_rate_J[at]),
        ratio=end / middle,
        standard_error=float(np.hypot(end_error, end / middle * middle_error)) / middle,
        kernel=expected,
        verdict=_verdict(end / middle, expected, above(expected), above(1.0)),
        norm_ratio=float(norm_J[at] / (share_J @ norm_J)),
    )


def _verdict(ratio: float, kernel: float, above_kernel: float, above_flat: float) -> EndVerdict:
    if kernel >= LEVEL:
        return EndVerdict.not_shown
    is_nearer_flat = ratio > np.sqrt(kernel)
    if is_nearer_flat and above_kernel > ERRORS:
        return EndVerdict.does_not_fall
    if not is_nearer_flat and above_flat < -ERRORS:
        return EndVerdict.falls
    return EndVerdict.not_shown
