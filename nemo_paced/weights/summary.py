"""What a set of weights amounts to, in a few figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EASY, HARD = 0.8, 0.2  # the paper's bounds of what is mastered and what is out of reach


def effective_sample_size(weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2 (Kish): so many problems of equal weight estimate a mean as well."""
    values = np.asarray(weights, dtype=np.float64)
    return float(values.sum() ** 2 / (values**2).sum())


def weight_shares(
    pass_rates: Sequence[float], weights: Sequence[float], num_bins: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Problems, and share of all weight, in each of ``num_bins`` equal bins of the pass rate."""
    values = np.asarray(weights, dtype=np.float64)
    edges = np.linspace(0, 1, num_bins + 1)
    held = in_bins(pass_rates, edges, values)
    return in_bins(pass_rates, edges), held / values.sum()


def in_bins(
    pass_rates: Sequence[float], edges: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Problems, or what they weigh, between each two edges. A rate on an edge belongs to the bin
    above it: in floats the edge 0.30000000000000004 stands above 3/10, hence the margin."""
    index = np.searchsorted(edges - 1e-9, pass_rates, side="right") - 1
    num_bins = len(edges) - 1
    return np.bincount(np.minimum(index, num_bins - 1), weights, minlength=num_bins)


def drift_metrics(pass_rates: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """How hard the training set is for the student by now; the names are those of the log."""
    rates = np.asarray(pass_rates, dtype=np.float64)
    below, above = float((rates < HARD).mean()), float((rates > EASY).mean())
    return {
        "weights/mean_pass_rate": float(rates.mean()),
        "weights/share_below_0.2": below,
        "weights/share_between": 1 - below - above,
        "weights/share_above_0.8": above,
        "weights/effective_sample_size": effective_sample_size(weights),
    }
