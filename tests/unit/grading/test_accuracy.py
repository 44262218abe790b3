import itertools
import json
import math
import statistics

import pytest
from scipy.stats import binomtest

from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import ResultsFile, Source
from nemo_paced.grading.accuracy import Accuracy, Difference, sign_flip_p_value
from nemo_paced.records import Outcome, Problem, Rollout
from tests.outcomes import right_or_wrong


def graded(verdicts):
    """Accuracy of problem id -> verdicts of its samples."""
    problems = [Problem(name, "x", "1", group=name[0]) for name in verdicts]
    rollouts = [
        Rollout(f"{name}/{k}", name, (1,) * (k + 1), sample=k, outcome=right_or_wrong(right))
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
    assert graded(verdicts).pass_at(k).mean == pytest.approx(naive)


def test_pass_at_the_ends_is_mean_and_share_of_solved_problems():
    accuracy = graded({"a": [1, 0, 0], "b": [0, 0, 0], "c": [1, 1, 0]})
    assert accuracy.pass_at(1).mean == pytest.approx(accuracy.mean)
    assert accuracy.pass_at(3).mean == pytest.approx(accuracy.pass_at_k)


def test_differences_are_paired_by_problem():
    before = graded({"a": [1, 0], "b": [0, 0], "c": [1, 1]})
    after = graded({"c": [1, 1], "a": [1, 1], "b": [1, 0]})  # in another order
    difference = Difference.between(after, before)
    assert difference.mean == pytest.approx(1 / 3)
    expected = statistics.stdev([0.5, 0.5, 0.0]) / math.sqrt(3)
    assert difference.standard_error == pytest.approx(expected)
    assert expected < before.standard_error, "pairing takes the problems' own spread away"


@pytest.mark.parametrize(
    ("mean", "error", "p_value", "said"),
    [
        (0.05, 0.02, 0.05, "better"),
        (-0.05, 0.02, 0.01, "worse"),
        (0.05, 0.02, 0.06, "no difference can be claimed"),
        (0.03, 0.02, 0.01, "no difference can be claimed"),
        (0.0, 0.0, 1.0, "no difference can be claimed"),
        (0.5, math.nan, 0.01, "no difference can be claimed"),
    ],
)
def test_a_difference_takes_two_standard_errors_and_the_exact_test(mean, error, p_value, said):
    assert Difference(mean, error, p_value).verdict() == said


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (4, 0), (6, 0), (7, 1), (40, 20), (3, 3)])
def test_of_single_answers_the_exact_test_is_mcnemars(lost, gained):
    differences = [0.0] * 50 + [-1.0] * lost + [1.0] * gained
    exact = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert sign_flip_p_value(differences) == pytest.approx(exact)


