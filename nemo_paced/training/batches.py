"""Global batches: rank 0 decides what one holds, every rank gets it as a message of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_paced.data.loader import occurrences
from nemo_paced.data.packing import TrainItem
from nemo_paced.data.prompts import Prompts
from nemo_paced.losses.reduction import token_weight
from nemo_paced.records import Problem, Response, Rollout


@dataclass(frozen=True, slots=True)
class Batch:
    """The part of a global batch that is run: problems of weight 0 count, but are not in it.

    Attributes:
        items: what to train on; empty: the step is a no-op.
        metrics: figures of the rollouts behind it, for the log.
    """

    items: list[TrainItem]
    metrics: dict[str, float]

    def to_message(self) -> dict[str, Any]:
        """Plain data for the other ranks, which :meth:`from_message` reads."""
        return {"items": [asdict(item) for item in self.items], "metrics": self.metrics}

    @staticmethod
    def from_message(message: dict[str, Any]) -> Batch:
        items = [TrainItem.from_plain(fields) for fields in message["items"]]
        return Batch(items, message["metrics"])


def build_items(
    problems: Sequence[Problem],
    weights: Sequence[float],
    responses: Sequence[Response | None],
    *,
    prompts: Prompts,
    reduction: str,
) -> list[TrainItem]:
    """Items of the problems with weight, each token's weight normalised over the whole batch.

    Args:
        problems: the global batch, N of them.
        weights: of unit mean over the training set.
        responses: aligned; ``None`` where the weight is 0 and there is none (not sampled, or a
            dropped reference): it adds no tokens to the divisor of ``token_mean``.
        reduction: ``token_sum``, ``sequence_mean`` or ``token_mean``.
    """
    total_tokens = sum(len(response.response_ids) for response in responses if response)
    items = []
    repeats = occurrences([problem.id for problem in problems])
    for problem, weight, response, repeat in zip(
        problems, weights, responses, repeats, strict=True
    ):
        if weight == 0:
            continue
        assert response is not None, f"{problem.id} has a weight and no response"
        items.append(
            TrainItem(
                response_id=f"{response.response_id}#{repeat}",
                problem_id=problem.id,
                student_prompt_ids=prompts.student(problem),
                teacher_prompt_ids=prompts.teacher(problem),
                response_ids=response.response_ids,
                token_weight=token_weight(
                    reduction,
                    weight=weight,
                    response_length=len(response.response_ids),
                    num_problems=len(problems),
                    total_tokens=total_tokens,
                ),
                server_logprobs=response.logprobs if isinstance(response, Rollout) else (),
            )
        )
    return items
