"""Peak memory of a piece of code: of the CUDA allocator, or of tensors alive on the CPU.

The CPU has no allocator statistics. ``track_peak`` sees every operator's outputs and counts each
new storage from its birth to its last reference. What an operator allocates and frees within itself
is not seen; ``peak_rss_rise`` sees that too, and pages the allocator keeps, so the two bound the
truth from below and, roughly, above.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Bytes of storages born under this mode: ``live`` now, ``bytes`` at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):  # older than this mode, unless already known
            self._meet(tensor, 0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._meet(tensor, tensor.untyped_storage().nbytes())
        return result

    def _meet(self, tensor: torch.Tensor, size: int) -> None:
        """Count ``size`` bytes from now to the storage's end, unless it was met before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.bytes = max(self.bytes, self.live)
        weakref.finalize(storage, self._died, key, size).atexit = False

    def _died(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)  # the address may be another storage's next


@contextmanager
def track_peak() -> Iterator[Peak]:
    """``with track_peak() as peak: ...``; then ``peak.bytes``, above what was alive before."""
    with Peak() as peak:
        yield peak


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes alive during ``run`` beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with track_peak() as peak:
        run()
    return peak.bytes


def peak_rss_rise(run: Callable[[], None]) -> int | None:
    """How far the process's resident memory rose during ``run``; ``None`` without Linux's /proc."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is now
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
