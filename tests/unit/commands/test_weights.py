import numpy as np
import pytest

from nemo_paced.cli import main
from nemo_paced.config import WeightsConfig
from nemo_paced.records import Problem, Rollout
from nemo_paced.weights.pass_rates import PassRateTable
from tests.block_sums import snr_record
from tests.outcomes import right_or_wrong

PROBLEMS = [Problem(f"p{i:03d}", "x", "1") for i in range(200)]


def write_table(path, counts):
    """Pass rates that follow p (1-p)^2, with so many rollouts a problem."""
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(f"{problem.id}/{k}", problem.id, (1,), outcome=right_or_wrong(rng.random() < rate))
        for problem, rate, count in zip(PROBLEMS, rng.beta(2, 3, size=200), counts, strict=True)
        for k in range(count)
    ]
    PassRateTable.estimate(rollouts, PROBLEMS, WeightsConfig(), student_step=3).write(path)
    return path


def test_weights_prints_exponents_prior_and_shares(tmp_path, capsys):
    path = write_table(tmp_path / "t.parquet", [64] * 200)
    assert main(["weights", "--pass-rates", str(path)]) == 0
    printed = capsys.readouterr().out
    words = printed.replace("=", " ").split()
    alpha = float(words[words.index("weights.alpha") + 1])
    beta = float(words[words.index("weights.beta") + 1].rstrip(","))
    assert (alpha, beta) == pytest.approx((1, 2), abs=0.6)
    assert "200 problems, 64 rollouts each (mean), student step 3" in printed
    assert "effective sample size" in printed and "0.9 to 1.0" in printed
    for signal, ratio in (("0.25", "0.844"), ("0.34", "0.999"), ("0.5", "1.200")):
        assert f"R = {ratio} with assumed a_s = {signal}, b_s = {signal} (signal)" in printed


def test_the_variance_ratio_may_be_of_what_was_measured(tmp_path, capsys):
    table = write_table(tmp_path / "t.parquet", [8] * 200)
    made = snr_record(lambda p: (p * (1 - p)) ** 0.5, lambda p: 1.0)  # a_s = b_s = 1/2
    made.write(tmp_path / "snr.json")
    arguments = ["weights", "--pass-rates", str(table), "--snr", str(tmp_path / "snr.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("R = ") == 1 and "measured a_s = 0.5" in printed
    ratio = float(printed.split("R = ")[1].split()[0])
    assert ratio == pytest.approx(1.2, abs=0.05)
    low, high = printed.split("R = ")[1].split("[")[1].split("]")[0].split(", ")
    assert float(low) < 1.2 < float(high) < 1.5
    assert main([*arguments, "weights.scheme=unweighted"]) == 0
    assert "R = " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("snr_of", "told"),
    [
        (lambda p: 0.0, "too few bins with a signal to fit exponents to: measure more problems"),
        (lambda p: 0.5 * p**9, "leaves an exponent unbounded: measure more problems"),
    ],
)
def test_a_measurement_that_bounds_no_exponents_is_refused(snr_of, told, tmp_path, capsys):
    table = write_table(tmp_path / "t.parquet", [8] * 200)
    snr_record(snr_of, lambda p: 1.0).write(tmp_path / "snr.json")
    assert main(["weights", "--pass-rates", str(table), "--snr", str(tmp_path / "snr.json")]) == 2
    assert told in capsys.readouterr().err


def test_an_estimator_that_the_table_does_not_fit_is_refused(tmp_path, capsys):
    path = write_table(tmp_path / "t.parquet", [4, 8] * 100)
    assert main(["weights", "--pass-rates", str(path)]) == 2
    assert "4 to 8 rollouts a problem and weights.estimator is plug_in" in capsys.readouterr().err
    arguments = ["weights", "--pass-rates", str(path), "weights.estimator=posterior"]
    assert main([*arguments, "weights.fit_prior=true"]) == 0
    assert "estimator posterior" in capsys.readouterr().out


def test_a_table_may_be_simulated(tmp_path, capsys):
    path = write_table(tmp_path / "t.parquet", [8] * 200)
    few = ("--problems", "50", "--seeds", "2")
    assert main(["pass-rates", "--simulate", "--pass-rates", str(path), *few]) == 0
    assert capsys.readouterr().out.count("RMS error") == 1


def test_a_table_without_rows_is_refused(tmp_path, capsys):
    PassRateTable.of(()).write(tmp_path / "t.parquet")
    assert main(["weights", "--pass-rates", str(tmp_path / "t.parquet")]) == 2
    assert "t.parquet holds no problem: estimate anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["weights"], "--pass-rates"),
        (["weights", "--pass-rates", "nowhere.parquet"], "nowhere.parquet is no pass-rate table"),
    ],
)
def test_mistakes_are_named(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
