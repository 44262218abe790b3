"""Summary figures of a training set's pass rates and weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# the paper's bounds: pass rates above EASY count as mastered, below HARD as out of reach
EASY, HARD = 0.8, 0.2


def effective_sample_size(weights: Sequence[float]) -> float:
    """Kish's (sum w)^2 / sum w^2: so many problems of equal weight estimate a mean as well."""
    values = np.asarray(weights, dtype=np.float64)
    return float(values.sum() ** 2 / (values**2).sum())


def weight_shares(
    pass_rates: Sequence[float], weights: Sequence[float], num_bins: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Number of problems and share of all weight in equal bins of pass rate, [num_bins] each."""
    edges = np.linspace(0, 1, num_bins + 1)
    held = in_bins(pass_rates, edges, np.asarray(weights, dtype=np.float64))
    return in_bins(pass_rates, edges), held / (held.sum() or 1.0)


def in_bins(
    pass_rates: Sequence[float], edges: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Number of problems, or sum of their weights, between each two neighbouring edges.

    A rate on an edge belongs to the bin above it: in floats the edge 0.30000000000000004 stands
    above 3/10, hence the margin. A rate that is not known, NaN, belongs to none.
    """
    known = ~np.isnan(rates := np.asarray(pass_rates, dtype=np.float64))
    index = np.searchsorted(edges - 1e-9, rates[known], side="right") - 1
    num_bins = len(edges) - 1
    held = None if weights is None else np.asarray(weights)[known]
    return np.bincount(np.minimum(index, num_bins - 1), held, minlength=num_bins)


def drift_metrics(pass_rates: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """Metrics of how hard the training set is for the student by now, by their names in the log.

    Args:
        pass_rates: NaN where one is not known; such problems are left out.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    rates = rates[~np.isnan(rates)]
    below, above = float((rates < HARD).mean()), float((rates > EASY).mean())
    return {
        "weights/mean_pass_rate": float(rates.mean()),
        "weights/share_below_0.2": below,
        "weights/share_between": 1 - below - above,
        "weights/share_above_0.8": above,
        "weights/effective_sample_size": effective_sample_size(weights),
    }
