import numpy as np
import pytest
import torch

from nemo_paced.config import WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.posterior import posterior_weight
from nemo_paced.weights.schemes import problem_weights

CORRECT, ROLLOUTS = [0, 1, 4, 7, 8], [8] * 5


def test_the_kernel_is_p_to_alpha_times_q_to_beta():
    assert beta_weight(0.5) == 0.25
    assert beta_weight(0.25, alpha=2, beta=3) == pytest.approx(0.25**2 * 0.75**3)
    assert torch.equal(beta_weight(torch.tensor([0.0, 1.0])), torch.zeros(2))
    grid = np.linspace(0, 1, 1001)
    assert grid[np.argmax(beta_weight(grid, 2.0, 1.0))] == pytest.approx(2 / 3, abs=1e-3)
    assert beta_weight(0.0, alpha=0.0, beta=0.0) == 1.0


@pytest.mark.parametrize("scheme", list(WeightScheme))
def test_weights_have_mean_one_over_the_training_set(scheme):
    weights = problem_weights(WeightsConfig(scheme=scheme), CORRECT, ROLLOUTS)
    assert np.mean(weights) == pytest.approx(1.0)
    if scheme is WeightScheme.unweighted:
        assert weights == [1.0] * 5
    if scheme is WeightScheme.beta_kernel:
        assert weights[0] == weights[4] == 0 and weights[2] == max(weights)
    if scheme is WeightScheme.hard_filter:
        assert weights == [0, 0, 5, 0, 0]


def test_the_hard_filter_keeps_its_bounds():
    config = WeightsConfig(scheme=WeightScheme.hard_filter, low=0.125, high=0.875)
    assert problem_weights(config, CORRECT, ROLLOUTS) == pytest.approx([0, 5 / 3, 5 / 3, 5 / 3, 0])


def test_schemes_and_estimators_may_be_named_by_strings():
    config = WeightsConfig(scheme="beta_kernel", estimator="posterior")
    assert min(problem_weights(config, CORRECT, ROLLOUTS)) > 0
    with pytest.raises(ValueError, match="'posterior_mean' is not a valid Estimator"):
        WeightsConfig(estimator="posterior_mean")


def test_all_pass_rates_at_the_ends_is_an_error_that_counts_them():
    with pytest.raises(ConfigError, match=r"2\s+have pass rate 0 and 1 have 1"):
        problem_weights(WeightsConfig(), [0, 0, 4], [4] * 3)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize(("correct", "count"), [(0, 8), (3, 8), (8, 8), (0, 0)])
def test_the_posterior_weight_is_the_mean_of_the_kernel(alpha, beta, correct, count):
    grid = (np.arange(200_000) + 0.5) / 200_000
    density = grid**correct * (1 - grid) ** (count - correct)  # prior Beta(1, 1)
    expected = (beta_weight(grid, alpha, beta) * density).sum() / density.sum()
    assert posterior_weight(correct, count, alpha, beta) == pytest.approx(expected, rel=1e-5)


def test_the_posterior_weight_has_no_hard_zero():
    assert posterior_weight(0, 8) > 0
    assert posterior_weight(0, 8) == pytest.approx(posterior_weight(8, 8))
