"""The exact test of a paired difference; two standard errors are too few where little changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# That differences are counted in: exact for k up to 6, and for 8, 10, 12, 16, 32, 64. A metric of
# lm-eval whose values are above 1 gets as many for its largest difference: memory follows them.
STEPS = 960


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of paired ``differences`` about 0: of all ways to swap the two models
    problem by problem, the share whose mean is as far from 0.

    Of one answer a problem this is McNemar's exact test. Fewer than 6 changed problems never reach
    0.05.
    """
    largest = max((abs(value) for value in differences), default=0.0)
    scale = STEPS / max(1.0, largest)
    steps = [step for value in differences if (step := round(value * scale))]
    unit = math.gcd(*steps)  # of k = 1 all steps are one size
    sizes = [abs(step) // unit for step in steps]
    total, observed = sum(sizes), abs(sum(steps)) // (unit or 1)
    chance = np.zeros(total + 1)  # of so much being gained, the rest lost
    chance[0] = 1
    for size in sizes:
        chance /= 2
        chance[size:] += chance[:-size].copy()
    far = abs(2 * np.arange(total + 1) - total) >= observed
    return float(chance[far].sum())
