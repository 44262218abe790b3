"""Estimates of SNR from scalars of blocks: against what they estimate, on drawn gradients."""

import numpy as np
import pytest

from nemo_paced.snr.estimates import estimate_bin
from nemo_paced.snr.power_law import fit_power_law, measured_ratio
from nemo_paced.snr.profile import Profile, deviation
from nemo_paced.weights.theory import minimax_efficiency, variance_ratio
from tests.block_sums import block_sums

WIDTH = 400


def draw(rng, problems, snr, blocks=20):
    """Gradients of WIDTH dimensions with mean of length snr and trace 1, in shuffled blocks."""
    gradients = rng.normal(0, WIDTH**-0.5, size=(problems, WIDTH))
    gradients[:, 0] += snr
    return gradients, rng.permutation(np.arange(problems) % blocks)


def estimate(gradients, block):
    return estimate_bin(block_sums(gradients, block))


def test_scalars_of_blocks_give_what_leaving_problems_out_gives():
    rng = np.random.default_rng(0)
    gradients, block = draw(rng, 50, 0.3, blocks=8)  # of unequal size
    found = estimate(gradients, block)
    for number in range(8):
        kept = gradients[block != number]
        n, centre = len(kept), kept.mean(0)
        noise = ((kept - centre) ** 2).sum() / (n - 1)
        pairs = kept @ kept.T
        signal = (pairs.sum() - np.trace(pairs)) / (n * (n - 1))
        assert found.without_B[number] == pytest.approx(signal / noise)
        assert found.signal_without_B[number] == pytest.approx(signal)
    deviations = ((gradients - gradients.mean(0)) ** 2).sum(1).mean()
    plain = np.linalg.norm(gradients.mean(0)) / np.sqrt(deviations)
    assert found.plain.value == pytest.approx(plain)
    assert found.gradient_norm.value == pytest.approx(np.linalg.norm(gradients, axis=1).mean())


