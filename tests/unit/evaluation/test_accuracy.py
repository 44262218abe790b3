import itertools
import json
import math
import statistics

import pytest

from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import read_results, read_settings, write_results
from nemo_paced.records import Problem, Rollout
from nemo_paced.rollout.accuracy import Accuracy, Difference


def graded(verdicts):
    """Accuracy of problem id -> verdicts of its samples."""
    problems = [Problem(name, "x", "1", group=name[0]) for name in verdicts]
    rollouts = [
        Rollout(f"{name}/{k}", name, (1,) * (k + 1), sample=k, correct=bool(right))
        for name, samples in verdicts.items()
        for k, right in enumerate(samples)
    ]
    return Accuracy.of(rollouts, problems)


def test_the_standard_error_is_that_of_the_problems_means():
    accuracy = graded({"a": [1, 1, 0, 0], "b": [1, 1, 1, 1], "c": [0, 0, 0, 0]})
    assert accuracy.mean == pytest.approx(0.5)
    assert accuracy.standard_error == pytest.approx(statistics.stdev([0.5, 1, 0]) / math.sqrt(3))
    # more samples of the same problems do not make it smaller, as independent draws would
    more = graded({"a": [1, 1, 0, 0] * 9, "b": [1] * 36, "c": [0] * 36})
    assert more.standard_error == pytest.approx(accuracy.standard_error)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_subsets_of_k_samples(k):
    verdicts = {"a": [1, 0, 0, 0, 1], "b": [0] * 5, "c": [1, 1, 1, 0, 1], "d": [0, 0, 1, 0, 0]}
    naive = statistics.fmean(
        any(subset)
        for samples in verdicts.values()
        for subset in itertools.combinations(samples, k)
    )
    assert graded(verdicts).pass_at(k) == pytest.approx(naive)


def test_pass_at_the_ends_is_mean_and_share_of_solved_problems():
    accuracy = graded({"a": [1, 0, 0], "b": [0, 0, 0], "c": [1, 1, 0]})
    assert accuracy.pass_at(1) == pytest.approx(accuracy.mean)
    assert accuracy.pass_at(3) == pytest.approx(accuracy.pass_at_k)


def test_differences_are_paired_by_problem():
    before = graded({"a": [1, 0], "b": [0, 0], "c": [1, 1]})
    after = graded({"c": [1, 1], "a": [1, 1], "b": [1, 0]})  # in another order
    difference = Difference.between(after, before)
    assert difference.mean == pytest.approx(1 / 3)
    expected = statistics.stdev([0.5, 0.5, 0.0]) / math.sqrt(3)
    assert difference.standard_error == pytest.approx(expected)
    assert expected < before.standard_error, "pairing takes the problems' own spread away"


@pytest.mark.parametrize(
    ("mean", "error", "said"),
    [
        (0.05, 0.02, "better"),
        (-0.05, 0.02, "worse"),
        (0.03, 0.02, "no difference can be claimed"),
        (0.0, 0.0, "no difference can be claimed"),
        (0.5, math.nan, "no difference can be claimed"),
    ],
)
def test_only_more_than_two_standard_errors_is_a_difference(mean, error, said):
    assert Difference(mean, error).verdict() == said


def test_accuracies_on_other_problems_are_not_compared():
    with pytest.raises(ConfigError, match=r"only one of the two has b, c \(2 problems\)"):
        Difference.between(graded({"a": [1], "b": [1]}), graded({"a": [1], "c": [1]}))


def test_results_are_read_back_as_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    written = {"base": {"heldout": graded({"a": [1, 0], "b": [0, 0]})}}
    write_results(path, written, {"temperature": 0.6})
    assert read_results(path) == written and read_settings(path) == {"temperature": 0.6}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_single_problem_has_no_standard_error(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {"m": {"one": graded({"a": [1, 0]})}}, {})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["models"]["m"]["one"]["standard_error"] is None
    assert math.isnan(read_results(path)["m"]["one"].standard_error)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": {"m": {"s": {"mean": 1}}}}'])
def test_another_file_is_no_results_file(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json is no results file"):
        read_results(path)
