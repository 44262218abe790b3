"""Placement of the teacher's weights between its phases: on device, in host memory, or nowhere."""

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

    As they are frozen, they are copied off the device once, and onto it before each phase; in
    between their storage on the device is empty. Tensors that share a storage (tied embeddings)
    keep sharing it.
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
        """Free the tensors' storage on the device; they must not be read until they are back."""
        for storage, _, _ in self._copies:
            storage.resize_(0)

    def enter_device(self) -> None:
        """Copy the tensors back onto the device, on its current stream."""
        for storage, host, size in self._copies:
            storage.resize_(size)
            storage.copy_(host, non_blocking=True)


class HeldTeacher:
    """Holder of the teacher on this rank, which keeps its weights as ``teacher.placement`` says.

    Args:
        load: builds the teacher and reads its weights; called when it is first needed, and again
            after :meth:`release`. Every rank calls it at the same point.
        load_quantized: takes the place of ``load`` once :meth:`quantize` has been called, and loads
            in FP8; ``None``: there is nothing to quantise later.
    """

    def __init__(
        self,
        load: Callable[[], Teacher],
        placement: TeacherPlacement,
        load_quantized: Callable[[], Teacher] | None = None,
    ) -> None:
        self._load = load
        self._load_quantized = load_quantized
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
        """Load the teacher now, so that what is wrong with it shows before training."""
        with self.resident():
            pass

    @property
    def to_be_quantized(self) -> bool:
        """Whether the teacher is still held in full precision and :meth:`quantize` is to come."""
        return self._load_quantized is not None

    def quantize(self) -> None:
        """Free the teacher and load it in FP8 from now on, so that never two are in memory."""
        assert self._load_quantized is not None, "called where it is to be quantised"
        self.release()
        self._load, self._load_quantized = self._load_quantized, None

    def release(self) -> None:
        """Free the teacher; it is loaded again if it is needed once more."""
        self._teacher = self._host = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