@pytest.mark.parametrize("snr", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("problems", [20, 60])
def test_the_plain_estimate_has_a_floor_and_the_unbiased_one_has_none(snr, problems):
    rng = np.random.default_rng(1)
    bins = [estimate(*draw(rng, problems, snr)) for _ in range(300)]
    unbiased = np.array([b.snr_squared.value for b in bins])
    error = unbiased.std() / np.sqrt(len(unbiased))
    assert unbiased.mean() == pytest.approx(snr**2, abs=4 * error)
    plain = np.mean([b.plain.value**2 for b in bins])
    assert plain == pytest.approx((snr**2 + 1 / problems) / (1 - 1 / problems), rel=0.1)


@pytest.mark.parametrize(("problems", "snr"), [(60, 0.3), (100, 0.15), (100, 0.6), (50, 0.4)])
def test_intervals_cover_as_often_as_they_say(problems, snr):
    """95 %, to within what 400 draws and a statistic that is not normal leave open."""
    rng = np.random.default_rng(2)
    bins = [estimate(*draw(rng, problems, snr)) for _ in range(400)]
    held = np.mean([b.snr_squared.low <= snr**2 <= b.snr_squared.high for b in bins])
    assert 0.91 <= held <= 0.99
    said = np.sqrt(np.mean([b.snr_squared.standard_error**2 for b in bins]))
    assert said == pytest.approx(np.std([b.snr_squared.value for b in bins]), rel=0.15)


def test_too_few_blocks_for_an_interval_give_no_estimate():
    rng = np.random.default_rng(0)
    assert estimate(*draw(rng, 3, 0.3, blocks=3)) is None


def test_gradients_that_do_not_differ_give_no_estimate():
    gradients, block = draw(np.random.default_rng(0), 40, 0.3, blocks=4)
    gradients[block != 2] = 0.0  # without one block nothing differs
    assert estimate(gradients, block) is None
    assert estimate(0 * gradients, block) is None


RATES = np.linspace(0.05, 0.95, 10)


def profile(snr_squared, problems=400, seed=0):
    rng = np.random.default_rng(seed)
    return Profile(RATES, [estimate(*draw(rng, problems, s)) for s in np.sqrt(snr_squared)])


def test_exponents_come_back_and_their_intervals_cover():
    truth = 2.0 * RATES**1.5 * (1 - RATES) ** 0.5
    fits = [
        fit_power_law(profile(truth, 200, seed), lambda b: (b.snr_squared, b.without_B))
        for seed in range(20)
    ]
    held = np.mean(
        [f.a.low <= 1.5 <= f.a.high for f in fits] + [f.b.low <= 0.5 <= f.b.high for f in fits]
    )
    assert held >= 0.85  # of 40 at 95 %
    assert np.mean([f.a.value for f in fits]) == pytest.approx(1.5, abs=0.15)
    assert np.mean([f.b.value for f in fits]) == pytest.approx(0.5, abs=0.15)
    assert fits[0].at(RATES) == pytest.approx(truth, rel=0.3)


def test_exponents_of_too_few_bins_are_none():
    few = profile(np.full(10, 0.1))
    few = Profile(few.pass_rate_J[:3], few.bins[:3])
    assert fit_power_law(few, lambda b: (b.snr_squared, b.without_B)) is None


def test_noise_has_no_exponents():
    for seed in range(30):
        nothing = profile(np.zeros(10), 100, seed)
        assert fit_power_law(nothing, lambda b: (b.snr_squared, b.without_B)) is None


def test_an_exponent_at_the_end_of_the_fit_is_unbounded():
    steep = profile(0.5 * RATES**12, 400)
    found = fit_power_law(steep, lambda b: (b.snr_squared, b.without_B))
    assert found.a.value == pytest.approx(10, abs=0.01) and not found.is_bounded
    assert (found.a.low, found.a.high) == (-np.inf, np.inf)
    assert measured_ratio(1.0, 1.0, found, found) is None


def test_the_interval_of_the_variance_ratio_covers():
    """Trace 1 everywhere: the signal is SNR^2, so that g1 = g2 = 0."""
    truth = 2.0 * RATES * (1 - RATES)
    found = []
    for seed in range(20):
        one = profile(truth, 200, seed)
        snr = fit_power_law(one, lambda b: (b.snr_squared, b.without_B))
        signal = fit_power_law(one, lambda b: (b.signal, b.signal_without_B))
        found.append(measured_ratio(1.0, 1.0, snr, signal))
    expected = variance_ratio(1.0, 1.0, 0.5, 0.5, 1.0, 1.0)
    assert np.mean([r.low <= expected <= r.high for r in found]) >= 0.85  # of 20 at 95 %
    spread = np.std([r.value for r in found])
    assert np.mean([r.standard_error for r in found]) == pytest.approx(spread, rel=0.5)


def optimal_to_snr_squared(weight):
    return weight / (1 - weight)


@pytest.mark.parametrize("delta", [0.0, 0.4])
def test_delta_is_bounded_as_often_as_it_says_and_corrected_for_noise(delta):
    """w* = the kernel times exp(+-delta), alternating."""
    sign = np.where(np.arange(10) % 2 == 0, 1.0, -1.0)
    truth = optimal_to_snr_squared(RATES * (1 - RATES) * np.exp(delta * sign) / 1.5)
    found = [deviation(profile(truth, 300, seed), 1.0, 1.0) for seed in range(40)]
    assert np.mean([f.low <= delta <= f.high for f in found]) >= 0.93
    raw = np.mean([f.delta for f in found]) - delta
    corrected = np.mean([f.corrected for f in found]) - delta
    assert raw > 0.02, "noise inflates a maximum"
    assert abs(corrected) < 0.7 * raw
    for one in found:
        assert one.guaranteed_efficiency == pytest.approx(minimax_efficiency(one.high))
        assert one.guaranteed_efficiency <= one.efficiency


def test_a_bin_that_may_have_no_signal_leaves_delta_unbounded():
    truth = np.full(10, 0.2)
    truth[0] = 0.0
    found = deviation(profile(truth, 60), 1.0, 1.0)
    assert found.high == np.inf and found.guaranteed_efficiency == 0.0
    assert found.bins < 10
    assert deviation(profile(np.zeros(10), 60), 1.0, 1.0) is None
