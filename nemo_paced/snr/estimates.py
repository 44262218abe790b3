"""Signal-to-noise ratio of gradients across problems, estimated from five scalars a block.

Of n gradients g_i with sum S, signal is ||E g||^2 and noise is tr Cov g:

    plain (the paper's)   SNR = ||S / n|| / sqrt(mean ||g_i - S / n||^2)
    unbiased              signal = (||S||^2 - sum ||g_i||^2) / (n (n - 1))
                          noise  = (sum ||g_i||^2 - ||S||^2 / n) / (n - 1)

The plain square carries a floor of about 1 / n: gradients without any common direction show
SNR = 1 / sqrt(n). The unbiased signal has no floor and may come out below 0.

Intervals are those of a delete-a-group jackknife. A bin's problems are dealt out to blocks at
random, and without block b the sum is S - S_b, whose square is ||S||^2 - 2 S.S_b + ||S_b||^2: five
scalars a block are all that has to outlive the gradients.

Axes: B blocks, E the estimate from all blocks followed by those without each one (B + 1), J bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MIN_BLOCKS = 4  # the variance of fewer blocks' values says too little for an interval
ROUNDING = 1e-14  # share of the sum of squares below which a noise is rounding error


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Scalars that are kept of one bin's gradients: float64 arrays [B].

    Attributes:
        count_B: problems of each block, at least 1.
        norm_B: sum of ||g|| over a block's problems.
        square_B: sum of ||g||^2 over them.
        dot_B: S . S_b, the sum over the bin times the sum over the block.
        block_B: ||S_b||^2.
    """

    count_B: np.ndarray
    norm_B: np.ndarray
    square_B: np.ndarray
    dot_B: np.ndarray
    block_B: np.ndarray


@dataclass(frozen=True, slots=True)
class SnrEstimate:
    """A figure with its standard error and a 95 % interval (Student's t over the blocks)."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BinEstimate:
    """Estimates of one bin: its SNR, signal and gradient norm.

    Attributes:
        count_B: problems of each block.
        plain: the paper's SNR.
        snr_squared: unbiased, ||E g||^2 / tr Cov g; may be below 0.
        signal: unbiased ||E g||^2; may be below 0.
        gradient_norm: mean ||g|| of a problem.
        without_B: ``snr_squared`` without each block.
        signal_without_B: ``signal`` likewise.
    """

    count_B: np.ndarray
    plain: SnrEstimate
    snr_squared: SnrEstimate
    signal: SnrEstimate
    gradient_norm: SnrEstimate
    without_B: np.ndarray
    signal_without_B: np.ndarray

    @property
    def problems(self) -> int:
        return int(self.count_B.sum())

    @property
    def snr(self) -> float:
        """The root of ``snr_squared``; 0 where that is below 0."""
        return float(np.sqrt(max(self.snr_squared.value, 0.0)))


def estimate_bin(sums: BlockSums) -> BinEstimate | None:
    """All estimates of a bin, from the sums over its blocks.

    Returns:
        ``None`` with fewer than ``MIN_BLOCKS`` blocks, or where the gradients do not differ (all
        are 0, say), as there is no ratio to no noise.
    """
    if len(sums.count_B) < MIN_BLOCKS:
        return None
    total = float(sums.dot_B.sum())
    count_E = _without(sums.count_B)
    square_E = _without(sums.square_B)
    norm_E = _without(sums.norm_B)
    sum_E = np.append(total, total - 2 * sums.dot_B + sums.block_B)
    signal_E = (sum_E - square_E) / (count_E * (count_E - 1))
    noise_E = (square_E - sum_E / count_E) / (count_E - 1)
    if not (noise_E > ROUNDING * square_E.max()).all():
        return None
    plain_E = np.sqrt(sum_E / count_E / (square_E - sum_E / count_E))
    ratio_E = signal_E / noise_E
    return BinEstimate(
        count_B=sums.count_B,
        plain=jackknife(plain_E, sums.count_B),
        snr_squared=jackknife(ratio_E, sums.count_B),
        signal=jackknife(signal_E, sums.count_B),
        gradient_norm=jackknife(norm_E / count_E, sums.count_B),
        without_B=ratio_E[1:],
        signal_without_B=signal_E[1:],
    )


def jackknife(value_E: np.ndarray, count_B: np.ndarray) -> SnrEstimate:
    """An estimate with the delete-a-group jackknife's interval for groups of unequal size.

    With h_b = n / n_b and pseudo-values h_b x - (h_b - 1) x_(b), the variance is the mean of
    (pseudo-value - their weighted mean)^2 / (h_b - 1) (Busing, Meijer and Van der Leeden 1999).

    Args:
        value_E: the estimate from all blocks, then without each one.
        count_B: problems of each block.
    """
    value, error = float(value_E[0]), float(np.sqrt(jackknife_variance(value_E, count_B)))
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(count_B) - 1))
    return SnrEstimate(value, error, value - reach, value + reach)


def jackknife_variance(value_E: np.ndarray, count_B: np.ndarray) -> float:
    """Variance of an estimate by the delete-a-group jackknife; arguments as :func:`jackknife`."""
    share_B = count_B / count_B.sum()
    pseudo_B = (value_E[0] - (1 - share_B) * value_E[1:]) / share_B
    centre = float(np.sum(share_B * pseudo_B))
    return float(np.mean((pseudo_B - centre) ** 2 / (1 / share_B - 1)))


def _without(value_B: np.ndarray) -> np.ndarray:
    total = value_B.sum()
    return np.append(total, total - value_B)
