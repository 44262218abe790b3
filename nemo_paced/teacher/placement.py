"""Where the teacher's weights are between its phases: on the devices, in host memory, nowhere."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nemo_paced.config import TeacherPlacement
from nemo_paced.teacher.model import Teacher

logger = logging.getLogger(__name__)


class HostCopy:
    """A frozen module's parameters and buffers in host memory (pinned, beside a GPU).

    Being frozen they are copied off the device once, and onto it before each phase; in between
    their storage there is empty. Tensors that share one (tied embeddings) keep sharing it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._copies: list[tuple[torch.UntypedStorage, torch.UntypedStorage, int]] = []
        seen = set()
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() == 0:
                continue
            seen.add(storage.data_ptr())
            pinned = tensor.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            host.untyped_storage().copy_(storage)
            self._copies.append((storage, host.untyped_storage(), storage.nbytes()))

    @property
    def nbytes(self) -> int:
        return sum(size for _, _, size in self._copies)

    def leave_device(self) -> None:
        for storage, _, _ in self._copies:
            storage.resize_(0)

    def enter_device(self) -> None:
        for storage, host, size in self._copies:
            storage.resize_(size)
            storage.copy_(host, non_blocking=True)


class HeldTeacher:
    """The teacher as ``teacher.placement`` keeps it.

    Args:
        load: builds it and reads its weights; called when it is first needed, and again after
            :meth:`release`. Every rank calls it at the same point.
    """

    def __init__(self, load: Callable[[], Teacher], placement: TeacherPlacement) -> None:
        self._load = load
        self._offload = placement is TeacherPlacement.offloaded
        self._teacher: Teacher | None = None
        self._host: HostCopy | None = None

    @contextmanager
    def resident(self) -> Iterator[Teacher]:
        """The teacher with its weights on the device, for the length of a ``with``."""
        if self._teacher is None:
            self._teacher = self._load()
            if self._offload:
                self._host = HostCopy(self._teacher.gpt)
                logger.info("teacher: %.2f GiB in host memory", self._host.nbytes / 2**30)
        elif self._host is not None:
            self._host.enter_device()
        try:
            yield self._teacher
        finally:
            if self._host is not None:
                self._host.leave_device()

    def load(self) -> None:
        """Load it now, so that what is wrong with it shows before training."""
        with self.resident():
            pass

    def release(self) -> None:
        """Free it; it is loaded again if it is needed once more."""
        self._teacher = self._host = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
