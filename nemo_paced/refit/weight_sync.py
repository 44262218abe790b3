"""Control routes of a weight update, for several rollout servers as if they were one.

The class has the methods of vLLM's ``VLLMWeightSyncClient``, which its trainer-side engines drive,
without importing vLLM. Servers of one update form one group: their workers are numbered one after
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_paced.config import WeightSwap
from nemo_paced.errors import RolloutError
from nemo_paced.serving.client import RolloutClient


class WeightSync:
    """Rank 0's control of a weight update of rollout servers.

    Args:
        client: talks to the servers that are updated together.
        swap: whether responses under way are finished first.
    """

    def __init__(self, client: RolloutClient, swap: WeightSwap) -> None:
        self.client = client
        self.control = client.control
        self.swap = swap
        self.version = ""  # what the servers call the weights of the next update

    def pause(self) -> None:
        """Pause the servers until :meth:`resume`; responses under way are finished, or held."""
        self.control.pause(finish_requests=self.swap is not WeightSwap.in_flight)

    def resume(self) -> None:
        """Let the servers go on, with the weights that they have now."""
        self.control.resume()

    def num_workers(self) -> list[int]:
        """How many ranks each server has."""
        return self.control.num_workers()

    def versions(self) -> list[str | None]:
        """The version of weights that each server was last sent.

        vLLM says "default" of those that it started with.
        """
        return self.control.weight_versions()

    def check_same_weights(self) -> None:
        """Compare vLLM's checksums of every parameter over the servers.

        Raises:
            RolloutError: names servers and parameters that differ.
        """
        first, *others = self.control.checksums()
        for endpoint, found in zip(self.client.endpoints[1:], others, strict=True):
            names = sorted(name for name in first if found.get(name) != first[name])
            if names or len(found) != len(first):
                raise RolloutError(
                    f"{endpoint} and {self.client.endpoints[0]} hold different weights after the "
                    f"same update ({', '.join(names[:3])}, {len(names)} of {len(first)} parameters)"
                )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make every server join the group; blocks until the trainer has joined too.

        With a ``rank_offset``, which is the first server's, each gets its own.
        """
        if "rank_offset" not in init_info:
            self.control.join_group(init_info)
            return
        infos, offset = [], init_info["rank_offset"]
        for workers in self.num_workers():
            infos.append({**init_info, "rank_offset": offset})
            offset += workers
        self._join_each(infos)

    def start_weight_update(self) -> None:
        self.control.begin_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Make every server load what ``update_info`` describes; blocks until all have."""
        self.control.load(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update on every server, whose weights are then called so; else ``version``."""
        self.control.end_update(weight_version or self.version)

    def _join_each(self, infos: Sequence[dict[str, Any]]) -> None:
        """Make each server join by its own message, all at once: they wait for each other."""
        timeout_s = self.client.request_timeout_s
        ones = [self.client.only(e, timeout_s=timeout_s) for e in self.client.endpoints]
        with ThreadPoolExecutor(len(infos)) as pool:
            joined = [
                pool.submit(one.control.join_group, info)
                for one, info in zip(ones, infos, strict=True)
            ]
            for server in joined:
                server.result()
