import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_paced.config import GradingConfig
from nemo_paced.errors import ConfigError, GradingError
from nemo_paced.grading.answers import (
    MAX_SYMBOLIC_LENGTH,
    Comparison,
    agree,
    items,
    numbers_agree,
    without_units,
)
from nemo_paced.grading.choices import find_choice
from nemo_paced.grading.evidence import Evidence, find_answer, last_boxed
from nemo_paced.grading.grader import Grader, rules
from nemo_paced.grading.notation import normalize
from nemo_paced.records import Outcome
from tests.unit.grading.generated_cases import frame_cases, notation_cases

CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("grading_cases.jsonl").read_text().splitlines()
]
OWN = "tests.unit.grading.verifiers:judge"


def test_the_labelled_cases_are_judged_as_labelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong, reasons = set(), {}
    with (
        Grader(GradingConfig(num_workers=1, time_limit_s=2.0)) as grader,
        Grader(GradingConfig("multiple_choice")) as chooser,
    ):
        for case in CASES:
            cut, judge = case.get("truncated", False), chooser if "verifier" in case else grader
            verdict = judge.grade(case["text"], case["answer"], truncated=cut)
            key = (case["text"].splitlines()[-1] if case["text"].strip() else "", case["answer"])
            reasons[key] = verdict.reason
            if verdict.correct is not case["correct"]:
                wrong.add(key)
    assert not wrong and len(CASES) >= 1300
    assert reasons["Answer: 9^{9^{9^{9}}}", "3"] == "math-verify: timed out after 2 s"
    assert not list(tmp_path.iterdir()), "no response was evaluated"


