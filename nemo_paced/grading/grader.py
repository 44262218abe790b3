"""Grading of responses by their final answer, with one of the verifiers of ``grading.verifier``.

``math``: the final answer as text, then as a number, then by math-verify (``answers.py``).
``exact``: the last word. ``multiple_choice``: the option A to J. ``module:function``: your own,
called as ``function(text, answer) -> bool``.

Model output is never evaluated. math-verify and your own verifier run in worker processes, one of
which is killed when an item takes longer than ``grading.time_limit_s``: the verdict is wrong, the
reason says so. This is no sandbox: your own verifier runs with your rights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_paced.config import GradingConfig
from nemo_paced.errors import GradingError
from nemo_paced.grading.answers import (
    MAX_SYMBOLIC_LENGTH,
    extract_answer,
    extract_choice,
    normalize,
    numbers_agree,
)
from nemo_paced.grading.verifier_pool import TimedOut, VerifierPool, WorkerDied, load_function

SYMBOLIC = "nemo_paced.grading.answers:symbolically_equal"
SYMBOLIC_MEMORY = 4 * 2**30  # bytes: a power tower must not take the trainer's memory


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict on one response.

    Attributes:
        correct: whether it is right.
        extracted: the answer read out of the text; ``None`` for none, and by your own verifier.
        reason: why, for a human reader.
    """

    correct: bool
    extracted: str | None
    reason: str


class Grader:
    """Grader of responses, and context manager of its worker processes, which start when needed.

    Several threads may use it.

    Raises:
        GradingError: a verifier that cannot be loaded, raised, or did not return a bool.
    """

    def __init__(self, config: GradingConfig) -> None:
        self.config = config
        self._verify = self._verifier(config.verifier)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def grade(
        self, text: str, answer: str, *, accepted: Sequence[str] = (), truncated: bool = False
    ) -> Verdict:
        """Verdict on the response ``text``; a truncated one is graded as it stands.

        Args:
            accepted: other answers that are right too.
        """
        verdict = self._verify(text, answer)
        for other in accepted:
            if verdict.correct:
                break
            second = self._verify(text, other)
            verdict = second if second.correct else verdict
        if truncated and not verdict.correct:
            return Verdict(False, verdict.extracted, f"truncated; {verdict.reason}")
        return verdict

    def _verifier(self, name: str) -> Callable[[str, str], Verdict]:
        self._pool: VerifierPool | None = None
        simple = {"exact": _exact, "multiple_choice": _multiple_choice}
        if name in simple:
            return simple[name]
        own = name != "math"
        if own:
            load_function(name)  # a wrong name is refused before anything starts
        self._pool = VerifierPool(
            name if own else SYMBOLIC,
            num_workers=self.config.num_workers,
            time_limit_s=self.config.time_limit_s,
            memory_limit=None if own else SYMBOLIC_MEMORY,
        )
        return self._own if own else self._math

    def _math(self, text: str, answer: str) -> Verdict:
        extracted = extract_answer(text)
        if extracted is None or not normalize(extracted):
            return Verdict(False, extracted, "no answer found")
        if normalize(extracted) == normalize(answer):
            return Verdict(True, extracted, "equal after normalisation")
        equal = numbers_agree(extracted, answer, self.config.numeric_tolerance)
        if equal is not None:
            return Verdict(equal, extracted, "compared as numbers")
        if len(extracted) > MAX_SYMBOLIC_LENGTH:
            return Verdict(False, extracted, "too long for a final answer")
        return self._ask(extracted, answer, extracted=extracted, reason="math-verify")

    def _own(self, text: str, answer: str) -> Verdict:
        return self._ask(text, answer, extracted=None, reason=self.config.verifier)

    def _ask(self, text: str, answer: str, *, extracted: str | None, reason: str) -> Verdict:
        """Verdict of a worker process; one that times out or dies means wrong."""
        assert self._pool is not None, "only verifiers with a pool ask it"
        try:
            correct = self._pool.call(text, answer)
        except (TimedOut, WorkerDied) as error:
            return Verdict(False, extracted, f"{reason}: {error}")
        if not isinstance(correct, bool):
            raise GradingError(f"grading.verifier {reason} returned {correct!r}, not a bool")
        return Verdict(correct, extracted, reason)


def _exact(text: str, answer: str) -> Verdict:
    words = text.split()
    if not words:
        return Verdict(False, None, "empty response")
    return Verdict(words[-1] == answer.strip(), words[-1], "last word")


def _multiple_choice(text: str, answer: str) -> Verdict:
    letter = extract_choice(text)
    if letter is None:
        return Verdict(False, None, "no choice found")
    return Verdict(letter == answer.strip().strip("().").upper(), letter, "last choice")
