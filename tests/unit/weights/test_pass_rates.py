import pandas
import pytest

from nemo_paced.config import WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.grading.accuracy import Accuracy, Difference
from nemo_paced.records import Problem, Rollout
from nemo_paced.weights.pass_rates import PassRateTable

PROBLEMS = [Problem(name, "x", "1", group=name[:1]) for name in ("a1", "a2", "b1")]
CORRECT = {"a1": 1, "a2": 4, "b1": 2}


def rollouts():
    return [
        Rollout(f"{name}/{k}", name, (1, 2), sample=k, correct=k < count, truncated=k == 3)
        for name, count in CORRECT.items()
        for k in range(4)
    ]


def test_the_table_has_the_promised_columns_and_unit_mean_weights(tmp_path):
    table = PassRateTable.estimate(rollouts(), PROBLEMS, WeightsConfig(), student_step=5)
    path = tmp_path / "t.parquet"
    table.write(path)
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == [
        "id",
        "num_correct",
        "num_rollouts",
        "effective_correct",
        "effective_rollouts",
        "pass_rate",
        "weight",
        "student_step",
    ]
    assert frame["pass_rate"].tolist() == [0.25, 1.0, 0.5]
    assert frame["weight"].mean() == pytest.approx(1.0) and frame["weight"][1] == 0
    assert PassRateTable.read(path, PROBLEMS) == table
    again = table.reweighted(WeightsConfig(scheme=WeightScheme.unweighted))
    assert set(again.weights().values()) == {1.0}


def test_a_table_of_other_problems_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    PassRateTable.estimate(rollouts(), PROBLEMS, WeightsConfig(), student_step=0).write(path)
    with pytest.raises(ConfigError, match=r"lacks 1 of the 4 problems \(c1\)"):
        PassRateTable.read(path, [*PROBLEMS, Problem("c1", "x", "1")])
    with pytest.raises(ConfigError, match="no pass-rate table"):
        PassRateTable.read(tmp_path / "none.parquet", PROBLEMS)


def test_accuracy_counts_problems_not_samples():
    accuracy = Accuracy.of(rollouts(), PROBLEMS)
    assert accuracy.mean == pytest.approx((0.25 + 1 + 0.5) / 3)
    assert accuracy.pass_at_k == 1.0 and accuracy.samples == 4 and accuracy.truncated == 0.25
    assert accuracy.groups == {"a": 0.625, "b": 0.5}
    assert accuracy.standard_error == pytest.approx(0.2204, abs=1e-4)
    assert Accuracy.from_dict(accuracy.to_dict()) == accuracy
    same = Difference.between(accuracy, accuracy)
    assert same.mean == same.standard_error == 0