@pytest.mark.parametrize("k", [3, 8, 32])
def test_the_exact_test_counts_all_ways_to_swap_the_models(k):
    differences = [step / k for step in (2, -1, 0, 3, 1, 2, 3, -1)]
    flipped = [
        sum(sign * value for sign, value in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    far = [abs(value) >= abs(sum(differences)) - 1e-9 for value in flipped]
    assert sign_flip_p_value(differences) == pytest.approx(statistics.fmean(far))


def test_the_exact_test_of_large_values_takes_no_more_memory():
    """A score of lm-eval may be of any size; this one would have asked for terabytes."""
    differences = [0.25, -0.5, 1.0, 0.75, 0.5, 1.0, 0.25]
    large = [1e12 * value + 1 for value in differences]  # without a large common divisor
    assert sign_flip_p_value(large) == sign_flip_p_value(differences) < 0.1
    assert sign_flip_p_value([]) == sign_flip_p_value([0.0, 0.0]) == 1


def test_few_changed_problems_show_nothing_and_have_no_interval_of_no_width():
    def lost(changed, count):
        right = graded({str(i): [1] for i in range(count)})
        return Difference.between(graded({str(i): [i >= changed] for i in range(count)}), right)

    four, both, ten = lost(4, 500), lost(2, 2), lost(10, 10)
    assert four.mean < -2 * four.standard_error and four.p_value == 0.125
    assert four.verdict() == both.verdict() == "no difference can be claimed"
    assert math.isnan(both.interval[0]) and math.isnan(ten.interval[1])
    assert ten.verdict() == lost(6, 500).verdict() == "worse"


def test_accuracies_on_other_problems_are_not_compared():
    with pytest.raises(ConfigError, match=r"only one of the two has b, c \(2 problems\)"):
        Difference.between(graded({"a": [1], "b": [1]}), graded({"a": [1], "c": [1]}))


def test_results_are_read_back_as_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    written = {"base": {"heldout": graded({"a": [1, 0], "b": [0, 0]})}}
    source = Source("/models/m", "0123456789abcdef")
    file = ResultsFile(
        written, {"temperature": 0.6}, {"heldout": "0a"}, {"base": source}, {"torch": "2"}
    )
    file.write(path)
    assert ResultsFile.read(path) == file
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_single_problem_has_no_standard_error(tmp_path):
    path = tmp_path / "results.json"
    ResultsFile({"m": {"one": graded({"a": [1, 0]})}}, {}).write(path)
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["models"]["m"]["one"]["standard_error"] is None
    assert math.isnan(ResultsFile.read(path).models["m"]["one"].standard_error)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": {"m": {"s": {"mean": 1}}}}'])
def test_another_file_is_no_results_file(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json is no results file"):
        ResultsFile.read(path)


def answered(*samples):
    """Accuracy on one problem of (extracted answer, right or not)."""
    rollouts = [
        Rollout(f"p/{k}", "p", (1,), sample=k, outcome=right_or_wrong(right), extracted=answer)
        for k, (answer, right) in enumerate(samples)
    ]
    return Accuracy.of(rollouts, [Problem("p", "x", "1")])


@pytest.mark.parametrize(
    ("samples", "majority"),
    [
        ([("2", False), ("1", True), ("1", True), ("3", False)], 1.0),
        ([("2", False), ("1", True), ("2", False), ("1", True), ("3", False)], 1 / 2),
        ([("2", False), ("1", True), ("3", False)], 1 / 3),
        ([("2", False), ("1", True), ("2", False)], 0.0),
        ([(" 2 ", False), ("1", True), ("$2$", False)], 0.0),  # one wrong answer, written twice
        ([("1/2", True), ("0.5", True), ("2", False)], 1.0),  # right ones are one answer
        ([(None, False), (None, False), ("1", True)], 1.0),  # no answer has no vote
        ([("2", False), (None, False), (None, False)], 0.0),
    ],
)
def test_the_majority_is_of_answers_with_ties_by_lot(samples, majority):
    assert answered(*samples).majority == pytest.approx(majority)


def test_a_verifier_that_reads_no_answer_has_no_majority():
    assert math.isnan(answered((None, True), (None, False)).majority)


def test_what_became_of_the_samples_is_kept_with_an_accuracy():
    graded = [(Outcome.right, "box"), (Outcome.wrong, "last number"), (Outcome.timed_out, "box")]
    rollouts = [
        Rollout(f"p/{k}", "p", (1,), sample=k, outcome=outcome, evidence=evidence)
        for k, (outcome, evidence) in enumerate([*graded, (Outcome.right, "last number")])
    ]
    accuracy = Accuracy.of(rollouts, [Problem("p", "x", "1")])
    assert accuracy.mean == 0.5, "what has no verdict is none that is right"
    rollouts = [
        Rollout(f"p/{k}", "p", (1,), sample=k, outcome=outcome, extracted="8")
        for k, outcome in enumerate([Outcome.right, Outcome.timed_out, Outcome.timed_out])
    ]
    majority = Accuracy.of(rollouts, [Problem("p", "x", "1")]).majority
    assert majority == 1, "what has no verdict has no vote"
    assert accuracy.outcomes == {"right": 0.5, "wrong": 0.25, "timed out": 0.25}
    assert accuracy.right_by == {"box": 0.5, "last number": 0.5}
    assert Accuracy.from_dict(accuracy.to_dict()).right_by == accuracy.right_by
    earlier = accuracy.to_dict()
    del earlier["outcomes"], earlier["right_by"]
    assert Accuracy.from_dict(earlier).outcomes == {}


def test_95_percent_of_the_samples_are_no_longer_than_the_percentile():
    problems = [Problem("p", "x", "1")]
    rollouts = [
        Rollout(f"p/{k}", "p", (1,) * (k + 1), sample=k, outcome=right_or_wrong(True))
        for k in range(100)
    ]
    assert Accuracy.of(rollouts, problems).p95_length == 95
    assert Accuracy.of(rollouts[:1], problems).p95_length == 1


def test_pass_at_k_has_its_own_standard_error_and_is_written_for_several_k(tmp_path):
    accuracy = graded({"a": [1, 0, 0, 0, 0, 0], "b": [0] * 6, "c": [1] * 6})
    assert list(accuracy.pass_at_powers) == [1, 2, 4, 6]
    values = [1 - 10 / 15, 0, 1]  # C(5, 2) / C(6, 2)
    assert accuracy.pass_at(2).mean == pytest.approx(statistics.fmean(values))
    error = statistics.stdev(values) / math.sqrt(3)
    assert accuracy.pass_at(2).standard_error == pytest.approx(error)
    path = tmp_path / "results.json"
    ResultsFile({"m": {"s": accuracy}}, {}).write(path)
    written = json.loads(path.read_text())["models"]["m"]["s"]["pass_at"]
    assert written["2"] == {"mean": pytest.approx(4 / 9), "standard_error": pytest.approx(error)}


def test_differences_of_single_answers_are_mcnemars():
    """b answers lost, c gained of n: variance of the mean (b + c - (b - c)^2 / n) / (n (n - 1))."""
    n, lost, gained = 50, 9, 4
    before = {str(i): float(i < 30) for i in range(n)}
    after = before | {str(i): 0.0 for i in range(lost)} | {str(40 + i): 1.0 for i in range(gained)}
    groups = dict.fromkeys(before, "t")
    first, second = (
        Accuracy.of_answers(values, groups, metric="acc", truncated=0.0)
        for values in (before, after)
    )
    difference = Difference.between(first, second)
    assert difference.mean == pytest.approx((lost - gained) / n)
    variance = (lost + gained - (lost - gained) ** 2 / n) / (n * (n - 1))
    assert difference.standard_error == pytest.approx(math.sqrt(variance))
    assert (difference.gained, difference.lost) == (lost, gained), "of first minus second"
    half = 2 * difference.standard_error
    assert difference.interval == pytest.approx((difference.mean - half, difference.mean + half))


def test_results_of_an_earlier_version_are_read(tmp_path):
    path = tmp_path / "results.json"
    ResultsFile({"base": {"heldout": graded({"a": [1, 0], "b": [0, 0]})}}, {}).write(path)
    content = json.loads(path.read_text())
    del content["sources"], content["versions"], content["asked"]
    for name in ("pass_at", "p95_length", "majority", "metric"):
        del content["models"]["base"]["heldout"][name]
    path.write_text(json.dumps(content))
    read = ResultsFile.read(path)
    assert read.models["base"]["heldout"].mean == 0.25 and read.sources == {}
