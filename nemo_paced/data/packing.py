"""Micro-batches of one data-parallel rank, cut out of a global batch of responses.

Every rank sees the whole global batch (token ids only: small) and cuts its own part out of it, so
that all of them agree on sequence length and number of micro-batches without a collective.

A micro-batch is B sequences padded to one length, or one row of packed sequences that do not see
each other (Megatron's "thd"). Under context parallelism a rank holds two slices of every sequence,
one from its front and the mirrored one from its end, so that causal attention costs all ranks the
same; response tokens belong to the rank that holds their position.

Axes: B rows of a micro-batch, S its positions on this rank, N response tokens on this rank.
Token t of a response is predicted at the position before it: t = 0 at the last prompt position.
Teacher and student see different prompts, so what crosses between them is keyed by
(response_id, t), never by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from nemo_paced.errors import ConfigError
from nemo_paced.parallel.groups import Parallel


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One problem of the global batch with the response to train along.

    Attributes:
        response_id: unique within the batch.
        student_prompt_ids, teacher_prompt_ids: token ids of either model's prompt.
        response_ids: token ids of the response, the same for both models.
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

    @staticmethod
    def from_plain(fields: dict[str, Any]) -> TrainItem:
        """The item whose ``dataclasses.asdict`` went through JSON, which has lists for tuples."""
        names = ("student_prompt_ids", "teacher_prompt_ids", "response_ids", "server_logprobs")
        return TrainItem(**{**fields, **{name: tuple(fields[name]) for name in names}})


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded or packed sequences of one model, and where the response tokens lie in them.

    Attributes:
        tokens_BS: int64; prompt then response, padded with 0 (causal attention: the padding is
            behind everything that is read).
        position_ids_BS: int64; position of each token in its sequence.
        rows_N, positions_N: int64; the row and position that predict each response token.
        targets_N: int64; the response tokens.
        token_weights_N: float32; ``token_weight`` of each response token.
        server_logprobs_N: float32, nats; NaN where the response was not sampled.
        on_policy: whether a response was sampled.
        spans: (response_id, number of tokens) of the whole responses, in order.
        local_N: int64; which tokens of ``spans`` are the N of this context-parallel rank; ``None``:
            all of them.
        sequences: lengths of packed sequences, padding included, before context parallelism;
            empty: one sequence a row.
    """

    tokens_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    rows_N: torch.Tensor
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    token_weights_N: torch.Tensor
    server_logprobs_N: torch.Tensor
    on_policy: bool
    spans: tuple[tuple[str, int], ...]
    local_N: torch.Tensor | None = None
    sequences: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Response tokens on this rank."""
        return self.targets_N.numel()


@dataclass(frozen=True, slots=True)
class Cut:
    """Sizes by which a global batch is cut into micro-batches.

    Attributes:
        micro_batch_size: rows of a micro-batch, where sequences are padded.
        packed_sequence_size: tokens of a row of packed sequences; 0: padded.
        micro_batches_multiple_of: what their number is padded to: an interleaved pipeline runs them
            in groups of its stages.
        sequence_multiple_of: what the length of a row is padded to (GEMMs in FP8).
    """

    micro_batch_size: int
    packed_sequence_size: int = 0
    micro_batches_multiple_of: int = 1
    sequence_multiple_of: int = 1


def rank_items(items: Sequence[TrainItem], *, dp_rank: int, dp_size: int) -> list[TrainItem]:
    """Items of one data-parallel rank, dealt out longest response first: ranks work alike."""
    by_length = sorted(items, key=lambda item: -len(item.response_ids))
    return list(by_length[dp_rank::dp_size])


def cut_batch(
    items: Sequence[TrainItem], cut: Cut, parallel: Parallel, *, teacher: bool
) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, which is the same list on every rank.

    All ranks get equally many of equal shape (pipeline stages exchange fixed shapes), at least one;
    the last ones may be padding.

    Args:
        teacher: build the teacher's sequences (its prompt) rather than the student's.
    """
    shares = [
        rank_items(items, dp_rank=rank, dp_size=parallel.dp_size)
        for rank in range(parallel.dp_size)
    ]
    pieces = 2 * parallel.cp_size if parallel.cp_size > 1 else 1
    # sequence parallelism cuts what a rank holds of a row into tensor-parallel parts
    multiple_of = math.lcm(8, pieces * parallel.tp_size, cut.sequence_multiple_of)
    capacity = _round_up(cut.packed_sequence_size, multiple_of)

    def length(item: TrainItem) -> int:
        """Tokens of an item's sequence, padded for context parallelism."""
        return _round_up(len(_prompt(item, teacher)) + len(item.response_ids), pieces)

    if capacity:
        divided = [pack(share, length, capacity) for share in shares]
        lengths = [sum(map(length, part)) for parts in divided for part in parts]
    else:
        size = cut.micro_batch_size
        divided = [[s[i : i + size] for i in range(0, len(s), size)] for s in shares]
        lengths = [length(item) for item in items]
    row_length = _round_up(max(lengths, default=1), multiple_of)
    longest = max(map(length, items), default=row_length)
    count = _round_up(max(1, *map(len, divided)), cut.micro_batches_multiple_of)
    own = divided[parallel.dp_rank]
    own += [[]] * (count - len(own))
    return [
        _micro_batch(
            part,
            teacher=teacher,
            rows=1 if capacity else cut.micro_batch_size,
            row_length=row_length,
            sequences=_sequences([length(i) for i in part], row_length, longest)
            if capacity
            else (),
            parallel=parallel,
        )
        for part in own
    ]


