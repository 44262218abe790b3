"""The records that all parts of the package share: problems, responses, rollouts and pass rates.

Token ids travel, never text that would be tokenised a second time: a response is the ids that the
sampler produced (its EOS included when it stopped by itself) or that a tokenizer made once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a problem file.

    Attributes:
        id: unique within its file.
        problem: the statement, without any instruction or chat template.
        answer: the reference answer that the verifier compares with.
        solution: the expert solution y_E, when the file has one.
        group: a label to report accuracies by (``"train"``, a skill, a difficulty); free text.
        accepted: other answers that are right too.
    """

    id: str
    problem: str
    answer: str
    solution: str | None = None
    group: str = ""
    accepted: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """Plain data of the row, for digests and files; ``accepted`` where there is something."""
        row: dict[str, Any] = {
            "id": self.id,
            "problem": self.problem,
            "answer": self.answer,
            "solution": self.solution,
            "group": self.group,
        }
        return row | {"accepted": self.accepted} if self.accepted else row


@dataclass(frozen=True, slots=True)
class Response:
    """A response to one problem in token ids: the sequence along which the loss is taken.

    Attributes:
        response_id: unique within a run; the key (response_id, t) matches teacher and student.
        problem_id: the problem answered.
        response_ids: tokens of the response; ends with EOS unless it was truncated.
        truncated: the sampler hit its token limit (``finish_reason == "length"``).
    """

    response_id: str
    problem_id: str
    response_ids: tuple[int, ...]
    truncated: bool = False


class Outcome(StrEnum):
    """What became of a response when it was graded.

    All but ``timed_out`` count in a pass rate, and only ``right`` as right.
    """

    right = "right"
    wrong = "wrong"
    unanswered = "no answer"  # it ended by itself and gives no answer that the verifier reads
    truncated = "truncated"  # cut at its limit before it gave an answer
    timed_out = "timed out"  # no verdict: the verifier took too long, or ran out of memory


@dataclass(frozen=True, slots=True)
class Rollout(Response):
    """A response sampled from a served model, with what the server said of it.

    Attributes:
        sample: index 0..K-1 among the samples of this problem at this step.
        step: optimizer steps that the sampling policy had taken.
        seed: the sampling seed sent to the server.
        logprobs: log-probability of each sampled token under the served model at temperature 1,
            nats; same length as ``response_ids``.
        weight_versions: (version, tokens) of each run of tokens that one version of the served
            weights sampled, in order; empty where the server did not say.
        text: decoded response, for grading and reading only; never tokenised again.
        outcome: the verifier's verdict; ``None`` before grading.
        extracted: the answer that the verifier read out of ``text``.
        evidence: by what mark it was read, such as ``box`` or ``last number``.
        comparison: how it was compared with the reference answer, such as ``numbers``.
        reason: why the verdict is what it is, for a human reader.
        asked: a digest of prompt and sampling settings; empty: not said, taken for any.
        graded: a digest of what the verdict depends on besides the text; empty: not said.
    """

    sample: int = 0
    step: int = 0
    seed: int = 0
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    weight_versions: tuple[tuple[str, int], ...] = ()
    text: str = ""
    outcome: Outcome | None = None
    extracted: str | None = None
    evidence: str = ""
    comparison: str = ""
    reason: str = ""
    asked: str = ""
    graded: str = ""

    @property
    def correct(self) -> bool:
        """Whether it was found right."""
        return self.outcome is Outcome.right

    @property
    def has_verdict(self) -> bool:
        """Whether it counts in a pass rate: it was graded, and the verifier came to an end."""
        return self.outcome is not None and self.outcome is not Outcome.timed_out


@dataclass(frozen=True, slots=True)
class PassRate:
    """The student's estimated pass rate on one problem, and the weight that follows from it.

    Attributes:
        id: the problem's.
        num_correct: right ones among the rollouts since the last full estimate.
        num_rollouts: all rollouts since then that have a verdict.
        effective_correct: ``num_correct``, earlier rollouts discounted by ``weights.discount``.
        effective_rollouts: ``num_rollouts``, discounted alike.
        pass_rate: ``effective_correct / effective_rollouts``.
        weight: a function of the two effective counts; its mean over the training set is 1.
        student_step: optimizer steps that the student had taken at the latest estimate.
        num_truncated: of ``num_rollouts``, those cut at their limit before they gave an answer.
        num_unanswered: of ``num_rollouts``, those that ended without an answer.
        num_timed_out: rollouts without a verdict, beside ``num_rollouts``.
    """

    id: str
    num_correct: int
    num_rollouts: int
    effective_correct: float
    effective_rollouts: float
    pass_rate: float
    weight: float
    student_step: int
    num_truncated: int = 0
    num_unanswered: int = 0
    num_timed_out: int = 0
