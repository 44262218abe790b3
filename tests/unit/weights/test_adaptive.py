import numpy as np
import pytest

from nemo_paced.config import AdaptiveConfig, Estimator, WeightsConfig
from nemo_paced.weights.adaptive import allocate, expected_error, variance_reduction
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.posterior import posterior_variance, posterior_weight

ADAPTIVE = WeightsConfig(estimator=Estimator.posterior, adaptive=AdaptiveConfig(enabled=True))
EXPONENTS = [(1.0, 1.0), (2.0, 1.0), (0.5, 3.0)]
STATES = [(0.0, 2.0), (1.0, 2.0), (2.5, 9.0), (8.0, 8.0)]


def as_arrays(right, count) -> tuple[np.ndarray, np.ndarray]:
    return np.array([right], dtype=np.float64), np.array([count], dtype=np.float64)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
@pytest.mark.parametrize("prior", [(1.0, 1.0), (0.5, 2.5)])
def test_mean_and_variance_of_the_kernel_agree_with_integration(alpha, beta, prior):
    # over asin(sqrt(p)): the density of a prior below 1 is infinite at the ends
    angle = (np.arange(200_000) + 0.5) / 200_000 * np.pi / 2
    p = np.sin(angle) ** 2
    for right, count in STATES:
        a, b = right + prior[0], count - right + prior[1]
        density = np.sin(angle) ** (2 * a - 1) * np.cos(angle) ** (2 * b - 1)
        kernel = beta_weight(p, alpha, beta)
        mean = (kernel * density).sum() / density.sum()
        variance = ((kernel - mean) ** 2 * density).sum() / density.sum()
        state = as_arrays(right, count)
        assert posterior_weight(*state, alpha, beta, prior)[0] == pytest.approx(mean, rel=1e-6)
        assert posterior_weight(right, count, alpha, beta, prior) == pytest.approx(mean, rel=1e-6)
        got = posterior_variance(*state, alpha, beta, prior)[0]
        assert got == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
@pytest.mark.parametrize("num_more", [1, 3, 8])
def test_the_expected_fall_of_the_variance_agrees_with_drawn_rollouts(alpha, beta, num_more):
    rng = np.random.default_rng(0)
    for right, count in STATES:
        state = as_arrays(right, count)
        got = variance_reduction(*state, num_more, alpha=alpha, beta=beta)[0]
        rates = rng.beta(right + 1, count - right + 1, size=400_000)
        after = posterior_variance(
            right + rng.binomial(num_more, rates),
            np.full(len(rates), count + num_more),
            alpha,
            beta,
        )
        falls = posterior_variance(*state, alpha, beta)[0] - after
        assert abs(got - falls.mean()) < 5 * falls.std() / len(falls) ** 0.5 + 1e-12


def test_one_rollout_at_even_odds_is_worth_nothing_and_two_are_worth_something():
    state = as_arrays(1.0, 2.0)
    assert variance_reduction(*state, 1)[0] == pytest.approx(0, abs=1e-12)
    assert variance_reduction(*state, 2)[0] > 0.02 * posterior_variance(*state)[0]


def test_rollouts_go_where_the_weight_is_least_certain():
    right = np.array([1.0, 4.0, 7.0, 0.0, 32.0])
    count = np.array([8.0, 8.0, 8.0, 64.0, 64.0])
    given = allocate(ADAPTIVE, right, count, 8)
    assert given.sum() == 8
    assert given[0] == given[2] == 4, "near 0.15 and 0.85; p(1-p) is flat at 0.5"


def test_rollouts_end_at_the_most_of_one_problem():
    config = WeightsConfig(
        estimator=Estimator.posterior, adaptive=AdaptiveConfig(enabled=True, max_rollouts=9)
    )
    given = allocate(config, np.array([1.0, 4.0]), np.array([8.0, 9.0]), 100)
    assert given.tolist() == [1, 0]
    asked = np.array([9, 8])
    given = allocate(config, np.array([1.0, 4.0]), np.array([2.0, 8.0]), 100, num_asked=asked)
    assert given.tolist() == [0, 1], "what has no verdict was asked for all the same"


def test_a_problem_whose_verdicts_do_not_come_is_asked_less():
    right, count = np.array([1.0, 1.0]), np.array([4.0, 4.0])
    even = allocate(ADAPTIVE, right, count, 8)
    given = allocate(ADAPTIVE, right, count, 8, num_asked=np.array([4, 12]))
    assert even.tolist() == [4, 4] and given[0] > given[1]


def test_the_greedy_choice_beats_the_same_number_everywhere():
    rng = np.random.default_rng(3)
    right = rng.binomial(4, rng.random(300)).astype(float)
    count = np.full(300, 4.0)
    greedy = allocate(ADAPTIVE, right, count, 600)
    fall = sum(
        variance_reduction(right[greedy == n], count[greedy == n], int(n)).sum()
        for n in np.unique(greedy)
    )
    assert greedy.sum() == 600
    assert fall > 1.05 * variance_reduction(right, count, 2).sum()


@pytest.mark.parametrize("fit_prior", [False, True])
def test_the_expected_error_is_the_error_where_the_prior_is_right(fit_prior):
    rng = np.random.default_rng(1)
    rates = rng.random(20_000)
    right, count = rng.binomial(8, rates).astype(float), np.full(20_000, 8.0)
    config = WeightsConfig(estimator=Estimator.posterior, fit_prior=fit_prior)
    weights, truth = posterior_weight(right, count), beta_weight(rates)
    error = np.sqrt(((weights / weights.mean() - truth / truth.mean()) ** 2).mean())
    assert expected_error(config, right, count) == pytest.approx(error, rel=0.02)
