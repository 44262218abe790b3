"""Plan of an ``snr`` measurement: its problems by bin and block, and along whose responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_paced.config import (
    DivergenceKind,
    PacedConfig,
    ResponseSource,
    SnrConfig,
    TeacherPlacement,
)
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.records import PassRate
from nemo_paced.run.checkpoint_files import STATE_FILE, read_state
from nemo_paced.run.config_file import PASS_RATES_FILE
from nemo_paced.snr.estimates import MIN_BLOCKS
from nemo_paced.weights.prior import fit_prior

# divergences that are measured along the student's rollouts where no stage says otherwise
SAMPLED = (DivergenceKind.reverse_kl, DivergenceKind.skew_reverse_kl)


@dataclass(frozen=True, slots=True)
class PlannedBin:
    """Bin of problems of similar pass rate, and the blocks in which they are measured.

    Attributes:
        low, high: pass rates between which the bin lies; ``high`` itself belongs to the next bin,
            1 to the last.
        available: problems of the table in the bin.
        pass_rate: mean of the measured problems' estimates c / K; NaN where none is measured.
        expected_pass_rate: mean of their posterior means (c + a0) / (K + a0 + b0) under the prior
            that fits the table: what their pass rates are after regression to the mean, and above
            0 where none of K rollouts was right.
        blocks: problem ids by block; empty where there are too few problems to measure.
    """

    low: float
    high: float
    available: int
    pass_rate: float
    expected_pass_rate: float
    blocks: tuple[tuple[str, ...], ...]

    @property
    def problems(self) -> int:
        """Number of problems to measure."""
        return sum(map(len, self.blocks))


def plan_bins(rows: Sequence[PassRate], settings: SnrConfig) -> list[PlannedBin]:
    """Sort problems into pass-rate bins of equal width, and draw those to measure at random.

    Args:
        rows: the pass-rate table, one row a problem.
    """
    right = np.array([row.effective_correct for row in rows])
    count = np.array([row.effective_rollouts for row in rows])
    a0, b0 = fit_prior(right, count)
    expected = (right + a0) / (count + a0 + b0)
    rates = np.full(len(right), np.nan)
    np.divide(right, count, out=rates, where=count > 0)
    number = np.minimum(np.floor(rates * settings.bins + 1e-9), settings.bins - 1)
    rng = np.random.default_rng(settings.seed)
    bins = []
    for index in range(settings.bins):
        there = np.flatnonzero(number == index)
        drawn = rng.permutation(there)[: settings.max_problems_per_bin]
        blocks = min(settings.blocks, len(drawn))
        if blocks < MIN_BLOCKS:
            drawn, blocks = drawn[:0], 0
        bins.append(
            PlannedBin(
                low=index / settings.bins,
                high=(index + 1) / settings.bins,
                available=len(there),
                pass_rate=float(rates[drawn].mean()) if blocks else float("nan"),
                expected_pass_rate=float(expected[drawn].mean()) if blocks else float("nan"),
                blocks=tuple(tuple(rows[i].id for i in drawn[b::blocks]) for b in range(blocks)),
            )
        )
    return bins


def check_bins(bins: Sequence[PlannedBin], table: Path) -> None:
    """Refuse bins none of which has enough problems to measure.

    Args:
        table: path of the pass-rate table, for the message.

    Raises:
        ConfigError: no bin holds ``MIN_BLOCKS`` problems.
    """
    if not any(one.blocks for one in bins):
        raise ConfigError(
            f"snr.bins is {len(bins)} and none of them holds {MIN_BLOCKS} problems of {table}, "
            f"which an interval needs (the fullest has {max(b.available for b in bins)}): lower "
            "snr.bins, or give a table of more problems"
        )


def is_hf(model: Path) -> bool:
    """Whether a model is a Hugging Face directory, and not a checkpoint of a run."""
    return (model / "config.json").exists()


def step_of(config: PacedConfig, model: Path) -> int | None:
    """Optimizer steps behind a model: those of a run's checkpoint, 0 for ``student.hf_path``.

    ``None`` for any other directory: an exported model does not say.
    """
    if (model / STATE_FILE).exists():
        return read_state(model).step
    return 0 if model.resolve() == Path(config.student.hf_path).resolve() else None


def what_is_measured(config: PacedConfig) -> tuple[DivergenceKind, ResponseSource]:
    """The divergence to measure, and whose responses it is taken along (see ``SnrConfig``)."""
    kind = config.snr.divergence or config.stages[0].divergence
    if config.snr.responses is not None:
        return kind, config.snr.responses
    for stage in config.stages:
        if stage.divergence is kind:
            return kind, stage.responses
    return kind, ResponseSource.rollouts if kind in SAMPLED else ResponseSource.references


def find_pass_rates(config: PacedConfig, run_dir: Path, model: Path, step: int | None) -> Path:
    """Path of the pass-rate table that fits a model best.

    This is ``snr.pass_rates`` where given, else the first that exists of: the checkpoint's own
    table, the run's latest table of ``step`` or earlier, the one in the run directory itself, and
    ``weights.pass_rates``.

    Args:
        step: optimizer steps behind the model; ``None`` (not known): the run's newest is taken.

    Raises:
        ConfigError: there is none.
    """
    if config.snr.pass_rates is not None:
        return Path(config.snr.pass_rates)
    earlier = [
        path
        for path in sorted((run_dir / "pass_rates").glob("step_????????.parquet"))
        if step is None or int(path.stem.removeprefix("step_")) <= step
    ]
    found = [model / PASS_RATES_FILE, *reversed(earlier), run_dir / PASS_RATES_FILE]
    if config.weights.pass_rates is not None:
        found.append(Path(config.weights.pass_rates))
    for path in found:
        if path.exists():
            return path
    raise ConfigError(
        f"there are no pass rates: neither {model} nor {run_dir} has {PASS_RATES_FILE}; run "
        "`nemo-paced pass-rates` with the same configuration, or give --pass-rates FILE"
    )


def check_settings(config: PacedConfig) -> None:
    """Refuse settings that ``snr`` cannot measure with, before anything starts.

    Raises:
        ConfigError: a teacher on ranks of its own; ``snr.last_layers`` that are not all on the last
            stage, or of a student with experts.
    """
    if config.teacher.placement is TeacherPlacement.separate:
        raise ConfigError(
            "teacher.placement is separate and `snr` runs the teacher beside the student: set "
            "teacher.placement=colocated (or offloaded) and teacher.separate_ranks=0, and "
            "trainer.devices to the student's ranks"
        )
    count = config.snr.last_layers
    architecture = Architecture.read(config.student.hf_path, "student.hf_path")
    there = architecture.num_layers // config.model.pipeline_model_parallel_size
    if count > there:
        raise ConfigError(
            f"snr.last_layers is {count} and the last pipeline stage holds {there} of the "
            f"{architecture.num_layers} layers: lower it, or model.pipeline_model_parallel_size"
        )
    if count and architecture.experts:
        raise ConfigError(
            f"snr.last_layers is {count} and the student has experts, in which tokens of several "
            "problems meet: set it to 0 to measure the LM head"
        )
