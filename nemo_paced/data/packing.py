"""Micro-batches of one data-parallel rank, cut out of a global batch of responses.

Every rank sees the whole global batch (token ids only: small) and cuts its own part out of it, so
that all of them agree on lengths and number of micro-batches without a collective.

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

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from nemo_paced.errors import ConfigError
from nemo_paced.parallel.groups import Parallel
from nemo_paced.parallel.row_length import cp_pieces, round_up, row_multiple


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
    """Items of one data-parallel rank, longest first; see :func:`_dealt_evenly`."""
    tokens = [len(item.student_prompt_ids) + len(item.response_ids) for item in items]
    return [items[number] for number in _dealt_evenly(tokens, dp_size, most=True)[dp_rank]]


def _dealt_evenly(sizes: Sequence[int], count: int, *, most: bool = False) -> list[list[int]]:
    """Indices of sizes dealt into ``count`` parts: largest first, each to the part with the least.

    Args:
        most: no part gets more indices than an even share, rounded up.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    room = -(-len(sizes) // count) if most else len(sizes)
    filled = [(0, number) for number in range(count)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        total, number = heapq.heappop(filled)
        parts[number].append(index)
        if len(parts[number]) < room:
            heapq.heappush(filled, (total + sizes[index], number))
    return parts


def cut_batch(
    items: Sequence[TrainItem], cut: Cut, parallel: Parallel, *, teacher: bool
) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, which is the same list on every rank.

    All ranks get equally many, at least one; the last ones may be padding. The n-th ones of all
    ranks are of one shape, and where pipeline stages exchange them all are. The longest come first:
    what they need is there for the others.

    Args:
        teacher: build the teacher's sequences (its prompt) rather than the student's.

    Raises:
        ConfigError: a sequence that is longer than a packed row.
    """
    shares = [
        rank_items(items, dp_rank=rank, dp_size=parallel.dp_size)
        for rank in range(parallel.dp_size)
    ]
    pieces = cp_pieces(parallel.cp_size)
    multiple_of = math.lcm(
        row_multiple(
            tp_size=parallel.tp_size,
            cp_size=parallel.cp_size,
            on_gpu=parallel.device.type == "cuda",
        ),
        cut.sequence_multiple_of,
    )
    packed = cut.packed_sequence_size > 0

    def length(item: TrainItem) -> int:
        """Tokens of an item's sequence, padded for context parallelism."""
        return round_up(len(_prompt(item, teacher)) + len(item.response_ids), pieces)

    if packed:
        capacity = round_up(cut.packed_sequence_size, multiple_of)
        divided = pack(shares, length, capacity, rows_multiple_of=cut.micro_batches_multiple_of)
    else:
        size = cut.micro_batch_size
        divided = [
            [by_length[i : i + size] for i in range(0, len(by_length), size)]
            for share in shares
            for by_length in [sorted(share, key=lambda item: -length(item))]
        ]
    count = round_up(max(1, *map(len, divided)), cut.micro_batches_multiple_of)
    for parts in divided:
        parts += [[]] * (count - len(parts))
    tokens = sum if packed else max
    needed = [
        max(tokens([length(item) for item in part]) if part else 1 for part in parts)
        for parts in zip(*divided, strict=True)
    ]
    if parallel.pp_size > 1:
        needed = [max(needed)] * count
    longest = max(map(length, items), default=1)
    return [
        _micro_batch(
            part,
            teacher=teacher,
            rows=1 if packed else cut.micro_batch_size,
            row_length=row_length,
            sequences=_sequences([length(i) for i in part], row_length, longest) if packed else (),
            parallel=parallel,
        )
        for part, tokens_of_row in zip(divided[parallel.dp_rank], needed, strict=True)
        for row_length in [round_up(tokens_of_row, multiple_of)]
    ]


def pack(
    shares: Sequence[Sequence[TrainItem]],
    length: Callable[[TrainItem], int],
    capacity: int,
    *,
    rows_multiple_of: int = 1,
) -> list[list[list[TrainItem]]]:
    """Rows of packed items for every data-parallel rank: as few as hold them, evenly filled.

    Args:
        shares: items of each rank.
        length: tokens of an item's sequence.
        capacity: tokens of a row.
        rows_multiple_of: what the number of rows is a multiple of.

    Returns:
        The rows of each rank, equally many, the fullest first.

    Raises:
        ConfigError: an item that is longer than a row.
    """
    for item in itertools.chain(*shares):
        if (needed := length(item)) > capacity:
            raise ConfigError(
                f"problem {item.problem_id!r} has {needed} tokens of prompt and response, above "
                f"model.packed_sequence_size {capacity}: raise it"
            )
    tokens = max((sum(map(length, share)) for share in shares), default=0)
    count = round_up(max(1, -(-tokens // capacity)), rows_multiple_of)
    while True:
        divided = [_filled_evenly(share, length, count) for share in shares]
        if all(sum(map(length, row)) <= capacity for rows in divided for row in rows):
            return divided
        count += rows_multiple_of


def _filled_evenly(
    items: Sequence[TrainItem], length: Callable[[TrainItem], int], count: int
) -> list[list[TrainItem]]:
    """``count`` rows of items, the fullest first."""
    rows = _dealt_evenly([length(item) for item in items], count)
    filled = [[items[number] for number in row] for row in rows]
    return sorted(filled, key=lambda row: -sum(map(length, row)))


def _sequences(lengths: Sequence[int], row_length: int, longest: int) -> tuple[int, ...]:
    """Lengths in a packed row: the sequences, then padding in pieces of at most ``longest``."""
    sequences, left = list(lengths), row_length - sum(lengths)
    while left > 0:
        sequences.append(min(left, longest))
        left -= sequences[-1]
    return tuple(sequences)


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
