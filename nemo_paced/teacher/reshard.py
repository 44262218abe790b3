"""Transfer of hidden states from the teacher's last stage to the student's, for any two layouts.

Every rank knows the whole batch and both grids, so who sends what to whom is arithmetic: no sizes
are exchanged, and a rank that holds what it needs sends nothing. With equal layouts nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_paced.data.packing import TrainItem, rank_items
from nemo_paced.parallel.groups import RankGrid


@dataclass(frozen=True, slots=True)
class ReshardRoute:
    """Transfer of one response's hidden states from a rank that holds them to one in need of them.

    Attributes:
        tokens: of the response: rows of its hidden states.
        source, target: ranks in the numbers of the grids; equal where nothing has to be sent.
    """

    response_id: str
    tokens: int
    source: int
    target: int


class Ends(Protocol):
    """Means to move tensors between ranks: within one world, or over the link between two."""

    @property
    def rank(self) -> int: ...

    def transfer(
        self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]
    ) -> None:
        """Send and receive whole tensors, each keyed by the other end's rank; waits until done."""


@dataclass(frozen=True, slots=True)
class OneWorld:
    """Transfers among the ranks of torch.distributed's default group."""

    rank: int

    def transfer(
        self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]
    ) -> None:
        send, receive = torch.distributed.isend, torch.distributed.irecv
        operations = [torch.distributed.P2POp(send, part, peer) for peer, part in outgoing.items()]
        operations += [
            torch.distributed.P2POp(receive, buffer, peer) for peer, buffer in incoming.items()
        ]
        if operations:
            for request in torch.distributed.batch_isend_irecv(operations):
                request.wait()


def routes(
    missing: Sequence[TrainItem],
    items: Sequence[TrainItem],
    *,
    teacher: RankGrid,
    student: RankGrid,
) -> list[ReshardRoute]:
    """Transfers of a batch's hidden states from teacher to student, the same list on every rank.

    All tensor-parallel ranks of a last stage hold (and need) the same; a rank that is both holder
    and in need takes its own, the others are spread over the holders.

    Args:
        missing: items that the teacher's ranks have run, dealt out among them.
        items: items that the student's ranks train on, dealt out among those; all of ``missing``
            are in it.
    """
    holders = _last_stage_of_items(missing, teacher)
    needing = _last_stage_of_items(items, student)
    made = []
    for item in missing:
        sources = holders[item.response_id]
        for index, target in enumerate(needing[item.response_id]):
            source = target if target in sources else sources[index % len(sources)]
            made.append(ReshardRoute(item.response_id, len(item.response_ids), source, target))
    return made


def exchange(
    held: Mapping[str, torch.Tensor],
    all_routes: Sequence[ReshardRoute],
    ends: Ends,
    device: torch.device,
    *,
    width: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Move hidden states along their routes; collective over the ranks of the routes.

    Args:
        held: [tokens, width] by response id, on the ranks named as sources.
        ends: sends and receives between the ranks that the routes name.
        device, width, dtype: of the hidden states that arrive.

    Returns:
        [tokens, width] by response id, of the responses that are routed to this rank.
    """
    mine = ends.rank
    kept = [r for r in all_routes if r.source == mine == r.target]
    outgoing = _by_rank([r for r in all_routes if r.source == mine != r.target], "target")
    incoming = _by_rank([r for r in all_routes if r.target == mine != r.source], "source")
    received = {
        peer: torch.empty(sum(r.tokens for r in parts), width, dtype=dtype, device=device)
        for peer, parts in incoming.items()
    }
    sent = {
        peer: torch.cat([held[r.response_id] for r in parts]) for peer, parts in outgoing.items()
    }
    ends.transfer(sent, received)  # one message a pair of ranks
    moved = {r.response_id: held[r.response_id] for r in kept}
    for peer, parts in incoming.items():
        pieces = received[peer].split([r.tokens for r in parts])
        moved |= {r.response_id: piece for r, piece in zip(parts, pieces, strict=True)}
    return moved


def _last_stage_of_items(items: Sequence[TrainItem], grid: RankGrid) -> dict[str, list[int]]:
    return {
        item.response_id: grid.last_stage(dp_rank)
        for dp_rank in range(grid.data)
        for item in rank_items(items, dp_rank=dp_rank, dp_size=grid.data)
    }


def _by_rank(some: Sequence[ReshardRoute], key: str) -> dict[int, list[ReshardRoute]]:
    grouped: dict[int, list[ReshardRoute]] = {}
    for route in some:
        grouped.setdefault(getattr(route, key), []).append(route)
    return dict(sorted(grouped.items()))
