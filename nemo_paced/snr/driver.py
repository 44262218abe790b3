"""Rank 0's part of the command ``snr``: its inputs, the order of work, and the file it writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_paced.config import (
    PacedConfig,
    Reduction,
    ResponseSource,
    WeightScheme,
)
from nemo_paced.data.packing import TrainItem
from nemo_paced.data.prompts import PromptKind
from nemo_paced.records import Response
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.served import served_dtype, training_length
from nemo_paced.run.problems import RunProblems
from nemo_paced.run.progress import bar_task, progress_bar, server_notes
from nemo_paced.snr.estimates import BlockSums
from nemo_paced.snr.identity import measurement_identity, rollout_purpose, sampling_settings
from nemo_paced.snr.plan import (
    PlannedBin,
    check_bins,
    find_pass_rates,
    is_hf,
    plan_bins,
    what_is_measured,
)
from nemo_paced.snr.record import BinRecord, SnrRecord
from nemo_paced.snr.summary import summarise
from nemo_paced.snr.text import doubt
from nemo_paced.training import prepare
from nemo_paced.training.batches import Batch, build_items
from nemo_paced.training.references import load_references
from nemo_paced.weights.pass_rates import PassRateTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a bin's problems, as rank 0 hands it to all ranks.

    Attributes:
        bin: index of the bin, from 0.
        number: of the block in its bin, from 0.
        count: blocks of the bin.
        items: one for each problem.
    """

    bin: int
    number: int
    count: int
    items: list[TrainItem]

    def to_message(self) -> dict[str, Any]:
        """The block as plain data, which :meth:`from_message` reads."""
        place = {"bin": self.bin, "number": self.number, "count": self.count}
        return place | Batch(self.items, {}).to_message()

    @staticmethod
    def from_message(message: dict[str, Any]) -> Block:
        items = Batch.from_message({**message, "metrics": {}}).items
        return Block(message["bin"], message["number"], message["count"], items)


