"""A teacher on ranks of its own (``teacher.placement=separate``), one step ahead of the student.

For request n the student's world announces the batch under ``items/n``, as early as it knows it;
the teacher's world computes its hidden states and says ``ready/n``; when the student comes to that
batch it says ``want/n``, and only then do tensors move. So the teacher is at most one batch ahead
(it holds one batch of hidden states, no more), and neither world waits for the other inside a
collective or a message: both wait on the store.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict

import torch

from nemo_paced.data.packing import Cut, TrainItem, cut_batch
from nemo_paced.errors import PacedError
from nemo_paced.parallel.groups import Parallel, RankGrid
from nemo_paced.parallel.link import Link
from nemo_paced.teacher.model import Teacher
from nemo_paced.teacher.reshard import exchange, routes

logger = logging.getLogger(__name__)


class RemoteTeacher:
    """The student's end of the exchange with a teacher on ranks of its own.

    Args:
        link: to the teacher's ranks.
        grid: of the teacher's ranks, in the job's rank numbers.
        answer_timeout_s: seconds to wait for one batch's hidden states, once they are asked for.
    """

    def __init__(self, link: Link, grid: RankGrid, answer_timeout_s: float) -> None:
        self.link = link
        self.grid = grid
        self.answer_timeout_s = answer_timeout_s
        # response ids of the batches that rank 0 has announced and not asked for yet
        self._announced: deque[list[str]] = deque()
        self._next_announced = 0
        self._next_asked = 0

    def announce(self, items: Sequence[TrainItem]) -> None:
        """Tell the teacher of a batch that will be asked for; called on rank 0 alone.

        Batches are announced in the order in which they are asked for.
        """
        self.link.messages.publish(
            f"items/{self._next_announced}", [asdict(item) for item in items]
        )
        self._announced.append([item.response_id for item in items])
        self._next_announced += 1

    def hidden_states(
        self, items: Sequence[TrainItem], student: Parallel, *, width: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Hidden states [tokens, width] by response id, where the student needs them.

        Collective over the student's ranks. Announces the batch if that has not been done.

        Args:
            student: the student's layout.
            width, dtype: of a hidden state.

        Raises:
            PacedError: no answer within ``answer_timeout_s``.
        """
        number = self._next_asked
        self._next_asked += 1
        if self.link.rank == 0:
            if not self._announced:
                self.announce(items)
            announced = self._announced.popleft()
            assert announced == [i.response_id for i in items], "batches are asked for in order"
            self.link.messages.publish(f"want/{number}", True)
        try:
            self.link.messages.wait(f"ready/{number}", self.answer_timeout_s)
        except torch.distributed.DistStoreError as error:
            raise PacedError(
                f"the teacher, on ranks {self.link.students} to {self.link.size - 1}, has not "
                f"answered for {self.answer_timeout_s:g} s (training.collective_timeout_s): one of "
                "them hangs or has ended"
            ) from error
        ways = routes(items, items, teacher=self.grid, student=student.grid)
        return exchange({}, ways, self.link, student.device, width=width, dtype=dtype)

    def close(self) -> None:
        """Tell the teacher's ranks that no batch comes any more, and wait until they have closed.

        Rank 0 does so; on the other ranks of the student this does nothing.
        """
        if self.link.rank == 0:
            for number in range(self._next_asked, self._next_announced):  # announced ahead
                self.link.messages.publish(f"want/{number}", False)
            self.link.messages.publish(f"items/{self._next_announced}", None)
            # where this rank hosts the store, leaving at once would take it from under them
            for rank in range(self.link.students, self.link.size):
                self.link.messages.wait(f"closed/{rank}", self.answer_timeout_s)


def serve(
    teacher: Teacher, cut: Cut, link: Link, student: RankGrid, *, width: int, dtype: torch.dtype
) -> None:
    """Answer the student's requests for hidden states until it closes; run on a teacher's rank.

    Args:
        cut: how a global batch becomes the teacher's micro-batches.
        student: grid of the student's ranks, in the job's rank numbers.
        width, dtype: of a hidden state.
    """
    parallel = teacher.parallel
    own = parallel.grid.beginning_at(link.students)
    number = 0
    while (message := link.messages.wait(f"items/{number}")) is not None:
        items = [TrainItem.from_plain(fields) for fields in message]
        hidden = teacher.hidden_states(cut_batch(items, cut, parallel, teacher=True))
        torch.distributed.barrier()
        if parallel.rank == 0:
            link.messages.publish(f"ready/{number}", True)
        if not link.messages.wait(f"want/{number}"):
            break  # the run stops before that batch
        ways = routes(items, items, teacher=own, student=student)
        exchange(hidden, ways, link, parallel.device, width=width, dtype=dtype)
        torch.distributed.barrier()
        if parallel.rank == 0:
            for key in ("items", "want"):
                link.messages.forget(f"{key}/{number}")
            if number:  # all of the student's ranks have read it before they asked for this one
                link.messages.forget(f"ready/{number - 1}")
        number += 1
    link.messages.publish(f"closed/{link.rank}", True)
    logger.info("teacher: %d batches answered", number)
