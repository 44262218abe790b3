"""A gloo group of processes that belong to different programs: trainer and rollout servers.

This module imports torch alone: the servers' environment may hold nothing else of the trainer's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

JOIN_TIMEOUT_S = 120.0
MESSAGE_TIMEOUT_S = 600.0  # of one parameter


def join_group(*, master_address: str, master_port: int, rank: int, world_size: int) -> Any:
    """Make a gloo group beside those of torch.distributed; blocks until all ranks have joined.

    Rank 0 listens at the master address.
    """
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    store = TCPStore(master_address, master_port, world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(store, rank, world_size, timedelta(seconds=MESSAGE_TIMEOUT_S))


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Broadcast a CPU tensor from the group's rank 0 to the others, in place."""
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