class SnrDriver:
    """Rank 0's part of a measurement: hands out blocks of problems and keeps the bins' figures.

    All inputs are checked when it is made; servers are started in :meth:`prepare`.

    Args:
        run_dir: where references and pass rates are.
        model: the student that is measured, a checkpoint or a Hugging Face directory.
        step: optimizer steps behind the model; ``None``: not known.
        out: the JSON file; bins that it has from the same measurement are not measured again.

    Raises:
        ConfigError: no pass rates, too few problems in every bin, or prompts that do not fit.
    """

    def __init__(
        self, config: PacedConfig, run_dir: Path, model: Path, step: int | None, out: Path
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.model, self.step, self.out = model, step, out
        kept = RunProblems(run_dir, writes=False)
        key = "data.problems"
        problems = kept.read(config.data.problems, key=key, data=config.data, tells=True)
        self.prompts = prepare.make_prompts(config)
        path = find_pass_rates(config, run_dir, model, step)
        table = PassRateTable.read(path, problems)
        self.bins = plan_bins(table.rows, config.snr)
        check_bins(self.bins, path)
        measured = {name for one in self.bins for block in one.blocks for name in block}
        self.all_problems = problems
        self.problems = {p.id: p for p in problems if p.id in measured}
        for kind in (PromptKind.student, PromptKind.teacher):
            self.prompts.check(list(self.problems.values()), kind)
        self.record = self._record(table)
        if reason := doubt(self.record):
            logger.warning("snr: %s; --pass-rates FILE gives a table of this very model", reason)
        self._stack = ExitStack()

    def __enter__(self) -> SnrDriver:
        self.bar = self._stack.enter_context(progress_bar())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        """Load the responses to all problems, or start the server to sample them from."""
        kind, responses = what_is_measured(self.config)
        todo = sum(self.bins[index].problems for index in self._missing())
        logger.info(
            "snr: %d problems in %d bins, %s along %s", todo, len(self._missing()), kind.value,
            responses.value,
        )  # fmt: skip
        self.responses: Mapping[str, Response] = {}
        if responses is ResponseSource.references:
            self.responses = load_references(
                self.config, self.all_problems, self.prompts, self.run_dir, self.bar
            )
            return
        folder, config = self.out.with_suffix(""), self.config
        served = self.model if is_hf(self.model) else Path(config.student.hf_path)
        self.sampler = self._stack.enter_context(
            Sampler(
                served,
                config.rollout,
                config.grading,
                seed=config.model.seed,
                dtype=served_dtype(config),
                max_model_len=training_length(config, served, config.data.max_prompt_length),
                prompts=self.prompts,
                store_dir=folder / "rollouts",
                log_path=folder / "servers" / "student" / "server.log",
                notify=server_notes(self.bar),
                trainer_gpus=config.trainer.devices,
            )
        )

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of all bins that have no figures yet, bin by bin."""
        missing = self._missing()
        if not self.responses:
            self._sample()
        total = sum(self.bins[index].problems for index in missing)
        began, done = time.monotonic(), 0
        with bar_task(self.bar, "gradients", total) as advance:
            for index in missing:
                planned = self.bins[index]
                for number, names in enumerate(planned.blocks):
                    yield Block(index, number, len(planned.blocks), self._items(names))
                    done += len(names)
                    advance(done, total)
                if self.bar.disable:
                    left = (time.monotonic() - began) / done * (total - done)
                    logger.info("snr: %d of %d problems, %.0f s left", done, total, left)

    def finish_bin(self, index: int, sums: BlockSums) -> None:
        """Keep a bin's figures and write the file, which the last bin completes."""
        self.record.bins[index] = replace(self.record.bins[index], sums=sums)
        self.record.complete = not self._missing()
        self.write()

    def write(self) -> None:
        """Write the record, with the estimates that follow from it."""
        # first without estimates: should they fail, the bin, which took long, is kept
        self.record.write(self.out)
        self.record.write(self.out, summarise(self.record).to_dict())

    @property
    def is_done(self) -> bool:
        """Whether every bin that can be measured has its figures."""
        return self.record.complete

    def _missing(self) -> list[int]:
        pairs = enumerate(zip(self.bins, self.record.bins, strict=True))
        return [i for i, (planned, kept) in pairs if planned.blocks and kept.sums is None]

    def _sample(self) -> None:
        wanted = list(self.problems.values())
        with bar_task(self.bar, "rollouts", len(wanted)) as advance:
            found = self.sampler.sample(
                wanted,
                purpose=rollout_purpose(self.config, self.model, wanted, self.prompts),
                step=self.step or 0,
                settings=sampling_settings(self.config),
                progress=advance,
            )
        self.responses = {rollout.problem_id: rollout for rollout in found}

    def _items(self, names: tuple[str, ...]) -> list[TrainItem]:
        """Items of the named problems, each as if it were a batch of its own, of weight 1."""
        reduction = self.config.loss.reduction
        if reduction is Reduction.token_mean:  # in a batch its divisor is the same for all problems
            reduction = Reduction.token_sum
        return [
            item
            for name in names
            for item in build_items(
                [self.problems[name]],
                [1.0],
                [self.responses[name]],
                prompts=self.prompts,
                reduction=reduction.value,
            )
        ]

    def _record(self, table: PassRateTable) -> SnrRecord:
        """The record that an earlier start has left of the same measurement, else a new one."""
        measured = list(self.problems.values())
        identity = measurement_identity(self.config, self.model, measured, self.prompts, table.rows)
        if self.out.exists():
            found = SnrRecord.read(self.out)
            if found.identity == identity:  # the kernel it is compared with may be another
                return replace(found, **self._compared_with(table))
            logger.info("%s is of other settings: it is measured anew", self.out)
        kind, responses = what_is_measured(self.config)
        return SnrRecord(
            identity=identity,
            model=str(self.model),
            step=self.step,
            divergence=kind.value,
            responses=responses.value,
            bins=[_empty(planned) for planned in self.bins],
            **self._compared_with(table),
        )

    def _compared_with(self, table: PassRateTable) -> dict[str, Any]:
        """Fields of the record on which no bin's sums depend: kernel, estimator, table's step."""
        weights = self.config.weights
        kernel = weights.scheme is WeightScheme.beta_kernel
        given = self.config.snr.pass_rates is not None
        return {
            "alpha": weights.alpha,
            "beta": weights.beta,
            "estimator": weights.estimator.value if kernel else None,
            "pass_rates_step": None if given else table.student_step,
        }


def _empty(planned: PlannedBin) -> BinRecord:
    return BinRecord(
        planned.low,
        planned.high,
        planned.available,
        planned.pass_rate,
        planned.expected_pass_rate,
        None,
    )
