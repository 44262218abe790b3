"""Problem weights, of mean 1 over a training set, from the counts behind its pass rates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from nemo_paced.config import Estimator, WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.weights.adaptive import prior_of
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.posterior import posterior_weight


def problem_weights(
    config: WeightsConfig, num_correct: Sequence[float], num_rollouts: Sequence[float]
) -> list[float]:
    """Problem weights by ``weights.scheme`` and ``weights.estimator``, normalised once to mean 1.

    Args:
        num_correct, num_rollouts: of every problem of the training set; may be discounted counts.
            Without any rollout, a problem has weight 0 where the estimate is the plug-in one.

    Raises:
        ConfigError: every weight is 0: nothing could be trained on.
    """
    right = np.asarray(num_correct, dtype=np.float64)
    count = np.asarray(num_rollouts, dtype=np.float64)
    rates = np.full_like(right, np.nan)
    np.divide(right, count, out=rates, where=count > 0)
    raw = _raw_weights(config, right, count, rates)
    total = raw.sum()
    if total == 0:
        raise ConfigError(_no_weight(config, rates))
    return (raw * (len(raw) / total)).tolist()


def weights_with_references(
    weights: Mapping[str, float], references: Collection[str]
) -> dict[str, float]:
    """Weights of a stage with responses=references: 0 without a reference, and again of mean 1.

    Args:
        weights: of every problem of the training set, of mean 1.
        references: ids of the problems that have a reference.

    Raises:
        ConfigError: no problem has both a weight and a reference.
    """
    dropped = weights.keys() - set(references)
    if not dropped:
        return dict(weights)
    total = sum(weight for i, weight in weights.items() if i not in dropped)
    if total == 0:
        raise ConfigError(
            f"the references of {len(dropped)} of {len(weights)} problems are dropped and the "
            "others have weight 0: nothing is left to train along; set references.wrong=keep, "
            "raise references.max_attempts, or set weights.estimator=posterior"
        )
    scale = len(weights) / total
    return {i: 0.0 if i in dropped else scale * weight for i, weight in weights.items()}


def _raw_weights(
    config: WeightsConfig, right: np.ndarray, count: np.ndarray, rates: np.ndarray
) -> np.ndarray:
    if config.scheme is WeightScheme.unweighted:
        return np.ones_like(rates)
    if config.scheme is WeightScheme.hard_filter:
        return ((rates >= config.low) & (rates <= config.high)).astype(np.float64)
    if config.estimator is Estimator.posterior:
        prior = prior_of(config, right, count)
        return posterior_weight(right, count, config.alpha, config.beta, prior)
    return np.nan_to_num(beta_weight(rates, alpha=config.alpha, beta=config.beta))


def _no_weight(config: WeightsConfig, rates: np.ndarray) -> str:
    zeros, ones = int((rates == 0).sum()), int((rates == 1).sum())
    unknown = int(np.isnan(rates).sum())
    others = f" ({unknown} have no verdict within grading.time_limit_s)" if unknown else ""
    return (
        f"weights.scheme {config.scheme.value} gives all {len(rates)} problems weight 0: {zeros} "
        f"have pass rate 0 and {ones} have 1{others}. Choose problems that the student solves "
        "sometimes, raise weights.num_rollouts, check the verifier (grading.verifier) and the "
        "prompt on a few rollouts, or set weights.scheme=unweighted"
    )
