"""Table of the pass rates of a training set and the weights that follow, kept as Parquet.

``num_correct`` and ``num_rollouts`` count all rollouts with a verdict since the last full estimate,
``effective_correct`` and ``effective_rollouts`` are discounted counts, the same where nothing was
discounted; ``pass_rate`` is their quotient and the weight is a function of them alone. (Under
adaptive sampling the quotient leans to the ends, since a problem is left alone once it looks
settled; the posterior weight does not mind how sampling was stopped.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_paced.config import Estimator, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.files import replacing
from nemo_paced.records import Outcome, PassRate, Problem, Rollout
from nemo_paced.weights.schemes import problem_weights
from nemo_paced.weights.summary import drift_metrics

if TYPE_CHECKING:
    import pandas

COLUMNS = tuple(field.name for field in fields(PassRate))
_OUTCOMES = ("num_truncated", "num_unanswered", "num_timed_out")  # earlier tables lack these


@dataclass(frozen=True, slots=True, eq=False)
class PassRateTable:
    """Pass rates and weights of problems, in the order of the problem file; weights have mean 1.

    Attributes:
        frame: by problem id, with the other fields of :class:`~nemo_paced.records.PassRate` as
            columns: a training set may have a million problems.
    """

    frame: pandas.DataFrame

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassRateTable) and self.frame.equals(other.frame)

    def __len__(self) -> int:
        return len(self.frame)

    @staticmethod
    def of(rows: Sequence[PassRate]) -> PassRateTable:
        """The table of these rows."""
        columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
        return PassRateTable(_frame(columns.pop("id"), columns))

    @staticmethod
    def estimate(
        rollouts: Iterable[Rollout],
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
        correct, count, *others = np.array(list(counts.values())).T
        frame = _counted(list(counts), correct, count, correct, count, others)
        return _weighted(frame, config, student_step)

    @staticmethod
    def unknown(problems: Sequence[Problem]) -> PassRateTable:
        """The table of an unweighted run that estimates nothing: weight 1, pass rates NaN."""
        ids = [problem.id for problem in problems]
        nothing = np.zeros(len(ids), dtype=np.int64)
        frame = _counted(ids, nothing, nothing, nothing, nothing, [nothing] * len(_OUTCOMES))
        return PassRateTable(frame.assign(pass_rate=math.nan, weight=1.0))

    @property
    def rows(self) -> tuple[PassRate, ...]:
        """The table row by row."""
        columns = [self.frame.index.tolist(), *(self.frame[n].tolist() for n in COLUMNS[1:])]
        return tuple(PassRate(*row) for row in zip(*columns, strict=True))

    @property
    def student_step(self) -> int:
        """Optimizer steps that the student had taken at the latest estimate."""
        return int(self.frame["student_step"].iloc[0])

    @property
    def pass_rates(self) -> np.ndarray:
        """Pass rate of each problem, in order."""
        return self.frame["pass_rate"].to_numpy()

    @property
    def is_unknown(self) -> bool:
        """Whether no pass rate was ever estimated."""
        return not self.frame["num_rollouts"].any()

    def reweighted(self, config: WeightsConfig) -> PassRateTable:
        """The table with the same pass rates and the weights that ``config`` gives.

        Raises:
            ConfigError: all weights would be 0.
        """
        return _weighted(self.frame, config, self.student_step)

    def updated(
        self, rollouts: Sequence[Rollout], config: WeightsConfig, *, student_step: int
    ) -> PassRateTable:
        """The table after some more graded rollouts of some of its problems.

        Each rollout multiplies its problem's earlier counts by ``weights.discount`` before it is
        added; other problems keep theirs. All weights change, since their mean stays 1.

        Raises:
            ConfigError: all weights would be 0.
        """
        frame, index = self.frame, self.frame.index
        names = (*COLUMNS[1:5], *_OUTCOMES)
        columns = [frame[name].to_numpy(copy=True) for name in names]
        correct, count, right, all_, *others = columns
        for rollout in rollouts:
            if rollout.problem_id not in index:
                continue
            at = index.get_loc(rollout.problem_id)
            for column, is_one in zip(others, _outcomes(rollout), strict=True):
                column[at] += is_one
            if not rollout.has_verdict:
                continue
            correct[at] += rollout.correct
            count[at] += 1
            right[at] = config.discount * right[at] + rollout.correct
            all_[at] = config.discount * all_[at] + 1
        counted = _counted(index, correct, count, right, all_, others)
        return _weighted(counted, config, student_step)

    def check_estimator(self, config: WeightsConfig, where: Path) -> None:
        """Refuse counts that ``weights.estimator`` cannot be fair with.

        A few rollouts that have no verdict make no difference: K is what was asked for.

        Raises:
            ConfigError: unequal numbers of rollouts and the plug-in estimate, whose mean is
                (1-1/K) p(1-p) at alpha = beta = 1: problems of larger K would weigh more.
        """
        counts = self.frame["effective_rollouts"] + self.frame["num_timed_out"]
        if config.estimator is Estimator.plug_in and counts.nunique() > 1:
            raise ConfigError(
                f"{where} holds {counts.min():g} to {counts.max():g} rollouts a problem and "
                "weights.estimator is plug_in, which is biased then; set "
                "weights.estimator=posterior, or estimate anew with `pass-rates`"
            )

    def drift(self) -> dict[str, float]:
        """Metrics of the whole table, see :func:`~nemo_paced.weights.summary.drift_metrics`.

        None where no pass rate is known.
        """
        if self.is_unknown:
            return {}
        return drift_metrics(self.pass_rates.tolist(), self.frame["weight"].tolist())

    def weights(self) -> dict[str, float]:
        """Weight by problem id."""
        return dict(zip(self.frame.index.tolist(), self.frame["weight"].tolist(), strict=True))

    def write(self, path: Path) -> None:
        """Write the table as Parquet, in place of an earlier file only when whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            self.frame.reset_index().to_parquet(temporary, index=False)

    @staticmethod
    def read(path: Path, problems: Sequence[Problem] | None = None) -> PassRateTable:
        """Read the rows of exactly these problems, in their order; all rows without ``problems``.

        Raises:
            ConfigError: no such table, other columns, no row, a problem twice, or problems that it
                lacks.
        """
        import pandas

        try:
            read = pandas.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no pass-rate table that can be read: {error}") from error
        read = read.assign(**{name: 0 for name in _OUTCOMES if name not in read.columns})
        if missing := set(COLUMNS) - set(read.columns):
            raise ConfigError(f"{path} lacks the columns {', '.join(sorted(missing))}")
        if read.empty:
            raise ConfigError(f"{path} holds no problem: estimate anew with `pass-rates`")
        columns = {name: _numbers(read[name], name, path) for name in COLUMNS[1:]}
        frame = _frame(read["id"].astype(str).tolist(), columns)
        if (twice := frame.index[frame.index.duplicated()]).size:
            raise ConfigError(f"{path} holds problem {twice[0]!r} twice: estimate anew")
        if problems is None:
            return PassRateTable(frame)
        ids = [problem.id for problem in problems]
        places = frame.index.get_indexer(ids)
        if len(absent := np.flatnonzero(places < 0)):
            raise ConfigError(
                f"{path} lacks {len(absent)} of the {len(ids)} problems "
                f"({', '.join(ids[each] for each in absent[:3])}): it was made from another "
                "problem file"
            )
        return PassRateTable(frame.take(places))


