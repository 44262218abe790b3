"""Pass rates of a training set and the weights that follow: a table that pandas reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nemo_paced.config import WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.records import PassRate, Problem, Rollout
from nemo_paced.weights.schemes import problem_weights

COLUMNS = tuple(field.name for field in fields(PassRate))


@dataclass(frozen=True, slots=True)
class PassRateTable:
    """One row a problem, in the order of the problem file; weights have mean 1."""

    rows: tuple[PassRate, ...]

    @staticmethod
    def estimate(
        rollouts: Sequence[Rollout],
        problems: Sequence[Problem],
        config: WeightsConfig,
        *,
        student_step: int,
    ) -> PassRateTable:
        """Plug-in estimate p = c / K of every problem from graded rollouts.

        Raises:
            ConfigError: all weights would be 0.
        """
        counts = {problem.id: [0, 0] for problem in problems}
        for rollout in rollouts:
            assert rollout.correct is not None, "rollouts are graded when they are stored"
            counts[rollout.problem_id][0] += rollout.correct
            counts[rollout.problem_id][1] += 1
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

    def reweighted(self, config: WeightsConfig) -> PassRateTable:
        """The same pass rates under another weighting."""
        weights = problem_weights(config, [row.pass_rate for row in self.rows])
        return PassRateTable(
            tuple(replace(row, weight=w) for row, w in zip(self.rows, weights, strict=True))
        )

    def weights(self) -> dict[str, float]:
        return {row.id: row.weight for row in self.rows}

    def write(self, path: Path) -> None:
        """Parquet, in place of an earlier file only when whole."""
        import pandas

        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pandas.DataFrame(
            {name: [getattr(row, name) for row in self.rows] for name in COLUMNS}
        )
        temporary = path.with_name(f".{path.name}.tmp")
        frame.to_parquet(temporary, index=False)
        os.replace(temporary, path)

    @staticmethod
    def read(path: Path, problems: Sequence[Problem]) -> PassRateTable:
        """A table for exactly these problems.

        Raises:
            ConfigError: no such table, other columns, or problems that it lacks.
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
        absent = [problem.id for problem in problems if problem.id not in rows]
        if absent:
            raise ConfigError(
                f"{path} lacks {len(absent)} of the {len(problems)} problems "
                f"({', '.join(absent[:3])}): it was made from another problem file"
            )
        return PassRateTable(tuple(rows[problem.id] for problem in problems))
