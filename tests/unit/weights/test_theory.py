import numpy as np
import pytest

from nemo_paced.errors import ConfigError
from nemo_paced.weights.theory import moment_matched_exponents


def spread(mean, variance):
    """Pass rates of exactly this mean and variance."""
    return [mean - variance**0.5, mean + variance**0.5]


@pytest.mark.parametrize(("variance", "exponent"), [(1 / 20, 1.0), (1 / 12, 0.0)])
def test_the_papers_examples(variance, exponent):
    found = moment_matched_exponents(spread(0.5, variance), num_rollouts=1000)
    assert (found.alpha, found.beta) == pytest.approx((exponent, exponent), abs=1e-9)
    assert found.mean == pytest.approx(0.5) and found.variance == pytest.approx(variance)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 2.0), (3.0, 0.5)])
def test_pass_rates_that_follow_the_kernel_give_its_exponents_back(alpha, beta):
    rates = np.random.default_rng(0).beta(alpha + 1, beta + 1, size=400_000)
    found = moment_matched_exponents(rates, num_rollouts=1e9)
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta), abs=0.03)
    assert not found.clipped


def test_only_pass_rates_between_one_right_and_one_wrong_count():
    inside = [1 / 8, 0.5, 7 / 8, 0.5, 3 / 8]
    found = moment_matched_exponents([0.0, 1.0, *inside, 1.0], num_rollouts=8)
    assert found.num_problems == 5
    assert found == moment_matched_exponents(inside, num_rollouts=8)


def test_a_negative_exponent_is_cut_at_0_and_said_to_be():
    mean, ratio = 0.3, 0.3 / 1.3
    edge = mean * (1 - mean) * ratio
    assert moment_matched_exponents(spread(mean, 1.02 * edge), 1000).clipped
    within = moment_matched_exponents(spread(mean, 0.98 * edge), 1000)
    assert not within.clipped and within.alpha > 0


@pytest.mark.parametrize("rates", [[0.0, 1.0], [0.5, 0.5, 0.0], []])
def test_no_spread_is_refused(rates):
    with pytest.raises(ConfigError, match="no two of them differ"):
        moment_matched_exponents(rates, num_rollouts=8)
