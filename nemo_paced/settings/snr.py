"""Settings ``snr``: how gradients are measured across problems; training ignores them."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_paced.losses.kinds import DivergenceKind
from nemo_paced.settings.checks import positive, require
from nemo_paced.settings.choices import ResponseSource


@dataclass
class SnrConfig:
    """The command ``snr``: gradient signal-to-noise ratio against pass rate."""

    divergence: DivergenceKind | None = None  # whose gradient is measured; None: the first stage's
    # Responses along which the gradient is taken. None: those of the first stage with this
    # divergence; where no stage has it, rollouts for reverse_kl and skew_reverse_kl, references for
    # the others.
    responses: ResponseSource | None = None
    pass_rates: str | None = None  # table of pass rates; None: the checkpoint's, else the run's
    bins: int = 10  # bins of equal width over the pass rates
    blocks: int = 20  # blocks of each bin's problems, for the jackknife
    max_problems_per_bin: int = 200  # most problems of a bin, drawn at random
    last_layers: int = 0  # layers measured beside the LM head; they lie on the last pipeline stage
    seed: int = 0  # seed of the draw, and of which problem is in which block

    def __post_init__(self) -> None:
        positive("snr", self, "bins", "max_problems_per_bin")
        require(
            self.blocks >= 4,
            f"snr.blocks is {self.blocks}: intervals need at least 4, and 20 are usual",
        )
        require(self.last_layers >= 0, f"snr.last_layers is {self.last_layers}: 0 or above")
        require(
            self.max_problems_per_bin >= self.blocks,
            f"snr.max_problems_per_bin is {self.max_problems_per_bin} and snr.blocks "
            f"{self.blocks}: a block has at least one problem; raise the first or lower the second",
        )
