"""From a global batch of responses to the micro-batches of one data-parallel rank.

Every rank sees the whole global batch (token ids only: small) and cuts its own part out of it, so
that all of them agree on sequence length and number of micro-batches without a collective.

Axes: B sequences of a micro-batch, S sequence positions, N response tokens of a micro-batch.
Token t of a response is predicted at the position before it: t = 0 at the last prompt position.
Teacher and student see different prompts, so what crosses between them is keyed by
(response_id, t), never by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_paced.parallel import Parallel


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One problem of the global batch with the response to train along.

    Attributes:
        response_id: unique within the batch.
        token_weight: what every token's divergence of this response is multiplied by
            (problem weight and normaliser together, see ``losses/reduction.py``).
        server_logprobs: the sampler's log-probabilities of the response, nats; empty off-policy.
    """

    response_id: str
    problem_id: str
    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    token_weight: float
    server_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded sequences of one model, and where the response tokens lie in them.

    Attributes:
        tokens_BS: int64; prompt then response, padded with 0 (causal attention: the padding is
            behind everything that is read).
        position_ids_BS: int64.
        rows_N, positions_N: int64; the sequence and position that predict each response token.
        targets_N: int64; the response tokens.
        token_weights_N: float32.
        server_logprobs_N: float32; NaN where the response was not sampled.
        spans: (response_id, number of tokens) in the order of N.
    """

    tokens_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    rows_N: torch.Tensor
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    token_weights_N: torch.Tensor
    server_logprobs_N: torch.Tensor
    spans: tuple[tuple[str, int], ...]

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return self.targets_N.numel()


def rank_items(items: Sequence[TrainItem], *, dp_rank: int, dp_size: int) -> list[TrainItem]:
    """The items of one data-parallel rank: dealt out longest first, so that ranks work alike."""
    by_length = sorted(items, key=lambda item: -len(item.response_ids))
    return list(by_length[dp_rank::dp_size])


def num_micro_batches(largest_rank: int, *, micro_batch_size: int) -> int:
    """Micro-batches of every rank, at least one: equal on all, the last ones may be padding.

    Args:
        largest_rank: items of the data-parallel rank that has most.
    """
    return max(1, -(-largest_rank // micro_batch_size))


def padded_length(items: Sequence[TrainItem], *, teacher: bool, multiple_of: int) -> int:
    """Sequence length of the whole global batch: pipeline stages exchange fixed shapes."""
    longest = max((len(_prompt(i, teacher)) + len(i.response_ids) for i in items), default=1)
    return -(-longest // multiple_of) * multiple_of


def micro_batches(
    items: Sequence[TrainItem],
    *,
    teacher: bool,
    micro_batch_size: int,
    count: int,
    sequence_length: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Cut one rank's items into ``count`` micro-batches of ``micro_batch_size`` sequences.

    Args:
        teacher: build the teacher's sequences (its prompt) rather than the student's.
        sequence_length: S, at least the longest prompt + response.
    """
    assert len(items) <= count * micro_batch_size, "the count was computed from these items"
    return [
        _micro_batch(
            items[k * micro_batch_size : (k + 1) * micro_batch_size],
            teacher=teacher,
            num_rows=micro_batch_size,
            sequence_length=sequence_length,
            device=device,
        )
        for k in range(count)
    ]


def cut_batch(
    items: Sequence[TrainItem], *, teacher: bool, micro_batch_size: int, parallel: Parallel
) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, which is the same list on every rank."""
    largest = -(-len(items) // parallel.dp_size)
    return micro_batches(
        rank_items(items, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
        teacher=teacher,
        micro_batch_size=micro_batch_size,
        count=num_micro_batches(largest, micro_batch_size=micro_batch_size),
        # sequence parallelism cuts the sequence into tensor-parallel parts
        sequence_length=padded_length(
            items, teacher=teacher, multiple_of=math.lcm(8, parallel.tp_size)
        ),
        device=parallel.device,
    )


def _prompt(item: TrainItem, teacher: bool) -> tuple[int, ...]:
    return item.teacher_prompt_ids if teacher else item.student_prompt_ids


def _micro_batch(
    items: Sequence[TrainItem],
    *,
    teacher: bool,
    num_rows: int,
    sequence_length: int,
    device: torch.device,
) -> MicroBatch:
    tokens_BS = torch.zeros(num_rows, sequence_length, dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    logprobs: list[float] = []
    for row, item in enumerate(items):
        prompt, response = _prompt(item, teacher), item.response_ids
        sequence = prompt + response
        tokens_BS[row, : len(sequence)] = torch.tensor(sequence)
        rows += [row] * len(response)
        positions += range(len(prompt) - 1, len(sequence) - 1)
        targets += response
        weights += [item.token_weight] * len(response)
        logprobs += item.server_logprobs or [float("nan")] * len(response)
    position_ids_BS = torch.arange(sequence_length).expand(num_rows, -1).contiguous()
    return MicroBatch(
        tokens_BS=tokens_BS.to(device),
        position_ids_BS=position_ids_BS.to(device),
        rows_N=torch.tensor(rows, dtype=torch.int64, device=device),
        positions_N=torch.tensor(positions, dtype=torch.int64, device=device),
        targets_N=torch.tensor(targets, dtype=torch.int64, device=device),
        token_weights_N=torch.tensor(weights, dtype=torch.float32, device=device),
        server_logprobs_N=torch.tensor(logprobs, dtype=torch.float32, device=device),
        spans=tuple((item.response_id, len(item.response_ids)) for item in items),
    )
