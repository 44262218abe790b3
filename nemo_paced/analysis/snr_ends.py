"""Whether SNR falls towards an end of the pass rates, as the kernel does.

An end is the outermost measured bin; it is compared with the middle in w* = SNR^2 / (1 + SNR^2).
Two readings compete: that w* falls by the kernel's own ratio there, and that it does not fall
(ratio 1). The outermost bin's mean pass rate is not 0 or 1 (few rollouts draw problems of all kinds
into it): the kernel's ratio may be .6 and more, and nothing can be twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from nemo_paced.analysis.snr_profile import Profile
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.theory import optimal_weight

MIDDLE = 0.75  # of the kernel's peak
ERRORS = 2.0  # standard errors
LEVEL = 0.9  # a kernel's ratio from which on the two readings are one


class Verdict(Enum):
    """What is shown; each of the first two is wrong of the other's truth a few times in 100."""

    falls = "falls"  # not flat by two standard errors, and nearer to the kernel's ratio
    does_not_fall = "does_not_fall"  # above the kernel's by two standard errors, and nearer to 1
    not_shown = "not_shown"  # neither, or the kernel's own ratio is near 1


@dataclass(frozen=True, slots=True)
class End:
    """How an end of the profile compares with its middle, in w*.

    The middle is the bins where the kernel has at least 3/4 of its peak, weighted by problems.

    Attributes:
        pass_rate: mean of the outermost measured bin.
        ratio: its w* over that of the middle.
        standard_error: of ``ratio``.
        kernel: the same ratio of the kernel.
        verdict: which reading is shown; nearer means so in logarithms.
        norm_ratio: mean gradient norm at the end over that in the middle.
    """

    pass_rate: float
    ratio: float
    standard_error: float
    kernel: float
    verdict: Verdict
    norm_ratio: float

    @property
    def is_level(self) -> bool:
        """Whether the kernel itself hardly falls: no number of problems tells then."""
        return self.kernel >= LEVEL


def compare_end(profile: Profile, at: int, alpha: float, beta: float) -> End | None:
    """An end of the profile; ``None`` where there is no middle with a signal.

    Args:
        at: index of the end's bin.
        alpha, beta: of the kernel that is compared with, p^alpha (1-p)^beta.
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


def _verdict(ratio: float, kernel: float, above_kernel: float, above_flat: float) -> Verdict:
    if kernel >= LEVEL:
        return Verdict.not_shown
    is_nearer_flat = ratio > np.sqrt(kernel)
    if is_nearer_flat and above_kernel > ERRORS:
        return Verdict.does_not_fall
    if not is_nearer_flat and above_flat < -ERRORS:
        return Verdict.falls
    return Verdict.not_shown
