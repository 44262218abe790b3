"""Settings ``stages`` and ``loss``: which divergence is minimised when, and how it is reduced."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_paced.errors import ConfigError
from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.settings.checks import require
from nemo_paced.settings.choices import Reduction, ResponseSource


@dataclass
class StageConfig:
    """One stage of training: its divergence, its responses and its share of the steps."""

    name: str = "forward_kl"  # name in logs and messages, another for each stage
    # what is minimised between teacher T and student S
    divergence: DivergenceKind = DivergenceKind.forward_kl
    responses: ResponseSource = ResponseSource.references
    fraction: float = 1.0  # share of trainer.max_steps
    # Estimate pass rates anew before the stage's first step, where weights follow from them.
    reestimate_pass_rates: bool = False
    reset_optimizer: bool = False  # forget the moments at the stage's first step

    def __post_init__(self) -> None:
        require(
            0 < self.fraction <= 1, f"stages[{self.name}].fraction is {self.fraction}: in (0, 1]"
        )


@dataclass
class LossConfig:
    """Parameters of the divergences, and how token divergences become one number.

    Formulas are in ``losses/kinds.py`` and ``losses/reduction.py``.
    """

    reduction: Reduction = Reduction.token_sum
    temperature: float = Divergence.temperature  # divides both models' logits in the divergence
    jsd_beta: float = Divergence.jsd_beta  # share of the teacher in the mixture of jsd
    # share of the first distribution in the mixture of the skewed KLs
    skew: float = Divergence.skew
    # probability mass of the teacher's head in adaptive_kl
    akl_head_mass: float = Divergence.akl_head_mass
    chunk_size: int | None = None  # tokens a chunk of the loss; None: chosen by the loss

    def __post_init__(self) -> None:
        try:
            self.divergence(DivergenceKind.forward_kl)
        except ValueError as error:
            raise ConfigError(f"loss.{error}") from error

    def divergence(self, kind: DivergenceKind) -> Divergence:
        """The divergence of a stage, with these parameters."""
        parameters = self.temperature, self.jsd_beta, self.skew, self.akl_head_mass
        return Divergence(kind, *parameters)


def two_stages() -> list[StageConfig]:
    """The paper's schedule: forward KL for the first half, then reverse KL on fresh rollouts."""
    return [
        StageConfig(name="forward_kl", fraction=0.5),
        StageConfig(
            name="reverse_kl",
            divergence=DivergenceKind.reverse_kl,
            responses=ResponseSource.rollouts,
            fraction=0.5,
            reestimate_pass_rates=True,
        ),
    ]
