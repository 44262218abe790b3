"""Messages between ranks without a collective: JSON through torch.distributed's key-value store.

A wait on one of its keys may take hours, where a
collective that waits runs into its timeout and ends the job.
"""

from __future__ import annotations

import json
import zlib
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store

# Rank 0 may sample pass rates of a whole data set between two messages; if it dies meanwhile, the
# launcher ends the ranks that wait.
MESSAGE_TIMEOUT_S = 7 * 24 * 3600.0


class Messages:
    """JSON values under keys, each written once, for every process that shares the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def of_world(cls) -> Messages:
        """Messages among the ranks of torch.distributed's default group."""
        return cls(torch.distributed.distributed_c10d._get_default_store())

    def publish(self, key: str, value: Any) -> None:
        """Give the other processes a JSON value under a key of its own."""
        payload: Any = zlib.compress(json.dumps(value).encode(), level=1)
        self._store.set(key, payload)

    def wait(self, key: str, timeout_s: float = MESSAGE_TIMEOUT_S) -> Any:
        """The value published under ``key``, as soon as it is there.

        Raises:
            torch.distributed.DistStoreError: after ``timeout_s``.
        """
        self._store.wait([key], timedelta(seconds=timeout_s))
        return json.loads(zlib.decompress(self._store.get(key)))

    def are_there(self, keys: list[str]) -> bool:
        """Whether all of these keys are published, without waiting."""
        return bool(self._store.check(keys))

    def forget(self, key: str) -> None:
        """Drop a key that everyone has read."""
        self._store.delete_key(key)