def pack(
    items: Sequence[TrainItem], length: Callable[[TrainItem], int], capacity: int
) -> list[list[TrainItem]]:
    """Rows of packed items by first fit, longest first: each goes to the first row with room.

    Args:
        length: tokens of an item's sequence.
        capacity: tokens of a row.

    Raises:
        ConfigError: an item that is longer than a row.
    """
    rows: list[list[TrainItem]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: -length(item)):
        needed = length(item)
        if needed > capacity:
            raise ConfigError(
                f"problem {item.problem_id!r} has {needed} tokens of prompt and response, above "
                f"model.packed_sequence_size {capacity}: raise it"
            )
        row = next((number for number, free in enumerate(room) if free >= needed), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(item)
        room[row] -= needed
    return rows


def _sequences(lengths: Sequence[int], row_length: int, longest: int) -> tuple[int, ...]:
    """Lengths in a packed row: the sequences, then padding in pieces of at most ``longest``."""
    sequences, left = list(lengths), row_length - sum(lengths)
    while left > 0:
        sequences.append(min(left, longest))
        left -= sequences[-1]
    return tuple(sequences)


def _round_up(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of


def _prompt(item: TrainItem, teacher: bool) -> tuple[int, ...]:
    return item.teacher_prompt_ids if teacher else item.student_prompt_ids


def held_columns(sequences: Sequence[int], *, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Columns of a row that a context-parallel rank holds, int64 [s / cp].

    Each sequence is cut into 2 x cp_size pieces; a rank holds one and the mirrored one, as Megatron
    and Transformer Engine expect.
    """
    kept, begin = [], 0
    for length in sequences:
        piece = length // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            first = begin + number * piece
            kept.append(torch.arange(first, first + piece))
        begin += length
    return torch.cat(kept)


def _micro_batch(
    items: Sequence[TrainItem],
    *,
    teacher: bool,
    rows: int,
    row_length: int,
    sequences: tuple[int, ...],
    parallel: Parallel,
) -> MicroBatch:
    """This rank's micro-batch of ``items``, on its device.

    Args:
        sequences: lengths in a packed row, the items' first; empty: item i is row i.
    """
    tokens_BS = torch.zeros(rows, row_length, dtype=torch.int64)
    row_N: list[int] = []
    column_N: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    logprobs: list[float] = []
    begin = 0
    for number, item in enumerate(items):
        row = 0 if sequences else number
        prompt, response = _prompt(item, teacher), item.response_ids
        sequence = prompt + response
        tokens_BS[row, begin : begin + len(sequence)] = torch.tensor(sequence)
        row_N += [row] * len(response)
        column_N += range(begin + len(prompt) - 1, begin + len(sequence) - 1)
        targets += response
        weights += [item.token_weight] * len(response)
        logprobs += item.server_logprobs or [float("nan")] * len(response)
        if sequences:
            begin += sequences[number]
    in_sequence = torch.cat([torch.arange(length) for length in sequences or (row_length,)])
    whole = MicroBatch(
        tokens_BS=tokens_BS,
        position_ids_BS=in_sequence.expand(rows, -1),
        rows_N=torch.tensor(row_N, dtype=torch.int64),
        positions_N=torch.tensor(column_N, dtype=torch.int64),
        targets_N=torch.tensor(targets, dtype=torch.int64),
        token_weights_N=torch.tensor(weights, dtype=torch.float32),
        server_logprobs_N=torch.tensor(logprobs, dtype=torch.float32),
        on_policy=any(item.server_logprobs for item in items),
        spans=tuple((item.response_id, len(item.response_ids)) for item in items),
        sequences=sequences,
    )
    return _to_device(_slice_context(whole, parallel), parallel.device)


def _slice_context(batch: MicroBatch, parallel: Parallel) -> MicroBatch:
    """The part of a micro-batch that this context-parallel rank holds."""
    if parallel.cp_size == 1:
        return batch
    width = batch.tokens_BS.shape[1]
    columns = held_columns(
        batch.sequences or (width,), cp_rank=parallel.cp_rank, cp_size=parallel.cp_size
    )
    here = torch.full((width,), -1, dtype=torch.int64)
    here[columns] = torch.arange(columns.numel())
    local_N = (here[batch.positions_N] >= 0).nonzero().flatten()
    return replace(
        batch,
        tokens_BS=batch.tokens_BS[:, columns],
        position_ids_BS=batch.position_ids_BS[:, columns],
        rows_N=batch.rows_N[local_N],
        positions_N=here[batch.positions_N[local_N]],
        targets_N=batch.targets_N[local_N],
        token_weights_N=batch.token_weights_N[local_N],
        server_logprobs_N=batch.server_logprobs_N[local_N],
        local_N=local_N,
    )


def _to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    tensors: dict[str, Any] = {
        field.name: value.contiguous().to(device)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return replace(batch, **tensors)
