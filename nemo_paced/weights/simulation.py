"""Simulation of how wrong weights are after so many rollouts, by estimator; it needs no model.

It draws true pass rates, then verdicts, and compares the weights that follow from the verdicts with
those that follow from the truth; both have mean 1, so an error of 0.3 is 30 % of a mean weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from nemo_paced.config import Estimator, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.weights.adaptive import allocate
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.schemes import problem_weights

# Draws the true pass rates of n problems, float64 [n].
Draw = Callable[[np.random.Generator, int], np.ndarray]

MIN_ROLLOUTS, MAX_ROLLOUTS = 2, 16
REFERENCE_ROLLOUTS = 8  # the paper's K: rollouts are saved against its plug-in estimate
PROBLEMS_AT_LEAST = 10


def _step_0_of_the_paper(rng: np.random.Generator, n: int) -> np.ndarray:
    """Pass rates of the paper's step 0: 17 % below 0.2, 51 % between, 32 % above 0.8.

    They are even within each part, so of mean .56 (paper: .61).
    """
    edges = np.array([0.0, 0.2, 0.8, 1.0])
    part = rng.choice(3, size=n, p=[0.17, 0.51, 0.32])
    return edges[part] + (edges[part + 1] - edges[part]) * rng.random(n)


DISTRIBUTIONS: dict[str, Draw] = {
    "uniform": lambda rng, n: rng.random(n),
    "paper, step 0": _step_0_of_the_paper,
    "U-shaped, Beta(.4, .4)": lambda rng, n: rng.beta(0.4, 0.4, n),
}


def from_counts(
    num_correct: np.ndarray, num_rollouts: np.ndarray, prior: tuple[float, float]
) -> Draw:
    """Draw of the true pass rates that may lie behind a table: from its problems' posteriors.

    (Taken at c / K they would be exactly 0 and 1, which no student's pass rates are.)

    Args:
        num_correct, num_rollouts: float64 arrays, one element a problem.
        prior: a0, b0.
    """

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        rows = rng.integers(len(num_correct), size=n)
        right, count = num_correct[rows], num_rollouts[rows]
        return rng.beta(right + prior[0], count - right + prior[1])

    return draw


@dataclass(frozen=True, slots=True)
class Curves:
    """RMS error of unit-mean weights against mean rollouts a problem; one row a seed.

    Attributes:
        rollouts: ``MIN_ROLLOUTS .. MAX_ROLLOUTS``, integers.
        errors: by estimator (plug-in, posterior, adaptive), ``[seeds, rollouts]``.
    """

    rollouts: np.ndarray
    errors: Mapping[str, np.ndarray]

    def needed(self, estimator: str, against: str = "plug-in") -> np.ndarray:
        """Rollouts a problem after which ``estimator`` is as good as ``against`` at K = 8, by seed.

        Interpolated linearly between whole numbers; ``MIN_ROLLOUTS`` where fewer would do, NaN
        where more than ``MAX_ROLLOUTS`` are needed.
        """
        goals = self.errors[against][:, REFERENCE_ROLLOUTS - MIN_ROLLOUTS]
        return np.array(
            [
                _first_at_most(goal, row, self.rollouts)
                for goal, row in zip(goals, self.errors[estimator], strict=True)
            ]
        )

    def saving(self, estimator: str, against: str = "plug-in") -> tuple[float, float]:
        """Share of K = 8 rollouts that ``estimator`` saves, and its standard error over seeds."""
        return mean_and_error(1 - self.needed(estimator, against) / REFERENCE_ROLLOUTS)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of one value a seed, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def simulate(
    draw: Draw, config: WeightsConfig, *, num_problems: int, num_seeds: int, seed: int
) -> Curves:
    """Error curves of the plug-in estimate, the posterior, and the posterior by adaptive rollouts.

    All three see the same verdicts of the same problems.

    Args:
        draw: of true pass rates.
        config: exponents, prior and ``adaptive``; its estimator is ignored.
        num_seeds: repetitions, each with problems and verdicts of its own.

    Raises:
        ConfigError: too few problems or seeds.
    """
    if num_problems < PROBLEMS_AT_LEAST or num_seeds < 2:
        raise ConfigError(
            f"--problems is {num_problems} and --seeds is {num_seeds}: at least "
            f"{PROBLEMS_AT_LEAST} and 2 are needed"
        )
    config = replace(config, estimator=Estimator.posterior)
    rollouts = np.arange(MIN_ROLLOUTS, MAX_ROLLOUTS + 1)
    by_seed = [
        _one_seed(draw, config, num_problems, rollouts, np.random.default_rng([seed, number]))
        for number in range(num_seeds)
    ]
    return Curves(rollouts, {name: np.array([one[name] for one in by_seed]) for name in by_seed[0]})


def _one_seed(
    draw: Draw,
    config: WeightsConfig,
    num_problems: int,
    rollouts: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    rates = draw(rng, num_problems)
    truth = beta_weight(rates, alpha=config.alpha, beta=config.beta)
    truth = truth / truth.mean()
    most = max(config.adaptive.max_rollouts, int(rollouts.max()))
    verdicts = rng.random((num_problems, most)) < rates[:, None]
    right = np.concatenate([np.zeros((num_problems, 1)), verdicts.cumsum(1)], axis=1)
    plug_in = WeightsConfig(alpha=config.alpha, beta=config.beta)

    def error(estimator: WeightsConfig, taken: np.ndarray) -> float:
        correct = np.take_along_axis(right, taken[:, None], 1)[:, 0]
        weights = np.array(problem_weights(estimator, correct.tolist(), taken.tolist()))
        return float(np.sqrt(((weights - truth) ** 2).mean()))

    fixed = [np.full(num_problems, k) for k in rollouts]
    return {
        "plug-in": [error(plug_in, taken) for taken in fixed],
        "posterior": [error(config, taken) for taken in fixed],
        "adaptive": [error(config, taken) for taken in _adaptive(config, right, rollouts)],
    }


def _adaptive(
    config: WeightsConfig, right: np.ndarray, rollouts: np.ndarray
) -> Iterator[np.ndarray]:
    """Rollouts of each problem once each mean of ``rollouts`` is spent, allocated in rounds.

    Args:
        right: right ones among each problem's first 0, 1, ... rollouts, ``[problems, max + 1]``.
    """
    num_problems = len(right)
    per_round = max(1, round(config.adaptive.rollouts_per_round * num_problems))
    taken = np.full(num_problems, config.adaptive.initial_rollouts)
    for mean in rollouts:
        if mean <= config.adaptive.initial_rollouts:
            yield np.full(num_problems, mean)
            continue
        while (left := int(mean) * num_problems - int(taken.sum())) > 0:
            correct = np.take_along_axis(right, taken[:, None], 1)[:, 0]
            more = allocate(config, correct, taken.astype(np.float64), min(left, per_round))
            if not more.any():
                break
            taken = taken + more
        yield taken


def _first_at_most(goal: float, errors: np.ndarray, rollouts: np.ndarray) -> float:
    """Rollouts at which a falling curve of errors first reaches ``goal``; NaN: never."""
    reached = np.flatnonzero(errors <= goal)
    if not len(reached):
        return float("nan")
    at = int(reached[0])
    if at == 0:
        return float(rollouts[0])
    share = (errors[at - 1] - goal) / (errors[at - 1] - errors[at])
    return float(rollouts[at - 1] + share * (rollouts[at] - rollouts[at - 1]))
