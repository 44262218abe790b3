"""What the study compares: overrides of the quickstart's recipe, one set an arm."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_KL = "schedule=forward_kl"
TWO_STAGE = "schedule=two_stage"
UNWEIGHTED = "weights.scheme=unweighted"
POSTERIOR = "weights.estimator=posterior"

_FORWARD = "name:forward_kl,divergence:forward_kl,responses:references,fraction:0.5"
_REVERSE = "name:reverse_kl,divergence:reverse_kl,responses:rollouts,fraction:0.5"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train.

    Attributes:
        overrides: of conf/quickstart.yaml.
        num_rollouts: K of the pass rates at step 0.
    """

    overrides: tuple[str, ...]
    num_rollouts: int = 8


CORE = {
    "unweighted": Arm((UNWEIGHTED, FORWARD_KL)),
    "hard_filter": Arm(("weights.scheme=hard_filter", FORWARD_KL)),
    "adaptive_kl": Arm((UNWEIGHTED, "schedule=adaptive_kl")),
    "paced": Arm((FORWARD_KL,)),
    "paced_two_stage": Arm((TWO_STAGE,)),
}
EXTENDED = {
    "unweighted_two_stage": Arm((UNWEIGHTED, TWO_STAGE)),
    "paced_reversed": Arm(  # reverse KL first
        (f"stages=[{{{_REVERSE}}},{{{_FORWARD},reestimate_pass_rates:true}}]",)
    ),
    "posterior": Arm((POSTERIOR, FORWARD_KL)),
    "posterior_two_stage": Arm((POSTERIOR, TWO_STAGE)),
    # no rollouts for pass rates after step 0: those that are trained on say it
    "free_two_stage": Arm(
        (POSTERIOR, "weights.reestimate=free", f"stages=[{{{_FORWARD}}},{{{_REVERSE}}}]")
    ),
    "exponents_1_2": Arm(("weights.alpha=1", "weights.beta=2", FORWARD_KL)),
    "exponents_2_1": Arm(("weights.alpha=2", "weights.beta=1", FORWARD_KL)),
    "k_4": Arm((FORWARD_KL,), num_rollouts=4),
    "k_16": Arm((FORWARD_KL,), num_rollouts=16),
}
ARMS = CORE | EXTENDED
REFERENCE = "unweighted"  # what the others are compared with
# what one part of the method does, the others being the same; PACED against the best baselines
PAIRS = (
    ("paced", "hard_filter"),
    ("paced", "adaptive_kl"),
    ("posterior", "paced"),
    ("exponents_1_2", "paced"),
    ("exponents_2_1", "paced"),
    ("k_4", "paced"),
    ("k_16", "paced"),
    ("paced_two_stage", "paced"),
    ("unweighted_two_stage", "paced"),  # the stage alone against the weights alone
    ("paced_two_stage", "adaptive_kl"),
    ("paced_two_stage", "unweighted_two_stage"),
    ("paced_reversed", "paced_two_stage"),
    ("posterior_two_stage", "paced_two_stage"),
    ("free_two_stage", "posterior_two_stage"),
)


def chosen(names: str) -> list[str]:
    """``core``, ``all`` or names with commas; the reference is always among them.

    Raises:
        ValueError: there is no such arm.
    """
    listed = {"core": list(CORE), "all": list(ARMS)}.get(names) or names.split(",")
    if unknown := [name for name in listed if name not in ARMS]:
        raise ValueError(f"no arm {unknown[0]!r}: core, all, or of {', '.join(ARMS)}")
    return list(dict.fromkeys([REFERENCE, *listed]))
