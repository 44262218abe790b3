"""Is the final answer of a response right?

``math``: the paper's light normalisation of the final answer (``Answer:`` line, ``\\boxed``, last
number), then math-verify for what text comparison does not settle. ``exact``: the last word.
``multiple_choice``: the last letter A to J that stands alone. ``module:function``: your own,
called as ``function(text, answer) -> bool``.

Model output is never evaluated. Symbolic comparison runs in worker processes that are ended when
an item takes longer than its limit. Not a sandbox: your own verifier runs with your rights.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_paced.config import GradingConfig
from nemo_paced.errors import GradingError

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

logger = logging.getLogger(__name__)

_ANSWER_LINE = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_CHOICE = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes: correct; extracted, the answer read out of the text; reason, for a reader."""

    correct: bool
    extracted: str | None
    reason: str


class Grader:
    """Context manager that holds the worker processes of the ``math`` verifier (started when
    needed)."""

    def __init__(self, config: GradingConfig) -> None:
        self.config = config
        self._pool: ProcessPoolExecutor | None = None
        self._verify = self._verifier(config.verifier)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_pool()

    def grade(self, text: str, answer: str, *, truncated: bool = False) -> Verdict:
        """Verdict on one response; a truncated one is graded as it stands."""
        verdict = self._verify(text, answer)
        if truncated and not verdict.correct:
            return Verdict(False, verdict.extracted, f"truncated; {verdict.reason}")
        return verdict

    def _verifier(self, name: str) -> Callable[[str, str], Verdict]:
        known = {"math": self._math, "exact": _exact, "multiple_choice": _multiple_choice}
        if name in known:
            return known[name]
        function = _load_function(name)

        def own(text: str, answer: str) -> Verdict:
            result = function(text, answer)
            if not isinstance(result, bool):
                raise GradingError(f"grading.verifier {name} returned {result!r}, not a bool")
            return Verdict(result, None, name)

        return own

    def _math(self, text: str, answer: str) -> Verdict:
        extracted = extract_answer(text)
        if extracted is None:
            return Verdict(False, None, "no answer found")
        if normalize(extracted) == normalize(answer):
            return Verdict(True, extracted, "equal after normalisation")
        if _both_plain_numbers(extracted, answer):
            correct = _number(extracted) == _number(answer)
            return Verdict(correct, extracted, "compared as numbers")
        return self._symbolic(extracted, answer)

    def _symbolic(self, extracted: str, answer: str) -> Verdict:
        """math-verify in a worker, which is ended when it does not come back in time."""
        try:
            future = self._workers().submit(_math_verify, answer, extracted)
            return Verdict(future.result(self.config.time_limit_s), extracted, "math-verify")
        except FutureTimeoutError:
            self._end_pool()
            limit = self.config.time_limit_s
            return Verdict(False, extracted, f"math-verify took longer than {limit:g} s")
        except BrokenProcessPool:
            self._end_pool()
            return Verdict(False, extracted, "math-verify died on it")

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            self._pool = ProcessPoolExecutor(
                max_workers=max(1, self.config.num_workers),
                mp_context=multiprocessing.get_context("spawn"),
            )
            self._pool.submit(_math_verify, "1", "1").result()  # imports do not count as grading
        return self._pool

    def _end_pool(self) -> None:
        if self._pool is None:
            return
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


def extract_answer(text: str) -> str | None:
    """The final answer: last ``\\boxed{}``, else last ``Answer:`` line, else last number."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    lines = _ANSWER_LINE.findall(text)
    if lines:
        return lines[-1].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def normalize(answer: str) -> str:
    """Light normalisation: spaces, dollar signs, text wrappers, thousands separators, final dot."""
    answer = answer.strip().rstrip(".").strip("$").strip()
    answer = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\(?:left|right|!|,|;|quad)", "", answer)
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    answer = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", answer)
    answer = re.sub(r"\s+", "", answer).rstrip(".")
    return answer.strip("*").lower()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index].strip()
    return None


def _both_plain_numbers(*answers: str) -> bool:
    return all(re.fullmatch(r"-?\d+(?:\.\d+)?", normalize(answer)) for answer in answers)


def _number(answer: str) -> float:
    return float(normalize(answer))


def _exact(text: str, answer: str) -> Verdict:
    words = text.split()
    extracted = words[-1] if words else None
    if extracted is None:
        return Verdict(False, None, "empty response")
    return Verdict(extracted == answer.strip(), extracted, "last word")


def _multiple_choice(text: str, answer: str) -> Verdict:
    lines = _ANSWER_LINE.findall(text)
    letters = _CHOICE.findall(lines[-1]) if lines else _CHOICE.findall(text)
    if not letters:
        return Verdict(False, None, "no choice found")
    return Verdict(letters[-1] == answer.strip().strip("()").upper(), letters[-1], "last choice")


def _math_verify(gold: str, answer: str) -> bool:
    """Runs in a worker; math-verify's own timer is off, the parent's is hard."""
    from math_verify import parse, verify

    parsed_gold = parse(f"${gold}$", parsing_timeout=None)
    parsed_answer = parse(f"${answer}$", parsing_timeout=None)
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None))


def _load_function(name: str) -> Callable[[str, str], Any]:
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise GradingError(
            f"grading.verifier is {name!r}: not math, exact or multiple_choice, and no function "
            f"module:function either ({error})"
        ) from error
