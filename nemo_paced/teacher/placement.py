"""Placement of the teacher's weights between its phases: on device, in host memory, or nowhere."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from nemo_paced.config import TeacherPlacement
from nemo_paced.teacher.model import Teacher

logger = logging.getLogger(__name__)


class HostCopy:
    """A frozen model's parameters and buffers in host memory (page-locked, beside a GPU).

    As they are frozen, they are copied off the device once, and onto it before each phase; in
    between their storage on the device is empty. Tensors that share a storage (tied embeddings)
    keep sharing it. On a GPU the layers come in one after the other while those before them
    compute.

    Args:
        model: with everything on one device.
        layers: those of its modules whose weights are read in their own forward alone.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        seen: set[int] = set()
        own = [_storages(layer, seen) for layer in layers]
        parts = [_storages(model, seen), *own]  # what is not a layer's comes first
        self.nbytes = sum(storage.nbytes() for part in parts for storage in part)
        device = next(model.parameters()).device
        # One block: the allocator of pinned memory rounds each up to a power of two.
        self._host = torch.empty(self.nbytes, dtype=torch.uint8)
        self._entering: _Entering | None = None
        if device.type == "cuda":
            _lock_pages(self._host)
            self._entering = _Entering(device, layers)
        self._parts: list[list[tuple[torch.UntypedStorage, torch.Tensor]]] = []
        begin = 0
        for part in parts:
            copies = []
            for storage in part:
                host = self._host[begin : begin + storage.nbytes()]
                host.copy_(_bytes_of(storage))
                copies.append((storage, host))
                begin += storage.nbytes()
            self._parts.append(copies)

    def leave_device(self) -> None:
        """Free the tensors' storage on the device; they must not be read until they are back."""
        if self._entering is not None:
            self._entering.finish()
        for part in self._parts:
            for storage, _ in part:
                storage.resize_(0)

    def enter_device(self) -> None:
        """Bring the tensors back onto the device, for what its current stream does from now on."""
        for part in self._parts:
            for storage, host in part:
                storage.resize_(len(host))
        for number, part in enumerate(self._parts):
            with nullcontext() if self._entering is None else self._entering.part(number):
                for storage, host in part:
                    _bytes_of(storage).copy_(host, non_blocking=True)


class _Entering:
    """The stream that brings a model onto its GPU, and how far it is.

    Part 0 is waited for at once, part n in the forward of layer n - 1.
    """

    def __init__(self, device: torch.device, layers: Sequence[torch.nn.Module]) -> None:
        self._stream = torch.cuda.Stream(device)
        self._done = [torch.cuda.Event() for _ in range(len(layers) + 1)]
        for number, layer in enumerate(layers, start=1):
            layer.register_forward_pre_hook(lambda *_, number=number: self._wait_for(number))

    @contextmanager
    def part(self, number: int) -> Iterator[None]:
        """Context whose copies are part ``number``."""
        if number == 0:  # what has read or freed this memory before is over then
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._done[number].record(self._stream)
        if number == 0:
            self._wait_for(0)

    def finish(self) -> None:
        """Let the current stream wait for all parts, whose memory it is about to free."""
        torch.cuda.current_stream().wait_stream(self._stream)

    def _wait_for(self, number: int) -> None:
        torch.cuda.current_stream().wait_event(self._done[number])


def _storages(module: torch.nn.Module, seen: set[int]) -> list[torch.UntypedStorage]:
    """Storages of a module's tensors that are not in ``seen``, which they are added to."""
    found = []
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0 and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found.append(storage)
    return found


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a uint8 tensor over the same memory."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload]


def _lock_pages(host: torch.Tensor) -> None:
    """Lock a tensor's pages for as long as it lives, so that copies need not wait for the CPU."""
    cuda = torch.cuda.cudart()
    torch.cuda.check_error(cuda.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    weakref.finalize(host, cuda.cudaHostUnregister, host.data_ptr()).atexit = False


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
                self._host = HostCopy(self._teacher.gpt, self._teacher.gpt.decoder.layers)
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
