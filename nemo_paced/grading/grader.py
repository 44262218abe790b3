"""Grading of responses by their final answer, with one of the verifiers of ``grading.verifier``.

``math``: the final answer as text, then as a number, then by math-verify (``answers.py``).
``exact``: the last word. ``multiple_choice``: the option A to J. ``module:function``: your own,
called as ``function(text, answer) -> bool``.

Model output is never evaluated. math-verify and your own verifier run in worker processes, one of
which is killed when an item takes longer than ``grading.time_limit_s``: there is no verdict then.
This is no sandbox: your own verifier runs with your rights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from nemo_paced.config import GradingConfig
from nemo_paced.errors import GradingError
from nemo_paced.files import digest, file_digest
from nemo_paced.grading.answers import (
    MAX_SYMBOLIC_LENGTH,
    Comparison,
    agree,
    items,
    without_units,
)
from nemo_paced.grading.choices import find_choice
from nemo_paced.grading.evidence import Evidence, find_answer, without_thought
from nemo_paced.grading.notation import normalize
from nemo_paced.grading.verifier_pool import TimedOut, VerifierPool, WorkerDied, load_function
from nemo_paced.records import Outcome

SYMBOLIC = "nemo_paced.grading.symbolic:symbolically_equal"
# files that make verdicts
_RULES = tuple(
    f"{part}.py"
    for part in (
        *("grader", "evidence", "readings", "notation", "answers", "choices", "symbolic", "units"),
        "exact",
    )
)
MOST_PARSED = 2  # readings of an answer that math-verify is asked about
SYMBOLIC_MEMORY = 4 * 2**30  # bytes: a power tower must not take the trainer's memory


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict on one response.

    Attributes:
        extracted: the answer read out of the text; ``None`` for none, and by your own verifier.
        reason: why, for a human reader.
        evidence: by what mark the answer was read.
        comparison: how it was compared with the reference answer.
    """

    outcome: Outcome
    extracted: str | None
    reason: str
    evidence: Evidence
    comparison: Comparison

    @property
    def correct(self) -> bool:
        """Whether it is right."""
        return self.outcome is Outcome.right


class Grader:
    """Grader of responses, and context manager of its worker processes, which start when needed.

    Several threads may use it.

    Raises:
        GradingError: a verifier that cannot be loaded, raised, or did not return a bool.
    """

    def __init__(self, config: GradingConfig) -> None:
        self.config = config
        self._pool: VerifierPool | None = None
        self._is_own = False
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
            if second.correct or second.outcome is Outcome.timed_out:
                verdict = second
        return verdict

    def _verifier(self, name: str) -> Callable[[str, str, bool], Verdict]:
        simple = {"exact": _exact, "multiple_choice": self._multiple_choice}
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
        found = find_answer(text, truncated=truncated, last_number=self.config.last_number)
        if found.answer is None:
            return _without_answer(found.evidence, truncated)
        readings = [each for each in found.readings if len(each) <= MAX_SYMBOLIC_LENGTH]
        if len(set(map(normalize, found.boxes))) > 1:
            together = ", ".join(found.boxes)
            if len(items(answer)) == 1:
                return _verdict(False, together, found.evidence, Comparison.lists)
            readings.insert(0, together)  # they are the list asked for
        open_ones: dict[str, str] = {}  # by what is left of them after normalisation
        for number, reading in enumerate(readings):
            if not normalize(reading):
                continue
            equal, how = agree(reading, answer, self.config.numeric_tolerance)
            if equal:
                return _verdict(True, reading, found.evidence, how)
            if equal is None:
                open_ones.setdefault(normalize(reading), reading)
            elif number == 0:
                return _verdict(False, reading, found.evidence, how)  # no part says something else
        verdict = _verdict(False, found.answer, found.evidence, Comparison.none)
        for reading in sorted(open_ones.values(), key=len)[:MOST_PARSED]:
            ours, reference = without_units(reading, answer)
            found_so = (reading, found.evidence, Comparison.symbolic)
            verdict = self._ask(ours, reference, found_so)
            if verdict.correct:
                break
        return verdict

    def _multiple_choice(self, text: str, answer: str, truncated: bool) -> Verdict:
        unmarked = self.config.last_number
        found = find_choice(text, truncated=truncated, unmarked=unmarked)
        if found.answer is None:
            return _without_answer(found.evidence, truncated, "no choice found")
        right = found.answer == answer.strip().strip("().").upper()
        return _verdict(right, found.answer, found.evidence, Comparison.letter)

    def _own(self, text: str, answer: str, truncated: bool) -> Verdict:
        verdict = self._ask(text, answer, (None, Evidence.own, Comparison.own))
        if truncated and verdict.outcome is Outcome.wrong:
            return replace(verdict, outcome=Outcome.truncated)
        return verdict

    def _ask(
        self, text: str, answer: str, found: tuple[str | None, Evidence, Comparison]
    ) -> Verdict:
        """Verdict of a worker process; where it times out or dies there is none."""
        assert self._pool is not None, "only verifiers with a pool ask it"
        name = self.config.verifier if self._is_own else found[2].value
        extra = () if self._is_own else (self.config.numeric_tolerance,)
        try:
            correct = self._pool.call(text, answer, *extra)
        except (TimedOut, WorkerDied) as error:
            extracted, evidence, comparison = found
            reason = f"{name}: {error}"
            return Verdict(Outcome.timed_out, extracted, reason, evidence, comparison)
        if not isinstance(correct, bool):
            raise GradingError(f"grading.verifier {name} returned {correct!r}, not a bool")
        return _verdict(correct, *found)