def _frame(ids: Sequence[str], columns: dict[str, Any]) -> pandas.DataFrame:
    import pandas

    index = ids if isinstance(ids, pandas.Index) else pandas.Index(ids, name="id", dtype=object)
    kinds = {name: np.int64 if name in _WHOLE else np.float64 for name in columns}
    arrays = {name: np.asarray(value, dtype=kinds[name]) for name, value in columns.items()}
    return pandas.DataFrame(arrays, index=index)


_WHOLE = ("num_correct", "num_rollouts", "student_step", *_OUTCOMES)


def _numbers(values: pandas.Series, name: str, path: Path) -> np.ndarray:
    """A column of numbers.

    Raises:
        ConfigError: something in it is none, or not whole where counts are; a pass rate may be
            unknown.
    """
    try:
        numbers = values.to_numpy(dtype=np.float64, na_value=math.nan)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}, column {name}: {error}") from error
    unknown = np.isnan(numbers) & (name != "pass_rate")
    broken = (numbers % 1 != 0) & (name in _WHOLE)
    if len(wrong := np.flatnonzero(unknown | broken)):
        raise ConfigError(
            f"{path}, column {name}: row {wrong[0] + 1} holds {numbers[wrong[0]]:g}; estimate anew "
            "with `pass-rates`"
        )
    return numbers


def _counts(rollouts: Iterable[Rollout], problems: Sequence[Problem]) -> dict[str, list[int]]:
    """Numbers of rollouts that are right, that have a verdict, and by outcome, by problem id."""
    counts = {problem.id: [0] * (2 + len(_OUTCOMES)) for problem in problems}
    for rollout in rollouts:
        of = counts[rollout.problem_id]
        found = (rollout.correct, rollout.has_verdict, *_outcomes(rollout))
        for place, is_one in enumerate(found):
            of[place] += is_one
    return counts


def _outcomes(rollout: Rollout) -> tuple[bool, ...]:
    """Which of ``_OUTCOMES`` a rollout counts in."""
    assert rollout.outcome is not None, "rollouts are graded when they are stored"
    named = (Outcome.truncated, Outcome.unanswered, Outcome.timed_out)
    return tuple(rollout.outcome is outcome for outcome in named)


def _counted(
    ids: Sequence[str],
    num_correct: np.ndarray,
    num_rollouts: np.ndarray,
    effective_correct: np.ndarray,
    effective_rollouts: np.ndarray,
    outcomes: Sequence[np.ndarray],
) -> pandas.DataFrame:
    """Rows of these counts, without weights yet."""
    nothing = np.zeros(len(ids))
    with np.errstate(invalid="ignore"):  # of no rollout there is no rate
        rates = effective_correct / effective_rollouts
    counts = (num_correct, num_rollouts, effective_correct, effective_rollouts)
    values = (*counts, rates, nothing, nothing, *outcomes)
    return _frame(ids, dict(zip(COLUMNS[1:], values, strict=True)))


def _weighted(frame: pandas.DataFrame, config: WeightsConfig, student_step: int) -> PassRateTable:
    weights = problem_weights(config, frame["effective_correct"], frame["effective_rollouts"])
    return PassRateTable(frame.assign(weight=weights, student_step=student_step))
