"""Accuracy of graded rollouts, with the error that comes from having few problems."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_paced.errors import ConfigError
from nemo_paced.records import Problem, Rollout


@dataclass(frozen=True, slots=True)
class Accuracy:
    """mean@k of a model on a problem set.

    Attributes:
        mean: over problems of the share of right samples.
        standard_error: of ``mean``, over problems (samples of one problem are no independent
            draws: the spread taken is that of the problems' means); NaN for a single problem.
        pass_at_k: share of problems with at least one right sample among all k.
        truncated: share of samples cut at the token limit.
        mean_length: tokens of a sample.
        per_problem: share of right samples by problem id.
        groups: ``mean`` by the problems' group.
    """

    mean: float
    standard_error: float
    pass_at_k: float
    samples: int
    truncated: float
    mean_length: float
    per_problem: dict[str, float]
    groups: dict[str, float]

    @staticmethod
    def of(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> Accuracy:
        verdicts: dict[str, list[bool]] = {problem.id: [] for problem in problems}
        for rollout in rollouts:
            assert rollout.correct is not None, "rollouts are graded when they are stored"
            verdicts[rollout.problem_id].append(rollout.correct)
        means = {name: statistics.fmean(values) for name, values in verdicts.items()}
        groups: dict[str, list[float]] = {}
        for problem in problems:
            groups.setdefault(problem.group, []).append(means[problem.id])
        return Accuracy(
            mean=statistics.fmean(means.values()),
            standard_error=standard_error(list(means.values())),
            pass_at_k=statistics.fmean(any(values) for values in verdicts.values()),
            samples=len(rollouts) // len(means),
            truncated=statistics.fmean(rollout.truncated for rollout in rollouts),
            mean_length=statistics.fmean(len(rollout.response_ids) for rollout in rollouts),
            per_problem=means,
            groups={name: statistics.fmean(values) for name, values in sorted(groups.items())},
        )

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, k <= samples: mean over problems of 1 - C(n - c, k) / C(n, k)."""
        n = self.samples
        assert 1 <= k <= n, f"pass@{k} cannot be estimated from {n} samples a problem"
        wrong = [n - round(share * n) for share in self.per_problem.values()]
        return 1 - statistics.fmean(math.comb(w, k) / math.comb(n, k) for w in wrong)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an undefined standard error is ``None``."""
        fields = asdict(self)
        if math.isnan(self.standard_error):
            fields["standard_error"] = None
        return fields

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Accuracy:
        if fields["standard_error"] is None:
            fields = fields | {"standard_error": math.nan}
        return Accuracy(**fields)


@dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy of one model minus another's on the same problems, paired by problem."""

    mean: float
    standard_error: float

    @staticmethod
    def between(after: Accuracy, before: Accuracy) -> Difference:
        """``after`` minus ``before``.

        Raises:
            ConfigError: they were measured on different problems.
        """
        if other := sorted(set(after.per_problem) ^ set(before.per_problem)):
            raise ConfigError(
                "accuracies on different problems cannot be compared: only one of the two has "
                f"{', '.join(other[:3])}{' ...' if len(other) > 3 else ''} ({len(other)} problems)"
            )
        differences = [after.per_problem[i] - before.per_problem[i] for i in before.per_problem]
        return Difference(statistics.fmean(differences), standard_error(differences))

    def verdict(self) -> str:
        """What two standard errors allow to be said."""
        if not abs(self.mean) > 2 * self.standard_error:  # NaN claims nothing either
            return "no difference can be claimed"
        return "better" if self.mean > 0 else "worse"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent ``values``; NaN where a single one shows no spread."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / len(values) ** 0.5
