"""Exact sign-flip test of a paired difference, for where two standard errors are too narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Steps that a difference of 1 is counted in: exact for means of k up to 6, and of 8, 10, 12, 16,
# 32, 64 samples. A metric of lm-eval whose differences exceed 1 gets as many for the largest one:
# memory grows with them.
STEPS = 960


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of paired ``differences``: share of sign flips whose mean is as far from 0.

    A flip swaps the two models on a problem; all ways to do so count. For one answer a problem this
    is McNemar's exact test. Fewer than 6 changed problems never reach
    0.05.
    """
    largest = max((abs(value) for value in differences), default=0.0)
    scale = STEPS / max(1.0, largest)
    steps = [step for value in differences if (step := round(value * scale))]
    unit = math.gcd(*steps)  # at k = 1 all steps have one size
    sizes = [abs(step) // unit for step in steps]
    total, observed = sum(sizes), abs(sum(steps)) // (unit or 1)
    chance = np.zeros(total + 1)  # probability of so much being gained and the rest lost
    chance[0] = 1
    for size in sizes:
        chance /= 2
        chance[size:] += chance[:-size].copy()
    far = abs(2 * np.arange(total + 1) - total) >= observed
    return float(chance[far].sum())
