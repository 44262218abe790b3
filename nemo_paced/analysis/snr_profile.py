"""SNR against pass rate as a whole: how far the kernel is off, and what that guarantees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nemo_paced.analysis.snr import CONFIDENCE, BinEstimate
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.theory import minimax_efficiency, optimal_weight

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
