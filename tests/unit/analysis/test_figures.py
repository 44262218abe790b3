import numpy as np
import pytest

from nemo_paced.analysis import figures


@pytest.mark.parametrize("num_rollouts", [1, 4, 8, 16])
def test_each_pass_rate_of_few_rollouts_has_its_own_bar(num_rollouts):
    centres, edges = figures._bins(num_rollouts)
    rates = np.arange(num_rollouts + 1) / num_rollouts
    counts, _ = np.histogram(rates, bins=edges)
    assert counts.tolist() == [1] * (num_rollouts + 1)
    assert centres == pytest.approx(rates)


def test_many_rollouts_share_ten_bars():
    centres, edges = figures._bins(64)
    counts, _ = np.histogram(np.arange(65) / 64, bins=edges)
    assert len(centres) == 10 and counts.sum() == 65


def test_the_trailing_mean_looks_back_only():
    values = np.random.default_rng(0).normal(size=35)
    for index, mean in enumerate(figures._trailing_mean(values)):
        assert mean == pytest.approx(values[max(0, index - 9) : index + 1].mean())


def test_axes_have_labels_with_units():
    line = figures.Line("a", [1, 2], [0.5, 0.25])
    svg = figures.curves([line], "loss (nats)")
    assert "optimizer step" in svg and "loss (nats)" in svg
    svg = figures.weights_by_pass_rate([0.0, 0.5, 1.0], [0.0, 3.0, 0.0], 2)
    assert "share of all weight" in svg and "weight of one problem" in svg
    assert "wall time of the stage's steps (s)" in figures.timing({"s": {"teacher": 1.0}})


def test_a_log_axis_leaves_out_what_has_no_logarithm():
    svg = figures.curves([figures.Line("a", [1, 2, 3], [0.0, 1.0, 10.0])], "norm", log=True)
    assert "norm" in svg
