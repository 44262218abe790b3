"""Bytes of the storages that are alive, and at most in each phase of a step."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Counts each storage from the operator that makes it to its last reference.

    What an operator allocates and frees within itself is not seen, nor is an allocator's rounding.

    Attributes:
        live: bytes that are alive now.
        operations: operators seen so far.
        peaks: most bytes alive at a time, by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.operations = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._known: set[int] = set()

    def enter_phase(self, name: str) -> None:
        """Begin a phase, or go on with it; what is alive now counts in it."""
        self._phase = name
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self._note()
        weakref.finalize(storage, self._died, key, size).atexit = False

    def _died(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)  # the address may be another storage's next

    def _note(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.live)
