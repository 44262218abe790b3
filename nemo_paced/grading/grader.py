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
    agree,
    extract_choice,
    items,
    normalize,
    without_unit,
)
from nemo_paced.grading.evidence import Evidence, find_answer, without_thought
from nemo_paced.grading.verifier_pool import TimedOut, VerifierPool, WorkerDied, load_function

SYMBOLIC = "nemo_paced.grading.answers:symbolically_equal"
MOST_PARSED = 2  # readings of an answer that math-verify is asked about
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
        self,
        text: str,
        answer: str,
        *,
        accepted: Sequence[str] = (),
        truncated: bool = False,
        said: str | None = None,
    ) -> Verdict:
        """Verdict on the response ``text``.

        Args:
            accepted: other answers that are right too.
            said: what it says behind its thought, where tokens tell; your own verifier gets all.
            truncated: whether it was cut at a limit: it is right only by an answer that it had
                marked and ended before, and by no other.
        """
        text = text if said is None or self._is_own else said
        verdict = self._verify(text, answer, truncated)
        for other in accepted:
            if verdict.correct:
                break
            second = self._verify(text, other, truncated)
            verdict = second if second.correct else verdict
        if truncated and not verdict.correct:
            return Verdict(False, verdict.extracted, f"truncated; {verdict.reason}")
        return verdict

    def _verifier(self, name: str) -> Callable[[str, str, bool], Verdict]:
        self._pool: VerifierPool | None = None
        self._is_own = False
        simple = {"exact": _exact, "multiple_choice": _multiple_choice}
        if name in simple:
            return simple[name]
        own = self._is_own = name != "math"
        if own:
            load_function(name)  # a wrong name is refused before anything starts
        self._pool = VerifierPool(
            name if own else SYMBOLIC,
            num_workers=self.config.num_workers,
            time_limit_s=self.config.time_limit_s,
            memory_limit=None if own else SYMBOLIC_MEMORY,
        )
        return self._own if own else self._math

    def _math(self, text: str, answer: str, truncated: bool) -> Verdict:
        found = find_answer(text, truncated=truncated)
        if found.answer is None:
            cut = found.evidence is Evidence.cut
            return Verdict(False, None, "answer cut off" if cut else "no answer found")
        readings = [each for each in found.readings if len(each) <= MAX_SYMBOLIC_LENGTH]
        if len(set(map(normalize, found.boxes))) > 1:
            together = ", ".join(found.boxes)
            if len(items(answer)) == 1:
                return Verdict(False, together, "several answers")
            readings.insert(0, together)  # they are the list asked for
        open_ones, verdict = [], Verdict(False, found.answer, "too long for a final answer")
        for number, reading in enumerate(readings):
            if not normalize(reading):
                continue
            equal, how = agree(reading, answer, self.config.numeric_tolerance)
            if equal:
                return Verdict(True, reading, how)
            if equal is None:
                open_ones.append(reading)
            elif number == 0:
                return Verdict(False, reading, how)  # no part of it says something else
        for reading in open_ones[:MOST_PARSED]:
            ours, reference = without_unit(reading, answer)
            verdict = self._ask(ours, reference, extracted=reading, reason="math-verify")
            if verdict.correct:
                break
        return verdict

    def _own(self, text: str, answer: str, truncated: bool) -> Verdict:
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


def _exact(text: str, answer: str, truncated: bool) -> Verdict:
    words = without_thought(text).split()
    if not words or truncated:
        return Verdict(False, None, "no last word" if text.strip() else "empty response")
    return Verdict(words[-1] == answer.strip(), words[-1], "last word")


def _multiple_choice(text: str, answer: str, truncated: bool) -> Verdict:
    letter = extract_choice(text, truncated=truncated)
    if letter is None:
        return Verdict(False, None, "no choice found")
    return Verdict(letter == answer.strip().strip("().").upper(), letter, "last choice")
