"""The Beta prior of a training set's pass rates, fitted to its own counts."""

from __future__ import annotations

import numpy as np
from scipy.special import digamma

# Lowest and highest a0 and b0. Where all problems are alike the likelihood has its maximum at
# infinity, where none is in the middle at 0: a prior of a thousand rollouts, or of a hundredth of
# one, is as far as counts go.
BOUNDS = (0.01, 1000.0)
TOLERANCE = 1e-5  # sum of the relative changes of a0 and b0 at which the iteration ends
MAX_STEPS = 2000


def fit_prior(num_correct: np.ndarray, num_rollouts: np.ndarray) -> tuple[float, float]:
    """(a0, b0) of the Beta-binomial that makes the counts most likely (type II maximum likelihood).

    By Minka's fixed point (Estimating a Dirichlet distribution, 2000, eq. 55), which raises the
    likelihood at each step. Which problems got more rollouts because of what their earlier ones
    showed does not matter: the likelihood of a sequence is the same however it was stopped.

    Args:
        num_correct, num_rollouts: float arrays, one element a problem; may be discounted counts.
            Without any rollout the prior is uniform.
    """
    if not num_rollouts.any():
        return 1.0, 1.0
    counts, repeats = np.unique(
        np.stack([num_correct, num_rollouts], 1), axis=0, return_counts=True
    )
    right, wrong = counts[:, 0], counts[:, 1] - counts[:, 0]

    def excess(seen: np.ndarray, start: float) -> float:
        return float(repeats @ (digamma(seen + start) - digamma(start)))

    a, b = 1.0, 1.0
    for _ in range(MAX_STEPS):
        total = excess(counts[:, 1], a + b)
        new_a = float(np.clip(a * excess(right, a) / total, *BOUNDS))
        new_b = float(np.clip(b * excess(wrong, b) / total, *BOUNDS))
        moved = abs(new_a - a) / a + abs(new_b - b) / b
        a, b = new_a, new_b
        if moved < TOLERANCE:
            break
    return a, b