def test_values_in_many_notations_and_their_near_misses_are_told_apart():
    cases = [*notation_cases(), *frame_cases()]
    assert len(cases) > 1000 and sum(not case.right for case in cases) > 300
    with Grader(GradingConfig(num_workers=2)) as grader, ThreadPoolExecutor(2) as threads:

        def judged(case):
            return grader.grade(case.response, case.reference, truncated=case.truncated).correct

        verdicts = threads.map(judged, cases)
        wrong = [case for case, right in zip(cases, verdicts, strict=True) if right != case.right]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\nAnswer: 42", "42"),
        ("Answer: 1\nno\nanswer:  7 ", "7"),
        (r"it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("Answer: 3\nno, it is \\boxed{7}", "7"),
        ("\\boxed{7}, no\nAnswer: 3", "3"),
        ("first 3 then 1,234", "1,234"),
        ("nothing", None),
        (r"\boxed{unclosed", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert find_answer(text).answer == answer


def test_normalisation_is_light():
    assert normalize(r" $\text{Yes}$. ") == "yes"
    assert normalize("1,234,567") == "1234567"
    assert normalize("(1,2)") == "(1,2)" and normalize("(1,234)") == "(1,234)"
    assert normalize("1 1/2") == "1 1/2" and normalize("X") == "X"


def test_decimals_agree_within_the_tolerance_and_integers_exactly():
    assert numbers_agree("3.14", "3.14159", 1e-3)
    assert numbers_agree("3.14", "3.14159", 1e-4) is False
    assert numbers_agree("100000001", "100000000", 1e-3) is False
    assert numbers_agree("x", "3", 0.1) is None
    with Grader(GradingConfig(numeric_tolerance=0.01)) as grader:
        assert grader.grade("Answer: 3.14", "3.1416").correct
    with pytest.raises(ConfigError, match=r"grading.numeric_tolerance is -1"):
        GradingConfig(numeric_tolerance=-1)
    with pytest.raises(ConfigError, match=r"grading.num_workers is 0"):
        GradingConfig(num_workers=0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A or B? Answer: (C)", "C"),
        ("Answer: c", "C"),
        (r"It is \boxed{\text{D}}", "D"),
        ("Answer: B) 12 m", "B"),
        ("Answer: B or C", None),
        ("Answer: B) No solution", "B"),
        ("Answer: C) The sum and the product", "C"),
        ("Answer: D. The mean is not affected", "D"),
        ("Answer: E: vitamin D", "E"),
        ("The answer is (A) not enough information.", "A"),
        (r"\boxed{B}. The other options are not right.", "B"),
        ("Answer: (B) or (C)", None),
        ("Answer: not B", None),
        ("Answer: A: no, B", None),
        ("Answer: C. Actually D", None),
        ("Option A is wrong, so I choose (C), not (D).", "C"),
        ("I think A train is slow, so option (B) it is. I am sure.", "B"),
        ("Between B and D, D. A sure thing.", "D"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_choice_is_found(text, letter):
    assert find_choice(text).answer == letter


def test_one_hanging_item_costs_one_worker_and_no_other_verdict():
    with Grader(GradingConfig(OWN, num_workers=2, time_limit_s=2.0)) as grader:
        verdicts = {}
        assert grader.grade("a", "a").correct  # a worker is up
        threads = [
            threading.Thread(target=lambda t=t: verdicts.__setitem__(t, grader.grade(t, "slow")))
            for t in ("hang", "slow")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verdicts["slow"].correct
        assert verdicts["hang"].reason == f"{OWN}: timed out after 2 s"
        assert not verdicts["hang"].correct
        began = time.monotonic()
        verdict = grader.grade("die", "a")
        assert not verdict.correct and "died (exit code 3)" in verdict.reason
        assert grader.grade("b", "b").correct, "the pool goes on"
        assert time.monotonic() - began < 30


def test_what_breaks_the_contract_of_a_verifier_is_an_error():
    with Grader(GradingConfig(OWN)) as grader:
        with pytest.raises(GradingError, match="ZeroDivisionError: in my verifier"):
            grader.grade("raise", "a")
        assert grader.grade("a", "a").correct
    with (
        Grader(GradingConfig("tests.unit.grading.verifiers:number")) as grader,
        pytest.raises(GradingError, match="returned 1, not a bool"),
    ):
        grader.grade("a", "b")
    with pytest.raises(GradingError, match="no function"):
        Grader(GradingConfig("nope"))
    with pytest.raises(GradingError, match="cannot be called"):
        Grader(GradingConfig("tests.unit.grading.verifiers:NOT_CALLABLE"))


OUTCOMES = [
    ("math", "Answer: 7\n", "7", {}, Outcome.right, Evidence.line, Comparison.text),
    ("math", r"so \boxed{8}", "7", {}, Outcome.wrong, Evidence.box, Comparison.numbers),
    ("math", r"\boxed{x+1}", "1+x", {}, Outcome.right, Evidence.box, Comparison.symbolic),
    ("math", "so it is 7", "7", {}, Outcome.right, Evidence.number, Comparison.text),
    ("math", "I do not know", "7", {}, Outcome.unanswered, Evidence.none, Comparison.none),
    ("math", r"\boxed{7", "7", {}, Outcome.unanswered, Evidence.cut, Comparison.none),
    ("math", "so 7 and", "7", {"truncated": True}, Outcome.truncated, Evidence.none, None),
    ("math", r"\boxed{7", "7", {"truncated": True}, Outcome.truncated, Evidence.cut, None),
    ("math", "Answer: 7\nso", "7", {"truncated": True}, Outcome.right, Evidence.line, None),
    ("math", "Answer: 8\nso", "7", {"truncated": True}, Outcome.wrong, Evidence.line, None),
    ("math", r"\boxed{9^{9^{9^9}}}", "3", {}, Outcome.timed_out, Evidence.box, None),
    ("math", "#### 1, 2", "2, 1", {}, Outcome.right, Evidence.hashes, Comparison.lists),
    ("multiple_choice", "Answer: B", "B", {}, Outcome.right, Evidence.line, Comparison.letter),
    ("multiple_choice", "option (B)", "A", {}, Outcome.wrong, Evidence.option, Comparison.letter),
    ("multiple_choice", "none", "A", {}, Outcome.unanswered, Evidence.none, Comparison.none),
    ("multiple_choice", "(B)", "B", {"truncated": True}, Outcome.truncated, Evidence.none, None),
    ("exact", "a b", "b", {}, Outcome.right, Evidence.word, Comparison.word),
    ("exact", "a b", "a", {}, Outcome.wrong, Evidence.word, Comparison.word),
    ("exact", " ", "a", {}, Outcome.unanswered, Evidence.none, Comparison.none),
    ("exact", "a b", "b", {"truncated": True}, Outcome.truncated, Evidence.none, None),
    (OWN, "a", "a", {}, Outcome.right, Evidence.own, Comparison.own),
    (OWN, "a", "b", {}, Outcome.wrong, Evidence.own, Comparison.own),
    (OWN, "a", "b", {"truncated": True}, Outcome.truncated, Evidence.own, Comparison.own),
    (OWN, "hang", "b", {}, Outcome.timed_out, Evidence.own, Comparison.own),
    (OWN, "die", "b", {}, Outcome.timed_out, Evidence.own, Comparison.own),
    (OWN, "forget", "b", {}, Outcome.timed_out, Evidence.own, Comparison.own),
    (OWN, "hang", "b", {"accepted": ["hang"]}, Outcome.timed_out, Evidence.own, None),
    (OWN, "a", "b", {"accepted": ["c", "a"]}, Outcome.right, Evidence.own, None),
]


@pytest.mark.parametrize("verifier", sorted({case[0] for case in OUTCOMES}))
def test_five_things_become_of_a_response_and_what_they_rest_on_is_told(verifier):
    with Grader(GradingConfig(verifier, time_limit_s=1.0)) as grader:
        for name, text, answer, how, outcome, evidence, comparison in OUTCOMES:
            if name != verifier:
                continue
            verdict = grader.grade(text, answer, **how)
            found = verdict.outcome, verdict.evidence, comparison and verdict.comparison
            assert found == (outcome, evidence, comparison), (text, verdict)
            assert verdict.correct is (outcome is Outcome.right) and verdict.reason


def test_an_answer_that_another_accepted_one_left_open_has_no_verdict():
    with Grader(GradingConfig(time_limit_s=1.0)) as grader:
        text, tower = r"\boxed{9^{9^{9^9}}}", "9^{9^{9^8}}"
        assert grader.grade(text, "x", accepted=[tower]).outcome is Outcome.timed_out
        assert grader.grade(text, tower, accepted=[text]).correct


@pytest.mark.parametrize(
    ("verifier", "unmarked", "marked"),
    [("math", "so it is 7", r"\boxed{7}"), ("multiple_choice", "option (B)", r"\boxed{B}")],
)
def test_only_what_is_marked_counts_where_one_says_so(verifier, unmarked, marked):
    answer = "7" if verifier == "math" else "B"
    with (
        Grader(GradingConfig(verifier)) as both,
        Grader(GradingConfig(verifier, last_number=False)) as marks,
    ):
        assert both.grade(unmarked, answer).correct and both.grade(marked, answer).correct
        assert marks.grade(unmarked, answer).outcome is Outcome.unanswered
        assert marks.grade(marked, answer).correct
        assert rules(both.config) != rules(marks.config)


def test_the_exact_verifier_and_truncation():
    with Grader(GradingConfig(verifier="exact")) as grader:
        assert grader.grade("s1 s2 s3", "s3").correct
        assert not grader.grade("s3 s2", "s3").correct
        assert grader.grade("", "s3").reason == "empty response"
        assert "truncated" in grader.grade("s1", "s3", truncated=True).reason
        assert not grader.grade("s3", "s3", truncated=True).correct, "it may have gone on"


@pytest.mark.parametrize(
    ("said", "correct"), [(None, False), ("Answer: 7", True), ("", False), ("I do not know", False)]
)
def test_what_is_said_behind_a_thought_counts_alone(said, correct):
    with Grader(GradingConfig()) as grader:
        assert grader.grade("so 7? no, 8. Answer: 8", "7", said=said).correct is correct
        assert not grader.grade("Answer: 7", "8", said=said).correct
    with Grader(GradingConfig(OWN)) as grader:
        assert grader.grade("whole", "whole", said=said).correct, "your own gets all of it"


HOSTILE = {
    "boxes that never close": "\\boxed{" * 14_000,
    "nested boxes": "\\boxed{" * 7_000 + "1" + "}" * 7_000,
    "empty boxes": "\\boxed{}" * 11_000,
    "bare boxes": "\\boxed " * 14_000,
    "braces": "\\boxed" + "{" * 100_000,
    "sentences": "answer is the " * 7_000,
    "sentences of mathematics": "the answer is $x$ " * 5_500,
    "lines": "answer: " * 12_000,
    "headings": "Final Answer\n" * 7_500,
    "marks": "####\n" * 20_000,
    "spaces": "Answer:" + " " * 100_000,
    "spaces in a line": "Answer: 1" + " " * 100_000 + "x 10 ^ 5",
    "line ends": "Answer:" + "\n" * 100_000,
    "stars": "answer" + "*" * 100_000,
    "dots": "Answer: " + ". " * 50_000,
    "digits": "9" * 100_000,
    "commas": "Answer: " + "1," * 50_000,
    "slashes": "Answer: " + "1/" * 50_000,
    "powers": "Answer: " + "9^" * 50_000 + "9",
    "brackets": "Answer: " + "(" * 50_000 + ")" * 50_000,
    "fractions": "Answer: " + "\\frac{1}" * 10_000,
    "dollars": "the answer is " + "$" * 100_000,
    "thoughts": "<think>" * 7_000 + "</think>" * 7_000,
    "letters": "A " * 50_000,
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_text_holds_nothing_up(name):
    """Tens of milliseconds; scans in the square of the length took seconds, some grammars days."""
    text = HOSTILE[name]
    began = time.process_time()
    for truncated in (False, True):
        found = find_answer(text, truncated=truncated)
        for reading in found.readings:
            agree(reading[:MAX_SYMBOLIC_LENGTH], "7", 1e-6)
        find_choice(text, truncated=truncated)
    last_boxed(text)
    assert time.process_time() - began < 5, "something hangs"


def test_fuzzed_text_is_graded_without_an_error():
    pieces = [*"0123456789.,/^(){}[]$\\-+ \n*#=", *EVIDENCE]
    rng = random.Random(18)
    for _ in range(4000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(60)))
        answer = "".join(rng.choice(pieces) for _ in range(1 + rng.randrange(12)))
        for truncated in (False, True):
            found = find_answer(text, truncated=truncated)
            for reading in (*found.readings, *found.boxes):
                agree(reading, answer, 1e-6)
            find_choice(text, truncated=truncated)
        last_boxed(text)
        items(answer)
        without_units(text, answer)


EVIDENCE = (
    *("\\boxed{", "\\boxed", "answer is ", "Answer: ", "#### ", "\\frac{", "\\text{ cm}"),
    *("\\overline{", "<think>", "</think>", "e5", "!", "\\cdot", "_8", " and ", "A) "),
    *("x = ", "\\{", "\\}", "**"),
)


def test_no_answer_pays_for_the_start_of_a_worker():
    own = "tests.unit.grading.slow_to_start:judge"
    with Grader(GradingConfig(own, num_workers=1, time_limit_s=0.9)) as grader:
        assert grader.grade("a", "a").correct


@pytest.mark.parametrize(
    ("frame", "end"),
    [
        (r"So the answer is $\boxed{A}$. Done.", "}"),
        (r"Not \boxed{B}, it is \boxed{A}. Done.", "}"),
        ("**Answer:** A\nDone.", "\n"),
        ("so\n#### A\nDone.", "\n"),
        ("### Final Answer\n\nA\nDone.", "A\n"),
        ("<think>A? B? A!</think>Answer: A\nDone.", "A\n"),
    ],
)
def test_a_response_that_is_cut_before_its_answer_ends_is_never_right(frame, end):
    text = frame.replace("B", "24").replace("A", "42") if "Answer" not in frame else None
    text = text or re.sub(r"\bB\b", "24", re.sub(r"\bA\b", "42", frame))
    whole = text.rindex(end.replace("A", "42")) + len(end.replace("A", "42"))
    with Grader(GradingConfig()) as grader:
        for cut in range(len(text) + 1):
            verdict = grader.grade(text[:cut], "42", truncated=True)
            assert verdict.correct is (cut >= whole), text[:cut]
