"""The teacher's signal of a batch: computed, moved to the student and cut, or from the cache.

This is phase 1 of a step. Responses that are not in the cache go through the teacher in its own
layout; their hidden states move to the student's last stage, where the teacher's LM head lies in
the student's layout; with ``teacher.top_k`` they are cut down there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_paced.data.packing import Cut, TrainItem, cut_batch, rank_items
from nemo_paced.parallel.groups import Parallel
from nemo_paced.teacher.cache import SignalCache
from nemo_paced.teacher.fp8.choice import Fp8Choice
from nemo_paced.teacher.kind import SignalKind
from nemo_paced.teacher.placement import HeldTeacher
from nemo_paced.teacher.remote import RemoteTeacher
from nemo_paced.teacher.reshard import OneWorld, exchange, routes
from nemo_paced.teacher.signal import ResponseSignal, TeacherSignal, cut_top_k


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Source of the teacher's signal, which a step asks once a batch.

    Attributes:
        held: the teacher on these ranks; ``None``: it has ranks of its own.
        remote: the connection to those ranks; ``None`` where the teacher is held.
        parallel: the layout of a held teacher.
        student: the student's layout, in which the signal arrives.
        kind: hidden states or a top-k.
        head_weight: the teacher's LM head [v/tp, h] on the student's last stage, else ``None``.
        hidden_size, dtype: of a hidden state.
        cut: how a batch becomes the teacher's micro-batches.
        cache: signals of stored responses on disk; ``None``: they are always computed.
        keep_loaded: whether the teacher stays in memory after a batch.
        fp8: how the teacher runs in FP8; ``None``: it does not.
    """

    held: HeldTeacher | None
    remote: RemoteTeacher | None
    parallel: Parallel
    student: Parallel
    kind: SignalKind
    head_weight: torch.Tensor | None
    hidden_size: int
    dtype: torch.dtype
    cut: Cut
    cache: SignalCache | None = None
    keep_loaded: bool = True
    fp8: Fp8Choice | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the signal of one response token."""
        return self.kind.bytes_per_token(self.hidden_size, self.dtype.itemsize)

    def signal(self, items: Sequence[TrainItem], *, stored: bool) -> tuple[TeacherSignal, int]:
        """The signal of a global batch, and the number of responses whose part was cached.

        Collective over the student's ranks.

        Args:
            items: the same list on every rank.
            stored: whether the responses come again in later epochs. Only then is the cache read
                and written: a sampled response would be kept for nothing.
        """
        known: dict[str, ResponseSignal | None] = {}
        if self.cache is not None and stored:
            known = self._cached_everywhere(self.cache, items)
        by_response = {name: part for name, part in known.items() if part is not None}
        missing = [item for item in items if item.response_id not in known]
        if missing:
            fresh = self._compute(missing, items)
            if self.cache is not None and stored:
                self._keep(self.cache, missing, fresh)
            by_response |= fresh
            if not self.keep_loaded:
                self.release()
        return TeacherSignal(by_response, self.head_weight), len(known)

    def release(self) -> None:
        """Free the teacher where this rank holds it."""
        if self.held is not None:
            self.held.release()

    def fill(self, items: Sequence[TrainItem]) -> None:
        """Put the signals of stored responses into the cache; collective."""
        assert self.cache is not None, "there is nothing to fill"
        self._keep(self.cache, items, self._compute(items, items))

    def _compute(
        self, missing: Sequence[TrainItem], items: Sequence[TrainItem]
    ) -> dict[str, ResponseSignal]:
        """Signals of ``missing``, as the student's ranks need them when they train on ``items``."""
        moved = self._hidden_states(missing, items)
        if not self.kind.top_k or self.head_weight is None:
            return dict(moved)
        # tensor-parallel ranks cut together: in one order
        ordered = {i.response_id: moved[i.response_id] for i in missing if i.response_id in moved}
        return dict(cut_top_k(ordered, self.head_weight, self.kind, self.student.tp_group))

    def _hidden_states(
        self, missing: Sequence[TrainItem], items: Sequence[TrainItem]
    ) -> dict[str, torch.Tensor]:
        width, dtype = self.hidden_size, self.dtype
        if self.remote is not None:
            assert len(missing) == len(items), "a teacher on ranks of its own has no cache"
            return self.remote.hidden_states(items, self.student, width=width, dtype=dtype)
        assert self.held is not None, "it is here or elsewhere"
        batches = cut_batch(missing, self.cut, self.parallel, teacher=True)
        with self.held.resident() as teacher:
            hidden = teacher.hidden_states(batches)
        ways = routes(missing, items, teacher=self.parallel.grid, student=self.student.grid)
        ends = OneWorld(self.student.rank)
        return exchange(hidden, ways, ends, self.student.device, width=width, dtype=dtype)

    def _keep(
        self, cache: SignalCache, items: Sequence[TrainItem], fresh: dict[str, ResponseSignal]
    ) -> None:
        """Write fresh signals to the cache, each on one of the ranks that hold it."""
        if self.student.tp_rank == self.student.cp_rank == 0:
            for item in items:
                if item.response_id in fresh:
                    cache.put(item, fresh[item.response_id])

    def _cached_everywhere(
        self, cache: SignalCache, items: Sequence[TrainItem]
    ) -> dict[str, ResponseSignal | None]:
        """Signals of the responses that every rank in need of them found in the cache.

        The keys are the same on every rank; the value is ``None`` on a rank that does not need it.
        """
        needed = set()
        if self.student.is_last_stage:
            own = rank_items(items, dp_rank=self.student.dp_rank, dp_size=self.student.dp_size)
            needed = {item.response_id for item in own}
        read = {
            item.response_id: cache.get(item, self.student.device)
            for item in items
            if item.response_id in needed
        }
        lacking = [item.response_id in needed and read[item.response_id] is None for item in items]
        # a rank may not see yet what another has just written: all go by what all have read
        lacking_I = torch.tensor(lacking, dtype=torch.int32, device=self.student.device)
        torch.distributed.all_reduce(lacking_I)
        return {
            item.response_id: read.get(item.response_id)
            for item, lacks in zip(items, lacking_I.tolist(), strict=True)
            if not lacks
        }
