from dataclasses import replace

import numpy as np
import pandas
import pytest

from nemo_paced.config import Estimator, WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.grading.accuracy import Accuracy, Difference
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.weights.pass_rates import PassRateTable
from tests.outcomes import right_or_wrong

PROBLEMS = [Problem(name, "x", "1", group=name[:1]) for name in ("a1", "a2", "b1")]
CORRECT = {"a1": 1, "a2": 4, "b1": 2}


def rollouts():
    return [
        Rollout(
            f"{name}/{k}",
            name,
            (1, 2),
            sample=k,
            outcome=right_or_wrong(k < count),
            truncated=k == 3,
        )
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
        "num_truncated",
        "num_unanswered",
        "num_timed_out",
    ]
    assert frame["pass_rate"].tolist() == [0.25, 1.0, 0.5]
    assert frame["weight"].mean() == pytest.approx(1.0) and frame["weight"][1] == 0
    assert PassRateTable.read(path, PROBLEMS) == table
    again = table.reweighted(WeightsConfig(scheme=WeightScheme.unweighted))
    assert set(again.weights().values()) == {1.0}


def of_outcomes(name, *outcomes):
    return [Rollout(f"{name}/{k}", name, (1,), outcome=each) for k, each in enumerate(outcomes)]


def test_what_has_no_verdict_does_not_count_and_what_has_no_answer_counts_as_wrong(tmp_path):
    right, wrong, none = Outcome.right, Outcome.wrong, Outcome.unanswered
    cut, late = Outcome.truncated, Outcome.timed_out
    graded = [
        *of_outcomes("a1", right, wrong, none, cut),
        *of_outcomes("a2", right, late, wrong, late),
        *of_outcomes("b1", late, late, late, late),
    ]
    for estimator in Estimator:
        config = WeightsConfig(estimator=estimator)
        table = PassRateTable.estimate(graded, PROBLEMS, config, student_step=0)
        assert table.pass_rates[:2].tolist() == [0.25, 0.5] and np.isnan(table.pass_rates[2])
        assert table.frame["num_rollouts"].tolist() == [4, 2, 0]
        assert table.frame["num_truncated"].tolist() == [1, 0, 0]
        assert table.frame["num_unanswered"].tolist() == [1, 0, 0]
        assert table.frame["num_timed_out"].tolist() == [0, 2, 4]
        table.check_estimator(config, tmp_path)  # four were asked of each
        weights = table.frame["weight"]
        assert weights.mean() == pytest.approx(1) and (weights[:2] > 0).all()
        assert (weights.iloc[2] > 0) == (estimator is Estimator.posterior), "the prior's"
        drift = table.drift()
        assert drift["weights/mean_pass_rate"] == 0.375
        assert drift["weights/share_between"] == 1
        table.write(tmp_path / "t.parquet")
        assert PassRateTable.read(tmp_path / "t.parquet") == table
        later = table.updated(of_outcomes("b1", late, right, cut), config, student_step=1).rows[2]
        assert (later.num_correct, later.num_rollouts) == (1, 2)
        assert (later.num_timed_out, later.num_truncated) == (5, 1)


def test_a_set_without_any_verdict_is_told_so():
    late = [each for p in PROBLEMS for each in of_outcomes(p.id, Outcome.timed_out)]
    with pytest.raises(ConfigError, match=r"3 have no verdict within grading.time_limit_s"):
        PassRateTable.estimate(late, PROBLEMS, WeightsConfig(), student_step=0)


def test_a_table_of_earlier_columns_is_read(tmp_path):
    path = tmp_path / "t.parquet"
    table = PassRateTable.estimate(rollouts(), PROBLEMS, WeightsConfig(), student_step=0)
    table.write(path)
    columns = ["num_truncated", "num_unanswered", "num_timed_out"]
    pandas.read_parquet(path).drop(columns=columns).to_parquet(path)
    assert PassRateTable.read(path, PROBLEMS) == table


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


def test_a_table_with_a_problem_twice_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    rows = PassRateTable.estimate(rollouts(), PROBLEMS, WeightsConfig(), student_step=0).rows
    PassRateTable.of([*rows, rows[0]]).write(path)
    with pytest.raises(ConfigError, match=f"holds problem '{rows[0].id}' twice"):
        PassRateTable.read(path)


def test_an_update_counts_what_the_definition_says():
    config = WeightsConfig(estimator=Estimator.posterior, discount=0.9)
    table = PassRateTable.estimate(rollouts(), PROBLEMS, config, student_step=0)
    first, verdicts = table.rows[0], (True, False, True)
    new = [
        replace(rollouts()[0], problem_id=first.id, outcome=right_or_wrong(verdict))
        for verdict in verdicts
    ]
    got = table.updated(new, config, student_step=4).rows
    right, count = first.effective_correct, first.effective_rollouts
    for verdict in verdicts:
        right, count = 0.9 * right + verdict, 0.9 * count + 1
    assert (got[0].effective_correct, got[0].effective_rollouts) == (right, count)
    assert (got[0].num_correct, got[0].num_rollouts) == (
        first.num_correct + 2,
        first.num_rollouts + 3,
    )
    assert [replace(row, weight=0, student_step=0) for row in got[1:]] == [
        replace(row, weight=0, student_step=0) for row in table.rows[1:]
    ]
    assert {row.student_step for row in got} == {4}
    assert table.rows[0] == first, "the earlier table is as it was"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_correct", None, "column num_correct: row 2 holds nan"),
        ("student_step", 1.5, "column student_step: row 2 holds 1.5"),
        ("effective_correct", "two", "column effective_correct: could not convert"),
        ("weight", None, "column weight: row 2 holds nan"),
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path, name, value, told):
    path = tmp_path / "t.parquet"
    PassRateTable.estimate(rollouts(), PROBLEMS, WeightsConfig(), student_step=0).write(path)
    frame = pandas.read_parquet(path)
    frame[name] = frame[name].astype(object)
    frame.loc[1, name] = value
    if isinstance(value, str):
        frame[name] = frame[name].astype(str)
    frame.to_parquet(path)
    with pytest.raises(ConfigError, match=told):
        PassRateTable.read(path)


def test_a_table_of_unknown_pass_rates_is_read_back(tmp_path):
    table = PassRateTable.unknown(PROBLEMS)
    table.write(tmp_path / "t.parquet")
    assert PassRateTable.read(tmp_path / "t.parquet", PROBLEMS) == table
    assert table.is_unknown and table.drift() == {}
