import time

import pytest

from nemo_paced.config import GradingConfig
from nemo_paced.errors import GradingError
from nemo_paced.rollout.grading import Grader, extract_answer, normalize


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\nAnswer: 42", "42"),
        ("Answer: 1\nno\nanswer:  7 ", "7"),
        (r"it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("first 3 then 1,234", "1,234"),
        ("nothing", None),
        (r"\boxed{unclosed", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert extract_answer(text) == answer


def test_normalisation_is_light():
    assert normalize(r" $\text{Yes}$. ") == "yes"
    assert normalize("1,234,567") == "1234567"
    assert normalize("(1,2)") == "(1,2)"


MATH = [
    ("Answer: 42", "42", True),
    ("Answer: 42.0", "42", True),
    ("Answer: 41", "42", False),
    (r"\boxed{\frac12}", "1/2", True),
    (r"\boxed{0.5}", r"\frac{1}{2}", True),
    (r"Answer: $x^2+2x+1$", "(x+1)^2", True),
    (r"Answer: $\{1,2\}$", r"\{2,1\}", True),
    ("Answer: 1,234", "1234", True),
    ("I do not know", "3", False),
    ("", "3", False),
    ("Answer: __import__('os').system('touch /tmp/evaluated')", "3", False),
]


def test_math_answers_are_judged():
    with Grader(GradingConfig(num_workers=1)) as grader:
        for text, answer, correct in MATH:
            assert grader.grade(text, answer).correct is correct, (text, answer)


def _hang(gold, answer):
    time.sleep(60)


def test_a_comparison_that_hangs_is_ended_and_the_next_one_works(monkeypatch):
    with Grader(GradingConfig(num_workers=1, time_limit_s=1.0)) as grader:
        grader.grade("Answer: x", "y")  # workers are up
        began = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr("nemo_paced.rollout.grading._math_verify", _hang)
            verdict = grader.grade("Answer: a+b", "c")
        assert not verdict.correct and "longer than 1 s" in verdict.reason
        assert time.monotonic() - began < 10
        assert grader.grade("Answer: x+1", "1+x").correct


def test_exact_choice_and_own_verifiers():
    with Grader(GradingConfig(verifier="exact")) as grader:
        assert grader.grade("s1 s2 s3", "s3").correct
        assert not grader.grade("s3 s2", "s3").correct
        assert grader.grade("", "s3").reason == "empty response"
        assert "truncated" in grader.grade("s1", "s3", truncated=True).reason
    with Grader(GradingConfig(verifier="multiple_choice")) as grader:
        assert grader.grade("A or B? Answer: (C)", "C").correct
        assert not grader.grade("Answer: B", "C").correct
    with Grader(GradingConfig(verifier="operator:contains")) as grader:
        assert grader.grade("abc", "b").correct
    with pytest.raises(GradingError, match="no function"):
        Grader(GradingConfig(verifier="nope"))
    with Grader(GradingConfig(verifier="operator:add")) as grader, pytest.raises(GradingError):
        grader.grade("a", "b")
