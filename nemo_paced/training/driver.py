"""Rank 0's part of a run: problems, references, pass rates, the rollout server, batches.

The other ranks know none of this; they get batches as messages.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from nemo_paced.config import (
    PacedConfig,
    Reduction,
    Reestimation,
    ResponseSource,
    StageConfig,
)
from nemo_paced.data.loader import ProblemOrder
from nemo_paced.data.packing import TrainItem
from nemo_paced.data.prompts import PromptKind
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.records import Outcome, Problem, Response, Rollout
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.sampling import SamplingSettings, sampling_seed
from nemo_paced.run.config_file import PASS_RATES_FILE
from nemo_paced.run.fingerprint import check_data
from nemo_paced.run.problems import RunProblems
from nemo_paced.run.progress import RunLog, bar_task, server_notes
from nemo_paced.teacher.cache import SignalCache
from nemo_paced.training import prepare
from nemo_paced.training.batches import Batch, build_items
from nemo_paced.training.references import load_references
from nemo_paced.weights.pass_rates import PassRateTable
from nemo_paced.weights.schemes import weights_with_references

logger = logging.getLogger(__name__)


class Driver:
    """Rank 0's inputs, servers and pass rates, and the batches made from them.

    It checks all inputs when made; what takes time is in methods of its own, called in order.
    """

    def __init__(self, config: PacedConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self.problems, self.prompts = prepare.training_set(config, run_dir)
        self.validation: Sequence[Problem] = []
        if config.data.validation_problems:
            key, kept = "data.validation_problems", RunProblems(run_dir)
            path = config.data.validation_problems
            held_out = kept.read(path, key=key, data=config.data, tells=True)
            kept.remove_others(held_out, key=key)
            if config.trainer.val_check_interval:
                kept.check(held_out, self.prompts, PromptKind.evaluation, key=key)
            self.validation = held_out
        check_data(run_dir, self.problems)
        RunProblems(run_dir).remove_others(self.problems, key="data.problems")
        self.order = ProblemOrder(len(self.problems), config.model.seed, config.data.shuffle)
        self.references: Mapping[str, Response] = {}
        self._tables: dict[int, PassRateTable] = {}  # by step, as it was before its batch was made
        self._stack = ExitStack()
        self._sampler: Sampler | None = None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def find_references(self, log: RunLog) -> None:
        """Read the stored responses, or sample them from the teacher, where stages need them."""
        self.log = log
        if self.config.needs_references:
            self.references = load_references(
                self.config, self.problems, self.prompts, self.run_dir, log.bar, log.open_loggers
            )

    def start_servers(self, *, resumed: bool) -> None:
        """Start the student's servers, or reach those of ``rollout.endpoints``, if any are asked.

        Args:
            resumed: the run goes on from a checkpoint.
        """
        if not self.config.asks_student(resumed=resumed):
            logger.info("no rollout server is started: nothing is sampled from the student")
            return
        self._sampler = self._stack.enter_context(
            prepare.student_sampler(
                self.config,
                self.run_dir,
                self.prompts,
                server_notes(self.log.bar),
                beside_trainer=True,
                meanwhile=self.log.open_loggers,
            )
        )

    @property
    def sampler(self) -> Sampler:
        """What samples from the student."""
        assert self._sampler is not None, "PacedConfig.asks_student says whether there is one"
        return self._sampler

    @property
    def sampling_s(self) -> float | None:
        """Seconds for which the servers have sampled so far; ``None``: there are none."""
        return None if self._sampler is None else self._sampler.busy_s()

    def check_servers(self) -> None:
        """Check that servers of somebody else take the student's weights, if any are sent.

        Raises:
            ConfigError: names one that does not.
        """
        if self.config.sends_weights:
            self.sampler.require_weight_routes()

    def first_pass_rates(self, resumed_from: Path | None) -> None:
        """Set the pass rates to begin with: the checkpoint's, given ones, or a first estimate.

        Raises:
            ConfigError: no problem has both a weight and a reference.
        """
        self.table = self._first_table(resumed_from)
        if self.references:
            weights_with_references(self.table.weights(), self.references)  # now, not at a step

    def estimate_pass_rates(self, step: int) -> None:
        """Estimate pass rates and weights anew, with the student as it is served."""
        self.table = prepare.estimate_pass_rates(
            self.config, self.problems, self.sampler, self.run_dir, step=step, bar=self.log.bar
        )

    def batch(self, step: int, consumed: int, stage: StageConfig) -> Batch:
        """The global batch of a step, whose responses an on-policy stage samples first.

        Args:
            consumed: problems of the steps before.
        """
        self._keep_table_before(step)
        positions = self.order.take(consumed, self.config.model.global_batch_size)
        problems = [self.problems[position] for position in positions]
        by_id = self.table.weights()
        if stored := stage.responses is ResponseSource.references:
            by_id = weights_with_references(by_id, self.references)
        weights = [by_id[problem.id] for problem in problems]
        metrics: dict[str, float] = {}
        if stored:
            responses = [self.references.get(problem.id) for problem in problems]
        else:
            rollouts = self._sample_batch(problems, weights, step, explore=True)
            responses, metrics = _aligned(rollouts, problems), self._rollout_metrics(rollouts)
            if self.config.weights.reestimate is Reestimation.free and rollouts:
                # from the next step on: a weight never depends on the rollout it multiplies
                self.table = self.table.updated(
                    rollouts, self.config.weights, student_step=step + 1
                )
        metrics |= self.table.drift()
        items = build_items(
            problems,
            weights,
            responses,
            prompts=self.prompts,
            reduction=self.config.loss.reduction.value,
        )
        return Batch(items, metrics)

    def save_pass_rates(self, step: int) -> None:
        """Write the table that the checkpoint of ``step`` has to hold.

        Only free re-estimation moves it from step to step; otherwise it is written already.
        Rollouts that were sampled ahead are in the store: a resumed run counts them in their turn.
        """
        if self.config.weights.reestimate is Reestimation.free:
            # in this order: the sampler's thread may begin with this very batch meanwhile
            table = self.table
            prepare.save_table(self._tables.get(step, table), self.run_dir, step)

    def _keep_table_before(self, step: int) -> None:
        """Keep the table for a checkpoint that is written while batches ahead of it are made."""
        if self.config.weights.reestimate is Reestimation.free:
            oldest = step - self.config.rollout.steps_ahead
            self._tables = {k: t for k, t in self._tables.items() if k >= oldest}
            self._tables[step] = self.table

    def without_signal(self, cache: SignalCache) -> tuple[list[TrainItem], int]:
        """Stored responses to train on that have no teacher signal yet, and how many there are."""
        by_id = weights_with_references(self.table.weights(), self.references)
        problems = [problem for problem in self.problems if by_id[problem.id] > 0]
        items = build_items(
            problems,
            [by_id[problem.id] for problem in problems],
            [self.references[problem.id] for problem in problems],
            prompts=self.prompts,
            reduction=self.config.loss.reduction.value,
        )
        return [item for item in items if not cache.has(item)], len(items)

    def uncached_references(self, cache: SignalCache) -> Iterator[Batch]:
        """Yield the items of :meth:`without_signal` in batches."""
        missing, of_all = self.without_signal(cache)
        logger.info("teacher cache: %d of %d responses to compute", len(missing), of_all)
        size = self.config.model.global_batch_size
        with bar_task(self.log.bar, "teacher signals", len(missing)) as advance:
            for begin in range(0, len(missing), size):
                yield Batch(missing[begin : begin + size], {})
                advance(min(begin + size, len(missing)), len(missing))

    def certificate_batch(self, step: int, consumed: int) -> Batch:
        """The batch of the FP8 certificate: the first problems in order, each of weight 1."""
        order = self.order.take(consumed, len(self.problems))
        each = (self.problems[position] for position in order)
        usable = (p for p in each if not self.references or p.id in self.references)
        problems = list(islice(usable, self.config.teacher.fp8.certificate_problems))
        weights = [1.0] * len(problems)
        if self.references:
            responses: list[Response | None] = [self.references[p.id] for p in problems]
        else:
            responses = _aligned(self._sample_batch(problems, weights, step), problems)
        items = build_items(
            problems,
            weights,
            responses,
            prompts=self.prompts,
            reduction=self.config.loss.reduction.value,
        )
        return Batch(items, {})

    def validate(self, step: int) -> dict[str, float]:
        """mean@k of the served student on the held-out problems."""
        with bar_task(self.log.bar, f"validation at step {step}", len(self.validation)) as on:
            rollouts = self.sampler.sample(
                self.validation,
                purpose="validation",
                step=step,
                settings=prepare.evaluation_settings(self.config),
                progress=on,
            )
        accuracy = Accuracy.of(rollouts, self.validation)
        return {
            "validation/accuracy": accuracy.mean,
            "validation/standard_error": accuracy.standard_error,
        }

    def _first_table(self, resumed_from: Path | None) -> PassRateTable:
        given = self.config.weights.pass_rates
        estimates = self.config.weights.estimates
        if resumed_from is not None and (estimates or (resumed_from / PASS_RATES_FILE).exists()):
            table = PassRateTable.read(resumed_from / PASS_RATES_FILE, self.problems)
        elif given:
            found = PassRateTable.read(Path(given), self.problems)
            found.check_estimator(self.config.weights, Path(given))
            table = found.reweighted(self.config.weights)
        elif not estimates:
            return PassRateTable.unknown(self.problems)
        else:
            return prepare.estimate_pass_rates(
                self.config, self.problems, self.sampler, self.run_dir, step=0, bar=self.log.bar
            )
        prepare.save_table(table, self.run_dir, table.student_step)
        return table

    def _sample_batch(
        self, problems: list[Problem], weights: list[float], step: int, *, explore: bool = False
    ) -> list[Rollout]:
        """One rollout of each problem that has a weight, or is explored."""
        # token_mean divides by the response tokens of the whole batch, weight 0 included
        everything = self.config.loss.reduction is Reduction.token_mean
        wanted = {
            problem.id: problem
            for problem, weight in zip(problems, weights, strict=True)
            if weight > 0 or everything or (explore and self._explored(problem, step))
        }
        if not wanted:
            return []
        return list(
            self.sampler.sample(
                list(wanted.values()),
                purpose="train",
                step=step,
                settings=SamplingSettings(
                    num_samples=1,
                    temperature=self.config.rollout.temperature,
                    top_p=self.config.rollout.top_p,
                    max_tokens=self.config.data.max_response_length,
                ),
            )
        )

    def _explored(self, problem: Problem, step: int) -> bool:
        """Whether a problem is sampled for its pass rate alone; the same in a resumed run."""
        draw = sampling_seed(self.config.model.seed, "exploration", step, problem.id, 0)
        return draw < self.config.weights.exploration * 2**31

    def _rollout_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        if not rollouts:
            return {}
        metrics = {
            "rollout/wrong": _share(rollouts, Outcome.wrong),
            "rollout/no_answer": _share(rollouts, Outcome.unanswered),
            "rollout/cut_before_answer": _share(rollouts, Outcome.truncated),
            "rollout/timed_out": _share(rollouts, Outcome.timed_out),
            "rollout/truncated": statistics.fmean(r.truncated for r in rollouts),
            "rollout/mean_length": statistics.fmean(len(r.response_ids) for r in rollouts),
        }
        if judged := [r for r in rollouts if r.has_verdict]:
            metrics["rollout/accuracy"] = _share(judged, Outcome.right)
        if self.prompts.thoughts:
            found = [self.prompts.thoughts.length(r.response_ids) for r in rollouts]
            metrics["rollout/mean_thinking_length"] = statistics.fmean(n for n, _ in found)
            metrics["rollout/unfinished_thoughts"] = statistics.fmean(not ends for _, ends in found)
        return metrics


def _share(rollouts: list[Rollout], outcome: Outcome) -> float:
    return statistics.fmean(rollout.outcome is outcome for rollout in rollouts)


def _aligned(rollouts: list[Rollout], problems: list[Problem]) -> list[Response | None]:
    by_id = {rollout.problem_id: rollout for rollout in rollouts}
    return [by_id.get(problem.id) for problem in problems]
