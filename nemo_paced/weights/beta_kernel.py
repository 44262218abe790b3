"""The Beta kernel: a problem's weight as a function of the student's pass rate on it."""

from __future__ import annotations

from typing import TypeVar

Number = TypeVar("Number")  # float, numpy array or torch tensor


def beta_weight(pass_rate: Number, alpha: float = 1.0, beta: float = 1.0) -> Number:
    """w(p) = p^alpha (1-p)^beta (arXiv 2603.11178), not normalised; peak at alpha/(alpha+beta).

    Args:
        pass_rate: in [0, 1]; a float, a numpy array or a tensor.
        alpha, beta: exponents, at least 0; 0 leaves its factor out (0^0 = 1).
    """
    return pass_rate**alpha * (1 - pass_rate) ** beta  # type: ignore[operator, no-any-return]
