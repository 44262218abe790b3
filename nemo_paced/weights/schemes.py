"""From the pass rates of a training set to weights of mean 1 over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_paced.config import WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.weights.beta_kernel import beta_weight


def problem_weights(config: WeightsConfig, pass_rates: Sequence[float]) -> list[float]:
    """Weights by ``weights.scheme``, normalised once over the whole training set to mean 1.

    Raises:
        ConfigError: every weight is 0: nothing could be trained on.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    raw = _raw_weights(config, rates)
    total = raw.sum()
    if total == 0:
        raise ConfigError(_no_weight(config, rates))
    return (raw * (len(raw) / total)).tolist()


def _raw_weights(config: WeightsConfig, rates: np.ndarray) -> np.ndarray:
    if config.scheme is WeightScheme.unweighted:
        return np.ones_like(rates)
    if config.scheme is WeightScheme.hard_filter:
        return ((rates >= config.low) & (rates <= config.high)).astype(np.float64)
    return beta_weight(rates, alpha=config.alpha, beta=config.beta)


def _no_weight(config: WeightsConfig, rates: np.ndarray) -> str:
    zeros, ones = int((rates == 0).sum()), int((rates == 1).sum())
    return (
        f"weights.scheme {config.scheme.value} gives all {len(rates)} problems weight 0: {zeros} "
        f"have pass rate 0 and {ones} have 1. Choose problems that the student solves sometimes, "
        "raise weights.num_rollouts, check the verifier (grading.verifier) and the prompt on a few "
        "rollouts, or set weights.scheme=unweighted"
    )
