"""Environment variables that CUDA and torch read when a rank first uses its GPU.

They are the trainer's alone: a rollout server that rank 0 starts does not inherit them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # its name before torch 2.9
# One queue of kernels: communication that Megatron starts before a GEMM runs beside it. Segments
# that grow: rows of a few lengths leave no holes that none of the others fits.
_OURS = {_CONNECTIONS: "1", _ALLOCATOR: "expandable_segments:True"}


def set_for_trainer(*, shares_memory: bool) -> None:
    """Set what this process's environment does not say.

    Args:
        shares_memory: whether tensors are handed to other processes by CUDA IPC, which takes no
            handle of a segment that grows.
    """
    os.environ.setdefault(_CONNECTIONS, _OURS[_CONNECTIONS])
    if not shares_memory and _OLD_ALLOCATOR not in os.environ:
        os.environ.setdefault(_ALLOCATOR, _OURS[_ALLOCATOR])


def without_trainers(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what :func:`set_for_trainer` has set."""
    return {name: value for name, value in environment.items() if _OURS.get(name) != value}
