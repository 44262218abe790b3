"""Table of the pass rates of a training set and the weights that follow, kept as Parquet.

``num_correct`` and ``num_rollouts`` count all rollouts since the last full estimate,
``effective_correct`` and ``effective_rollouts`` are discounted counts, the same where nothing was
discounted; ``pass_rate`` is their quotient and the weight is a function of them alone. (Under
adaptive sampling the quotient leans to the ends, since a problem is left alone once it looks
settled; the posterior weight does not mind how sampling was stopped.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nemo_paced.config import Estimator, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.files import replacing
from nemo_paced.records import PassRate, Problem, Rollout
from nemo_paced.weights.schemes import problem_weights
from nemo_paced.weights.summary import drift_metrics

COLUMNS = tuple(field.name for field in fields(PassRate))


@dataclass(frozen=True, slots=True)
class PassRateTable:
    """Pass rates and weights of problems, in the order of the problem file; weights have mean 1."""

    rows: tuple[PassRate, ...]

    @staticmethod
    def estimate(
        rollouts: Sequence[Rollout],
        problems: Sequence[Problem],
        config: WeightsConfig,
        *,
        student_step: int,
    ) -> PassRateTable:
        """The table of graded rollouts: counts of every problem, and weights as ``config`` says.

        Args:
            rollouts: graded, at least one of every problem.
            student_step: optimizer steps that the sampled student had taken.

        Raises:
            ConfigError: all weights would be 0.
        """
        counts = _counts(rollouts, problems)
        rows = [
            PassRate(
                id=problem_id,
                num_correct=correct,
                num_rollouts=count,
                effective_correct=float(correct),
                effective_rollouts=float(count),
                pass_rate=correct / count,
                weight=0.0,
                student_step=student_step,
            )
            for problem_id, (correct, count) in counts.items()
        ]
        return PassRateTable(tuple(rows)).reweighted(config)

    @staticmethod
    def unknown(problems: Sequence[Problem]) -> PassRateTable:
        """The table of an unweighted run that estimates nothing: weight 1, pass rates NaN."""
        nothing = PassRate("", 0, 0, 0.0, 0.0, math.nan, 1.0, 0)
        return PassRateTable(tuple(replace(nothing, id=problem.id) for problem in problems))

    @property
    def is_unknown(self) -> bool:
        """Whether no pass rate was ever estimated."""
        return not any(row.num_rollouts for row in self.rows)

    def reweighted(self, config: WeightsConfig) -> PassRateTable:
        """The table with the same pass rates and the weights that ``config`` gives.

        Raises:
            ConfigError: all weights would be 0.
        """
        return _weighted(self.rows, config, self.rows[0].student_step)

    def updated(
        self, rollouts: Sequence[Rollout], config: WeightsConfig, *, student_step: int
    ) -> PassRateTable:
        """The table after some more graded rollouts of some of its problems.

        Each rollout multiplies its problem's earlier counts by ``weights.discount`` before it is
        added; other problems keep theirs. All weights change, since their mean stays 1.

        Raises:
            ConfigError: all weights would be 0.
        """
        graded: dict[str, list[bool]] = {}
        for rollout in rollouts:
            assert rollout.correct is not None, "rollouts are graded when they are stored"
            graded.setdefault(rollout.problem_id, []).append(rollout.correct)
        rows = [
            _counted(row, graded[row.id], config.discount) if row.id in graded else row
            for row in self.rows
        ]
        return _weighted(rows, config, student_step)

    def check_estimator(self, config: WeightsConfig, where: Path) -> None:
        """Refuse counts that ``weights.estimator`` cannot be fair with.

        Raises:
            ConfigError: unequal numbers of rollouts and the plug-in estimate, whose mean is
                (1-1/K) p(1-p) at alpha = beta = 1: problems of larger K would weigh more.
        """
        counts = {row.effective_rollouts for row in self.rows}
        if config.estimator is Estimator.plug_in and len(counts) > 1:
            raise ConfigError(
                f"{where} holds {min(counts):g} to {max(counts):g} rollouts a problem and "
                "weights.estimator is plug_in, which is biased then; set "
                "weights.estimator=posterior, or estimate anew with `pass-rates`"
            )

    def drift(self) -> dict[str, float]:
        """Metrics of the whole table, see :func:`~nemo_paced.weights.summary.drift_metrics`.

        None where no pass rate is known.
        """
        if self.is_unknown:
            return {}
        return drift_metrics([r.pass_rate for r in self.rows], [r.weight for r in self.rows])

    def weights(self) -> dict[str, float]:
        """Weight by problem id."""
        return {row.id: row.weight for row in self.rows}

    def write(self, path: Path) -> None:
        """Write the table as Parquet, in place of an earlier file only when whole."""
        import pandas

        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pandas.DataFrame(
            {name: [getattr(row, name) for row in self.rows] for name in COLUMNS}
        )
        with replacing(path) as temporary:
            frame.to_parquet(temporary, index=False)

    @staticmethod
    def read(path: Path, problems: Sequence[Problem] | None = None) -> PassRateTable:
        """Read the rows of exactly these problems, in their order; all rows without ``problems``.

        Raises:
            ConfigError: no such table, other columns, no row, or problems that it lacks.
        """
        import pandas

        try:
            frame = pandas.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no pass-rate table that can be read: {error}") from error
        if missing := set(COLUMNS) - set(frame.columns):
            raise ConfigError(f"{path} lacks the columns {', '.join(sorted(missing))}")
        rows = {
            record["id"]: PassRate(**{name: record[name] for name in COLUMNS})
            for record in frame.to_dict("records")
        }
        if not rows:
            raise ConfigError(f"{path} holds no problem: estimate anew with `pass-rates`")
        if problems is None:
            return PassRateTable(tuple(rows.values()))
        ids = [problem.id for problem in problems]
        if absent := [name for name in ids if name not in rows]:
            raise ConfigError(
                f"{path} lacks {len(absent)} of the {len(ids)} problems "
                f"({', '.join(absent[:3])}): it was made from another problem file"
            )
        return PassRateTable(tuple(rows[name] for name in ids))


def _counts(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> dict[str, list[int]]:
    """Numbers of right and of all rollouts, ``[right, all]``, by problem id."""
    counts = {problem.id: [0, 0] for problem in problems}
    for rollout in rollouts:
        assert rollout.correct is not None, "rollouts are graded when they are stored"
        counts[rollout.problem_id][0] += rollout.correct
        counts[rollout.problem_id][1] += 1
    return counts


def _counted(row: PassRate, verdicts: Sequence[bool], discount: float) -> PassRate:
    right, count = row.effective_correct, row.effective_rollouts
    for correct in verdicts:
        right = discount * right + correct
        count = discount * count + 1
    return replace(
        row,
        num_correct=row.num_correct + sum(verdicts),
        num_rollouts=row.num_rollouts + len(verdicts),
        effective_correct=right,
        effective_rollouts=count,
        pass_rate=right / count,
    )


def _weighted(rows: Sequence[PassRate], config: WeightsConfig, student_step: int) -> PassRateTable:
    weights = problem_weights(
        config,
        [row.effective_correct for row in rows],
        [row.effective_rollouts for row in rows],
    )
    return PassRateTable(
        tuple(
            replace(row, weight=weight, student_step=student_step)
            for row, weight in zip(rows, weights, strict=True)
        )
    )
