import numpy as np
import pytest

from nemo_paced.errors import ConfigError
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.theory import (
    efficiency,
    minimax_efficiency,
    minimax_weight,
    moment_matched_exponents,
    optimal_weight,
    variance_ratio,
)


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


def test_each_pass_rate_may_have_its_own_number_of_rollouts():
    rates, counts = [0.5, 0.125, 1.0, 0.25, 0.05], [2, 8, 64, 4, 10]
    found = moment_matched_exponents(rates, counts)
    assert found == moment_matched_exponents([0.5, 0.125, 0.25], 8)


def test_a_negative_exponent_is_cut_at_0_and_said_to_be():
    mean, ratio = 0.3, 0.3 / 1.3
    edge = mean * (1 - mean) * ratio
    assert moment_matched_exponents(spread(mean, 1.02 * edge), 1000).clipped
    within = moment_matched_exponents(spread(mean, 0.98 * edge), 1000)
    assert not within.clipped and within.alpha > 0


@pytest.mark.parametrize("rates", [[0.0, 1.0], [0.5, 0.5, 0.0], [0.3] * 3, []])
def test_no_spread_is_refused(rates):
    with pytest.raises(ConfigError, match="no two of them differ"):
        moment_matched_exponents(rates, num_rollouts=8)


@pytest.mark.parametrize(
    ("delta", "kept"), [(0.0, 1.0), (0.1, 0.990), (0.3, 0.915), (0.5, 0.786), (np.log(2), 0.64)]
)
def test_minimax_efficiency_is_the_papers(delta, kept):
    assert minimax_efficiency(delta) == pytest.approx(kept, abs=6e-4)
    assert minimax_efficiency(delta) >= 1 - delta**2


def test_the_best_weight_maximises_the_bound_on_descent():
    """By search: eta w m - eta^2/2 w^2 (m + v) lambda_max, m = ||E g||^2, v = tr Cov g."""
    weights = np.linspace(0, 20, 200_001)
    found = []
    for mean, variance in ((4.0, 1.0), (1.0, 1.0), (0.1, 3.0)):
        bound = 0.1 * weights * mean - 0.005 * weights**2 * (mean + variance)
        found.append(weights[bound.argmax()])
        expected = 10 * optimal_weight(mean / variance)
        assert found[-1] == pytest.approx(expected, abs=2e-4)
        half = 0.1 * expected / 2 * mean - 0.005 * (expected / 2) ** 2 * (mean + variance)
        assert half / bound.max() == pytest.approx(efficiency(0.5), abs=1e-6)


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.2])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_no_weight_does_better_in_the_worst_case_than_the_minimax_one(delta, rate):
    """Brute force over weights against every w* = p (1-p)^2 phi, |log phi| <= delta."""
    phis = np.exp(np.linspace(-delta, delta, 401))
    best = beta_weight(rate, 1.0, 2.0) * phis
    weights = np.linspace(0, 2, 4001) * beta_weight(rate, 1.0, 2.0)
    worst = efficiency(weights[:, None] / best).min(axis=1)
    chosen = minimax_weight(rate, delta, 1.0, 2.0)
    assert weights[worst.argmax()] == pytest.approx(chosen, abs=6e-4 * weights.max())
    assert efficiency(chosen / best).min() == pytest.approx(minimax_efficiency(delta), abs=1e-9)
    assert worst.max() <= minimax_efficiency(delta) + 1e-9


@pytest.mark.parametrize(("signal", "ratio"), [(0.25, 0.844), (0.34, 0.999), (0.5, 1.2)])
def test_variance_ratio_is_the_papers(signal, ratio):
    assert variance_ratio(1, 1, signal, signal, 1, 1) == pytest.approx(ratio, abs=6e-4)


def test_variance_ratio_is_what_drawn_gradients_show():
    """Weighted over unweighted noise of uniform pass rates, by quadrature."""
    rate = (np.arange(1_000_000) + 0.5) / 1_000_000
    weight = beta_weight(rate, 1.5, 0.5)
    noise = rate ** (2 * 0.8 - 1.2) * (1 - rate) ** (2 * 0.4 - 0.3)
    expected = (weight**2 * noise).mean() / (weight.mean() ** 2 * noise.mean())
    assert variance_ratio(1.5, 0.5, 0.8, 0.4, 1.2, 0.3) == pytest.approx(expected, rel=1e-4)


def test_noise_without_a_mean_is_refused():
    with pytest.raises(ConfigError, match=r"2 b_s - b' is -1.5"):
        variance_ratio(1, 1, 1, 0.25, 1, 2)
