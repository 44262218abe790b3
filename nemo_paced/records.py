"""The records that all parts of the package share: problems, responses, rollouts and pass rates.

Token ids travel, never text that would be tokenised a second time: a response is the ids that the
sampler produced (its EOS included when it stopped by itself) or that a tokenizer made once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
        correct: the verifier's verdict; ``None`` before grading.
        extracted: the answer that the verifier read out of ``text``.
        reason: why the verdict is what it is.
        asked: a digest of prompt, sampling settings and what the verdict depends on; empty in
            stores of earlier releases.
    """

    sample: int = 0
    step: int = 0
    seed: int = 0
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    weight_versions: tuple[tuple[str, int], ...] = ()
    text: str = ""
    correct: bool | None = None
    extracted: str | None = None
    reason: str = ""
    asked: str = ""


@dataclass(frozen=True, slots=True)
class PassRate:
    """The student's estimated pass rate on one problem, and the weight that follows from it.

    Attributes:
        id: the problem's.
        num_correct: right ones among the rollouts since the last full estimate.
        num_rollouts: all rollouts since then.
        effective_correct: ``num_correct``, earlier rollouts discounted by ``weights.discount``.
        effective_rollouts: ``num_rollouts``, discounted alike.
        pass_rate: ``effective_correct / effective_rollouts``.
        weight: a function of the two effective counts; its mean over the training set is 1.
        student_step: optimizer steps that the student had taken at the latest estimate.
    """

    id: str
    num_correct: int
    num_rollouts: int
    effective_correct: float
    effective_rollouts: float
    pass_rate: float
    weight: float
    student_step: int
