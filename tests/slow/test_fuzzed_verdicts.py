"""A minute of made-up and mangled responses: every one gets a verdict, in time."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_paced.config import GradingConfig
from nemo_paced.grading.answers import MAX_SYMBOLIC_LENGTH
from nemo_paced.grading.grader import Grader
from nemo_paced.grading.notation import normalize
from nemo_paced.records import Outcome
from tests.unit.grading.generated_cases import frame_cases, notation_cases

pytestmark = pytest.mark.slow

SECONDS = 60
LONGEST = 100_000  # characters
PIECES = (
    *("\\boxed{", "\\boxed", "\\fbox{", "answer is ", "Answer:", "#### ", "\\frac{1}{", " cm", "i"),
    *("\\overline{", "<think>", "</think>", "e5", "!", "\\cdot", "_8", " and ", "A) ", "(B)", "\n"),
    *("x = ", "\\{", "\\}", "**", "$", "^", "{", "}", "(", ")", ",", ".", "-", "1", "23", "007"),
    *("\\begin{pmatrix}", "\\\\", "&", "\\end{pmatrix}", "\\pm", "\\sqrt", "\\pi", "\\infty", "|"),
    *("No, wait, ", "not ", " or ", "%", "°", "½", "√", "∞", "\u202e", "\x00", "é", "：", " mod "),
)  # fmt: skip
CASES = [*notation_cases(), *frame_cases()]


def mangled(rng):
    """A response: a case's with pieces left out, doubled, swapped or put in; or pieces alone."""
    if rng.random() < 0.3:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(80)))
    else:
        text = rng.choice(CASES).response
    for _ in range(rng.randrange(4)):
        begin = rng.randrange(len(text) + 1)
        end = min(len(text), begin + rng.randrange(12))
        other = rng.choice(("", rng.choice(PIECES), 2 * text[begin:end], text[begin:end][::-1]))
        text = text[:begin] + other + text[end:]
    if rng.random() < 0.02 and text:
        text = text * (LONGEST // len(text))
    return text


def test_every_response_gets_a_verdict_in_time():
    rng = random.Random(18)
    number, slowest, found = 0, 0.0, set()
    began = time.monotonic()

    def judge(job):
        text, answer, truncated = job
        before = time.thread_time()
        verdict = grader.grade(text, answer, truncated=truncated)
        return verdict, time.thread_time() - before, job

    with (
        Grader(GradingConfig(num_workers=2, time_limit_s=2.0)) as grader,
        Grader(GradingConfig("multiple_choice")) as chooser,
        ThreadPoolExecutor(2) as threads,
    ):
        while time.monotonic() - began < SECONDS:
            jobs = [
                (mangled(rng), rng.choice(CASES).reference, rng.random() < 0.5) for _ in range(64)
            ]
            for verdict, took, (text, _, truncated) in threads.map(judge, jobs):
                slowest = max(slowest, took)
                found.add(verdict.outcome)
                if verdict.outcome in (Outcome.right, Outcome.wrong):
                    assert verdict.extracted is not None, text
                assert truncated or verdict.outcome is not Outcome.truncated, text
                chosen = chooser.grade(text, "B", truncated=truncated)
                assert chosen.outcome is not Outcome.timed_out, text
                number += 1
    assert found == set(Outcome), f"{number} responses did not reach all outcomes"
    assert slowest < 5, "something hangs"


def test_an_answer_is_itself():
    """However odd it is: what a reference says word for word is right."""
    rng = random.Random(19)
    with Grader(GradingConfig(num_workers=2, time_limit_s=2.0)) as grader:
        for _ in range(3000):
            answer = rng.choice(CASES).reference + rng.choice(("", "", rng.choice(PIECES)))
            plain = "\\boxed" not in answer and "\\fbox" not in answer and "think>" not in answer
            balanced = answer.count("{") == answer.count("}") and not answer.endswith("\\")
            if not (plain and balanced and normalize(answer)) or len(answer) > MAX_SYMBOLIC_LENGTH:
                continue
            verdict = grader.grade(f"So it is \\boxed{{{answer}}}.", answer)
            assert verdict.correct, (answer, verdict)
