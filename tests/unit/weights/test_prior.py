import numpy as np
import pytest
from scipy.special import betaln

from nemo_paced.weights.prior import BOUNDS, fit_prior


@pytest.mark.parametrize("prior", [(0.4, 0.4), (1.0, 1.0), (2.0, 0.7), (5.0, 20.0)])
def test_the_prior_that_made_the_counts_is_found(prior):
    rates = np.random.default_rng(0).beta(*prior, size=20_000)
    right = np.random.default_rng(1).binomial(8, rates).astype(float)
    assert fit_prior(right, np.full(20_000, 8.0)) == pytest.approx(prior, rel=0.06)


def test_the_likelihood_is_at_its_top():
    rng = np.random.default_rng(2)
    count = rng.integers(1, 20, size=500).astype(float)
    right = rng.binomial(count.astype(int), rng.beta(0.7, 2.0, size=500)).astype(float)

    def likelihood(a, b):
        return (betaln(right + a, count - right + b) - betaln(a, b)).sum()

    a, b = fit_prior(right, count)
    assert all(
        likelihood(a, b) > likelihood(a * x, b * y)
        for x, y in [(1.02, 1.0), (0.98, 1.0), (1.0, 1.02), (1.0, 0.98)]
    )


def test_stopping_where_it_looks_settled_does_not_move_the_prior():
    rng = np.random.default_rng(3)
    rates = rng.beta(0.5, 1.5, size=20_000)
    right, count = rng.binomial(2, rates), np.full(20_000, 2)
    for _ in range(10):
        unsettled = (right > 0) & (right < count)
        right = right + unsettled * rng.binomial(2, rates)
        count = count + 2 * unsettled
    assert fit_prior(right.astype(float), count.astype(float)) == pytest.approx(
        (0.5, 1.5), rel=0.06
    )


@pytest.mark.parametrize("right", [[8.0] * 9, [0.0] * 9, [4.0] * 9, [0.0, 8.0] * 5])
def test_counts_without_a_maximum_give_a_prior_within_bounds(right):
    a, b = fit_prior(np.array(right), np.full(len(right), 8.0))
    assert BOUNDS[0] <= min(a, b) and max(a, b) <= BOUNDS[1]
