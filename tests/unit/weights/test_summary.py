import pytest

from nemo_paced.weights.summary import drift_metrics, effective_sample_size, weight_shares


def test_the_effective_sample_size_counts_equal_weights():
    assert effective_sample_size([1.0] * 7) == pytest.approx(7)
    assert effective_sample_size([0.0, 2.0, 0.0, 2.0]) == pytest.approx(2)
    assert effective_sample_size([1.5, 0.5]) == pytest.approx(4 / 2.5)


def test_shares_are_of_all_weight():
    problems, shares = weight_shares([0.0, 0.05, 0.5, 1.0], [0.0, 1.0, 3.0, 0.0])
    assert problems.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert shares[[0, 5, 9]].tolist() == [0.25, 0.75, 0.0]


@pytest.mark.parametrize("num_rollouts", [5, 10, 20, 30, 40, 64])
def test_a_rate_on_an_edge_is_in_the_bin_above_it(num_rollouts):
    counted = range(num_rollouts + 1)
    problems, shares = weight_shares([c / num_rollouts for c in counted], [1.0] * len(counted))
    exact = [min(10 * c // num_rollouts, 9) for c in counted]
    assert problems.tolist() == [exact.count(index) for index in range(10)]
    assert shares == pytest.approx(problems / len(counted))


def test_bounds_belong_to_the_middle():
    metrics = drift_metrics([0.1, 0.2, 0.5, 0.8, 0.9], [1.0] * 5)
    assert metrics["weights/mean_pass_rate"] == pytest.approx(0.5)
    assert metrics["weights/share_below_0.2"] == pytest.approx(0.2)
    assert metrics["weights/share_between"] == pytest.approx(0.6)
    assert metrics["weights/share_above_0.8"] == pytest.approx(0.2)
    assert metrics["weights/effective_sample_size"] == pytest.approx(5)
