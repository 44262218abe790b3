"""Sampling of pass rates in rounds: the verdicts so far decide which problems are asked again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nemo_paced.config import WeightsConfig
from nemo_paced.records import Problem, Rollout
from nemo_paced.weights.adaptive import allocate, expected_error

logger = logging.getLogger(__name__)

# Returns graded rollouts of every problem: by id, how many are wanted, those that exist included.
SampleCounts = Callable[[Mapping[str, int]], Sequence[Rollout]]


def sample_in_rounds(
    problems: Sequence[Problem], sample: SampleCounts, config: WeightsConfig
) -> Sequence[Rollout]:
    """Spend ``weights.num_rollouts`` a problem, in the mean, where they help the weights most.

    Every decision follows from the rollouts of the rounds before, and ``sample`` asks only for what
    the store lacks. So an interrupted estimate goes through the same rounds again without asking
    twice, and one with a larger budget goes on from where a smaller one stopped.

    Returns:
        The graded rollouts of all rounds.
    """
    adaptive = config.adaptive
    ids = [problem.id for problem in problems]
    budget = config.num_rollouts * len(ids)
    per_round = max(1, round(adaptive.rollouts_per_round * len(ids)))
    wanted = np.full(len(ids), adaptive.initial_rollouts)
    while True:
        rollouts = sample(dict(zip(ids, wanted.tolist(), strict=True)))
        state = _counts(rollouts, ids)
        error = expected_error(config, *state)
        logger.info(
            "adaptive pass rates: %.2f rollouts a problem, expected RMS error of a weight %.3f",
            wanted.mean(), error,
        )  # fmt: skip
        left = min(per_round, budget - int(wanted.sum()))
        more = allocate(config, *state, left, num_asked=wanted)
        if error <= adaptive.target_error or not more.any():
            return rollouts
        wanted = wanted + more


def _counts(rollouts: Sequence[Rollout], ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of right rollouts and of those with a verdict, ``[problems]``."""
    correct, count = dict.fromkeys(ids, 0.0), dict.fromkeys(ids, 0.0)
    for rollout in rollouts:
        correct[rollout.problem_id] += rollout.correct
        count[rollout.problem_id] += rollout.has_verdict
    return np.array([correct[name] for name in ids]), np.array([count[name] for name in ids])