def rules(config: GradingConfig) -> list[str | float | bool]:
    """What verdicts depend on besides text and answers; a change means to grade again.

    Of your own verifier it is the module that holds it, not what that imports.
    """
    files = [Path(__file__).with_name(name) for name in _RULES]
    if ":" in config.verifier:
        own = sys.modules[load_function(config.verifier).__module__]
        file = getattr(own, "__file__", None)  # a built-in module has none
        files = [Path(file)] if file else []
    settings = [config.numeric_tolerance, config.last_number, config.time_limit_s]
    sources = [file_digest(path) for path in files]
    return [config.verifier, *settings, version("math-verify"), digest(sources)]


def _verdict(
    correct: bool, extracted: str | None, evidence: Evidence, comparison: Comparison
) -> Verdict:
    reason = _WHY[comparison].format(evidence=evidence.value)
    outcome = Outcome.right if correct else Outcome.wrong
    return Verdict(outcome, extracted, reason, evidence, comparison)


_WHY = {
    Comparison.text: "{evidence}: equal after normalisation",
    Comparison.numbers: "{evidence}: compared as numbers",
    Comparison.lists: "{evidence}: compared as lists",
    Comparison.letter: "{evidence}: the letter of a choice",
    Comparison.symbolic: "{evidence}: compared by math-verify",
    Comparison.own: "{evidence}",
    Comparison.word: "{evidence}",
    Comparison.none: "{evidence}: too long for a final answer",
}


def _without_answer(evidence: Evidence, truncated: bool, why: str = "no answer found") -> Verdict:
    why = "answer cut off" if evidence is Evidence.cut else why
    outcome = Outcome.truncated if truncated else Outcome.unanswered
    reason = f"truncated; {why}" if truncated else why
    return Verdict(outcome, None, reason, evidence, Comparison.none)


def _exact(text: str, answer: str, truncated: bool) -> Verdict:
    words = without_thought(text).split()
    if not words or truncated:
        why = "no last word" if text.strip() else "empty response"
        return _without_answer(Evidence.none, truncated, why)
    return _verdict(words[-1] == answer.strip(), words[-1], Evidence.word, Comparison.word)
