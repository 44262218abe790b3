import re

import numpy as np
import pytest
from matplotlib.axes import Axes

from nemo_paced.report import accuracy_figures, figures
from nemo_paced.report.drawing import BLUE, COLOURS, Line
from nemo_paced.weights.summary import in_bins


@pytest.mark.parametrize("num_rollouts", [1, 4, 8, 16])
def test_each_pass_rate_of_few_rollouts_has_its_own_bar(num_rollouts):
    centres, edges = figures._bins(num_rollouts)
    rates = np.arange(num_rollouts + 1) / num_rollouts
    counts = in_bins(rates, edges)
    assert counts.tolist() == [1] * (num_rollouts + 1)
    assert centres == pytest.approx(rates)


def test_many_rollouts_share_ten_bars():
    centres, edges = figures._bins(64)
    counts = in_bins(np.arange(65) / 64, edges)
    assert len(centres) == 10 and counts.sum() == 65


def test_bars_of_the_histogram_count_a_rate_on_an_edge_above_it(monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "bar", lambda axes, at, heights, *_, **__: drawn.append(heights))
    rates = [c / 20 for c in range(21)]
    figures.pass_rate_histogram({"step 0": rates}, 20)
    figures.weights_by_pass_rate(rates, [1.0] * 21, 20)
    assert drawn[0].tolist() == [2] * 9 + [3] and drawn[1] * 21 == pytest.approx(drawn[0])


def test_the_trailing_mean_looks_back_only():
    values = np.random.default_rng(0).normal(size=35)
    for index, mean in enumerate(figures._trailing_mean(values)):
        assert mean == pytest.approx(values[max(0, index - 9) : index + 1].mean())


def test_axes_have_labels_with_units():
    line = Line("a", [1, 2], [0.5, 0.25])
    svg = figures.curves([line], "loss (nats)")
    assert "optimizer step" in svg and "loss (nats)" in svg
    svg = figures.weights_by_pass_rate([0.0, 0.5, 1.0], [0.0, 3.0, 0.0], 2)
    assert "share of all weight" in svg and "weight of one problem" in svg
    assert "wall time of the steps (s)" in figures.timing({"s": {"teacher": 1.0}})


def test_a_log_axis_leaves_out_what_has_no_logarithm():
    svg = figures.curves([Line("a", [1, 2, 3], [0.0, 1.0, 10.0])], "norm", log=True)
    assert "norm" in svg
    assert "20" in figures.curves([Line("a", [1, 2], [12.0, 60.0])], "norm", log=True)


def test_names_are_drawn_as_they_are():
    """Neither as mathematics, nor left out for a leading underscore, nor as markup."""
    lines = [Line(name, [1, 2], [1.0, 2.0]) for name in ("a$b$c", "_seed", "<i>")]
    svg = figures.curves(lines, "loss")
    assert "a$b$c" in svg and "_seed" in svg and "&lt;i&gt;" in svg
    long = accuracy_figures.accuracy_bars(["x" * 40, "b"], {"<i>": [(0.5, 0.1), (0.6, 0.1)]})
    assert f"{'x' * 11}...{'x' * 11}" in long and "x" * 13 not in long and "<i>" not in long
    assert "<b>" not in accuracy_figures.differences(["a"], {"s": [(0.1, 0.1)]}, "<b>")


def test_values_close_together_and_values_of_one_power_of_ten_have_numbers_on_their_axis():
    def numbers(*values):
        svg = figures.curves([Line("a", [1, 2], values)], "norm", log=True)
        return set(re.findall(r">([0-9.e−-]+)</text>", svg)) - {"1", "2"}

    assert len(numbers(1.11, 1.19)) >= 3, "no 2, 3 or 5 times a power of ten among them"
    assert {"20", "30", "50"} <= numbers(12.0, 60.0)
    assert {"0.01", "1", "100"} <= numbers(0.008, 200.0) | {"1"}
    assert "2e-07" in numbers(1.5e-7, 6e-7)


def test_a_line_keeps_its_colour_when_others_are_missing():
    svg = figures.curves([Line("b", [1, 2], [1.0, 2.0], colour=1)], "loss")
    assert COLOURS[1] in svg and COLOURS[0] not in svg


def test_many_points_of_the_drift_are_areas_and_few_are_bars():
    def drawn(count):
        steps = list(range(count))
        return figures.drift(steps, [(0.2, 0.5, 0.3)] * count, [0.5] * count)

    bars, areas = drawn(figures.MOST_BARS), drawn(figures.MOST_BARS + 1)
    assert bars.count(f"fill: {BLUE}") == figures.MOST_BARS + 1, "and the legend's"
    assert areas.count(f"fill: {BLUE}") == 2


def test_what_is_not_noisy_is_not_smoothed():
    steps = list(range(40))
    line = Line("a", steps, [0.0] * 20 + [1.0] * 20)
    assert figures.curves([line], "rate", noisy=False).count("opacity: 0.4") == 0
    assert figures.curves([line], "rate").count("opacity: 0.4") == 1
