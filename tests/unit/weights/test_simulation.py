import csv
import functools

import numpy as np
import pytest

from nemo_paced.cli import main
from nemo_paced.config import AdaptiveConfig, Estimator, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.report.weight_errors import gain_lines, write_csv, write_figures
from nemo_paced.weights.simulation import (
    DISTRIBUTIONS,
    Curves,
    from_counts,
    mean_and_error,
    simulate,
)


@functools.cache
def run(name, *, fit_prior=False, num_seeds=4):
    config = WeightsConfig(estimator=Estimator.posterior, fit_prior=fit_prior)
    return simulate(DISTRIBUTIONS[name], config, num_problems=1000, num_seeds=num_seeds, seed=0)


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_adaptive_rollouts_save_two_fifths_of_the_plug_ins(name):
    saved, error = run(name, fit_prior=True).saving("adaptive")
    assert saved - 2 * error > 0.40


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_adaptivity_alone_saves_a_few_per_cent_of_the_posteriors(name):
    saved, error = run(name, num_seeds=8).saving("adaptive", against="posterior")
    assert saved - 2 * error > 0 and saved < 0.25


def test_the_uniform_prior_costs_savings_where_pass_rates_are_u_shaped():
    name = next(key for key in DISTRIBUTIONS if key.startswith("U"))
    assert run(name).saving("adaptive")[0] < run(name, fit_prior=True).saving("adaptive")[0] - 0.05


def test_the_posteriors_error_is_the_one_that_theory_gives():
    """Uniform pass rates, K = 8: E[Var(p(1-p) | c)] over c uniform on 0..8, in units of 1/6."""
    p = (np.arange(100_000) + 0.5) / 100_000
    variances = []
    for c in range(9):
        density = p**c * (1 - p) ** (8 - c)
        mean = (p * (1 - p) * density).sum() / density.sum()
        variances.append(((p * (1 - p) - mean) ** 2 * density).sum() / density.sum())
    mean, error = mean_and_error(run("uniform", num_seeds=8).errors["posterior"][:, 8 - 2])
    assert abs(mean - 6 * np.mean(variances) ** 0.5) < 4 * error


def test_rollouts_needed_are_read_off_between_whole_numbers():
    plug_in = np.array([[9.0, 8, 7, 6, 5, 4, 3, 2]] * 2)
    other = np.array([[9.0, 4, 2, 1, 1, 1, 1, 1], [1.0] * 8])
    curves = Curves(np.arange(2, 10), {"plug-in": plug_in, "other": other})
    assert curves.needed("other").tolist() == [3.5, 2.0]
    assert np.isnan(Curves(np.arange(2, 10), {"plug-in": other, "other": plug_in}).needed("other"))[
        1
    ]


def test_pass_rates_of_a_table_come_from_its_posteriors():
    draw = from_counts(np.array([0.0, 6.0]), np.array([8.0, 8.0]), (1.0, 1.0))
    rates = draw(np.random.default_rng(0), 100_000)
    assert rates.mean() == pytest.approx((1 / 10 + 7 / 10) / 2, abs=0.005)
    assert rates.min() > 0


def test_too_few_are_refused():
    with pytest.raises(ConfigError, match="--problems is 5"):
        simulate(DISTRIBUTIONS["uniform"], WeightsConfig(), num_problems=5, num_seeds=2, seed=0)


def test_fewer_adaptive_rollouts_than_are_drawn_are_taken():
    config = WeightsConfig(
        estimator="posterior", adaptive=AdaptiveConfig(enabled=True, max_rollouts=8)
    )
    curves = simulate(DISTRIBUTIONS["uniform"], config, num_problems=50, num_seeds=2, seed=0)
    assert curves.rollouts[-1] > 8
    assert all(np.isfinite(errors).all() for errors in curves.errors.values())


def test_csv_and_figures_hold_every_curve(tmp_path):
    results = {"uniform": run("uniform", num_seeds=2)}
    write_csv(tmp_path / "a" / "e.csv", results)
    with (tmp_path / "a" / "e.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 15
    assert {row["estimator"] for row in rows} == {"plug-in", "posterior", "adaptive"}
    assert float(rows[0]["rms_error"]) == pytest.approx(
        results["uniform"].errors["plug-in"][0, 0], abs=1e-6
    )
    write_figures(tmp_path / "f.html", results)
    assert "<svg" in (tmp_path / "f.html").read_text()
    assert any("adaptivity alone" in line for line in gain_lines(results["uniform"]))


def test_the_command_prints_a_table_without_a_model(capsys):
    assert main(["pass-rates", "--simulate", "--problems", "50", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("RMS error") == 3 and "adaptive" in printed
    assert main(["pass-rates", "--simulate", "--seeds", "x"]) == 2
    assert "--seeds" in capsys.readouterr().err
