"""Accuracy of graded rollouts, with the error that comes from having few problems."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nemo_paced.errors import ConfigError
from nemo_paced.files import without_nan
from nemo_paced.grading.notation import normalize
from nemo_paced.grading.verdicts import Verdicts, shares
from nemo_paced.records import Outcome, Problem, Rollout

LEVEL = 0.05  # significance level of the exact test behind a verdict
RIGHT = "right"  # the vote of a right answer
# Steps that a difference of 1 is counted in: exact for means of k up to 6, and of 8, 10, 12, 16,
# 32, 64 samples. A metric of lm-eval whose differences exceed 1 gets as many for the largest one:
# memory grows with them.
STEPS = 960


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy (mean@k) of a model on a problem set, or on an lm-eval task (one answer a question).

    Attributes:
        mean: over problems, of the share of right samples.
        standard_error: of ``mean``, over problems (samples of one problem are no independent
            draws: the spread taken is that of the problems' means); NaN for a single problem.
        pass_at_k: share of problems with at least one right sample among all k.
        samples: k.
        truncated: share of samples cut at the token limit; of lm-eval's prompts, of those that
            lost their beginning to the context.
        mean_length: tokens of a sample; NaN where none was generated.
        per_problem: share of right samples by problem id.
        groups: ``mean`` by the problems' group.
        p95_length: tokens that 95 % of the samples do not exceed; NaN likewise.
        majority: share of problems whose most frequent answer is right (maj@k), ties by lot; NaN
            where the verifier reads no answer out of a response.
        metric: lm-eval's name of what is averaged (``acc``); empty for sampled responses.
        outcomes: share of the samples by :class:`~nemo_paced.records.Outcome`, those there are. A
            sample without a verdict is none that is right.
        right_by: share of the right samples by what their answer was read by.
    """

    mean: float
    standard_error: float
    pass_at_k: float
    samples: int
    truncated: float
    mean_length: float
    per_problem: dict[str, float]
    groups: dict[str, float]
    p95_length: float = math.nan
    majority: float = math.nan
    metric: str = ""
    outcomes: dict[str, float] = field(default_factory=dict)
    right_by: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(rollouts: Iterable[Rollout], problems: Sequence[Problem]) -> Accuracy:
        """Accuracy from graded rollouts, equally many (k) of every problem.

        Args:
            rollouts: looked at once, one after the other.
        """
        votes: dict[str, list[str | None]] = {problem.id: [] for problem in problems}
        lengths: list[int] = []
        truncated, answered, verdicts = 0, False, Verdicts()
        for rollout in rollouts:
            verdicts.add(rollout)
            votes[rollout.problem_id].append(_vote(rollout))
            lengths.append(len(rollout.response_ids))
            truncated += rollout.truncated
            answered |= rollout.extracted is not None
        lengths.sort()
        means = {
            name: statistics.fmean(vote == RIGHT for vote in cast) for name, cast in votes.items()
        }
        return Accuracy(
            mean=statistics.fmean(means.values()),
            standard_error=standard_error(list(means.values())),
            pass_at_k=statistics.fmean(share > 0 for share in means.values()),
            samples=len(lengths) // len(means),
            truncated=truncated / len(lengths),
            mean_length=statistics.fmean(lengths),
            per_problem=means,
            groups=group_means(means, {problem.id: problem.group for problem in problems}),
            p95_length=lengths[math.ceil(0.95 * len(lengths)) - 1],
            majority=(
                statistics.fmean(majority_is_right(cast) for cast in votes.values())
                if answered
                else math.nan
            ),
            outcomes={each.value: s for each in Outcome if (s := verdicts.share(each))},
            right_by=shares(verdicts.by("evidence", Outcome.right)),
        )

    @staticmethod
    def of_answers(
        values: dict[str, float], groups: dict[str, str], *, metric: str, truncated: float
    ) -> Accuracy:
        """Accuracy from one value a question, as lm-eval scores it.

        Args:
            values: lm-eval's score by question id.
            groups: label to report accuracies by, by question id.
            metric: lm-eval's name of the score.
            truncated: share of prompts that lost their beginning.
        """
        mean = statistics.fmean(values.values())
        return Accuracy(
            mean=mean,
            standard_error=standard_error(list(values.values())),
            pass_at_k=mean,
            samples=1,
            truncated=truncated,
            mean_length=math.nan,
            per_problem=values,
            groups=group_means(values, groups),
            metric=metric,
        )

    def pass_at(self, k: int) -> Estimate:
        """Unbiased pass@k, k <= samples: mean over problems of 1 - C(n - c, k) / C(n, k).

        With its standard error over problems; c of a problem's n samples are right.
        """
        n = self.samples
        assert 1 <= k <= n, f"pass@{k} cannot be estimated from {n} samples a problem"
        wrong = [n - round(share * n) for share in self.per_problem.values()]
        values = [1 - math.comb(w, k) / math.comb(n, k) for w in wrong]
        return Estimate(statistics.fmean(values), standard_error(values))

    @property
    def pass_at_powers(self) -> dict[int, Estimate]:
        """pass@k for k = 1, 2, 4, ... and all samples; empty for lm-eval's tasks."""
        if self.metric:
            return {}
        powers = {1 << i for i in range(self.samples.bit_length())} | {self.samples}
        return {k: self.pass_at(k) for k in sorted(powers) if k <= self.samples}

    def plus_minus(self) -> str:
        """Mean and standard error, where there is one, as text: ``0.512 ± 0.021``."""
        error = self.standard_error
        return f"{self.mean:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON, which has no NaN: what is undefined is ``None``; with pass@k by k."""
        return without_nan(
            asdict(self) | {"pass_at": {str(k): asdict(e) for k, e in self.pass_at_powers.items()}}
        )

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Accuracy:
        """The accuracy that :meth:`to_dict` turned into ``fields``."""
        known: dict[str, Any] = {
            name: math.nan if value is None else value
            for name, value in fields.items()
            if name != "pass_at"
        }
        return Accuracy(**known)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its standard error over problems."""

    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy of one model minus another's on the same problems, paired by problem.

    Attributes:
        mean: over problems.
        standard_error: of ``mean``, from the spread of the problems' differences; for one answer a
            problem it is that of McNemar's test, from the answers that changed.
        p_value: of the hypothesis of no difference, see :func:`sign_flip_p_value`.
        gained: problems with a larger share of right samples.
        lost: problems with a smaller one.
    """

    mean: float
    standard_error: float
    p_value: float
    gained: int = 0
    lost: int = 0

    @staticmethod
    def between(after: Accuracy, before: Accuracy) -> Difference:
        """Accuracy of ``after`` minus that of ``before``.

        Raises:
            ConfigError: they were measured on different problems.
        """
        if other := sorted(set(after.per_problem) ^ set(before.per_problem)):
            raise ConfigError(
                "accuracies on different problems cannot be compared: only one of the two has "
                f"{', '.join(other[:3])}{' ...' if len(other) > 3 else ''} ({len(other)} problems)"
            )
        differences = [after.per_problem[i] - before.per_problem[i] for i in before.per_problem]
        return Difference(
            statistics.fmean(differences),
            standard_error(differences),
            sign_flip_p_value(differences),
            gained=sum(value > 0 for value in differences),
            lost=sum(value < 0 for value in differences),
        )

    @property
    def interval(self) -> tuple[float, float]:
        """``mean`` less and plus two standard errors: about 95 % for some thirty problems and more.

        NaN where all problems differ alike: they show no spread, and the mean is not exact for it.
        """
        if self.standard_error == 0:
            return math.nan, math.nan
        return self.mean - 2 * self.standard_error, self.mean + 2 * self.standard_error

    def verdict(self) -> str:
        """Better, worse, or no difference: what two standard errors and the exact test both allow.

        Where few problems changed, two standard errors are too narrow (4 lost and none gained have
        p = 0.125).
        """
        clear = abs(self.mean) > 2 * self.standard_error  # NaN claims nothing either
        if not clear or self.p_value > LEVEL:
            return "no difference can be claimed"
        return "better" if self.mean > 0 else "worse"


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of paired ``differences``: share of sign flips whose mean is as far from 0.

    A flip swaps the two models on a problem; all ways to do so count. For one answer a problem this
    is McNemar's exact test. Fewer than 6 changed problems never reach
    0.05.
    """
    largest = max((abs(value) for value in differences), default=0.0)
    scale = STEPS / max(1.0, largest)
    steps = [step for value in differences if (step := round(value * scale))]
    unit = math.gcd(*steps)  # at k = 1 all steps have one size
    sizes = [abs(step) // unit for step in steps]
    total, observed = sum(sizes), abs(sum(steps)) // (unit or 1)
    chance = np.zeros(total + 1)  # probability of so much being gained and the rest lost
    chance[0] = 1
    for size in sizes:
        chance /= 2
        chance[size:] += chance[:-size].copy()
    far = abs(2 * np.arange(total + 1) - total) >= observed
    return float(chance[far].sum())


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent ``values``; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / len(values) ** 0.5


def group_means(values: dict[str, float], groups: dict[str, str]) -> dict[str, float]:
    """Mean of the values of each group; ``values`` and ``groups`` are by id."""
    by_group: dict[str, list[float]] = {}
    for name, value in values.items():
        by_group.setdefault(groups[name], []).append(value)
    return {name: statistics.fmean(found) for name, found in sorted(by_group.items())}


def majority_is_right(votes: Sequence[str | None]) -> float:
    """1 when the samples' most frequent answer is right, 0 when it is not, its chance in a tie.

    Args:
        votes: of one problem: ``RIGHT``, another answer, or ``None`` of a response without one.
    """
    cast = Counter(vote for vote in votes if vote is not None)
    right = cast.pop(RIGHT, 0)
    if not right or right < max(cast.values(), default=0):
        return 0.0
    return 1 / (1 + sum(count == right for count in cast.values()))


def _vote(rollout: Rollout) -> str | None:
    """What a response answers: right answers are one, however written; wrong ones are normalised.

    A response without an answer, or without a verdict, has no vote.
    """
    if rollout.correct:
        return RIGHT
    if rollout.extracted is None or not rollout.has_verdict:
        return None
    return f"wrong: {normalize(rollout.extracted)}"
