"""The control routes of a weight update, of several servers as if they were one.

Has the methods of vLLM's ``VLLMWeightSyncClient``, which its trainer-side engines drive, without
importing vLLM. Servers of one update form one group: their workers are numbered one after another.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_paced.config import WeightSwap
from nemo_paced.errors import RolloutError
from nemo_paced.serving.client import RolloutClient


class WeightSync:
    """Used by rank 0.

    Args:
        client: of the servers that are updated together.
        swap: whether responses under way are finished first.
    """

    def __init__(self, client: RolloutClient, swap: WeightSwap) -> None:
        self.client = client
        self.swap = swap
        self.version = ""  # what the servers call the weights of the next update

    def pause(self) -> None:
        """Until :meth:`resume` no server computes; what is under way is finished or held."""
        mode = "keep" if self.swap is WeightSwap.in_flight else "wait"
        self.client.call("POST", "/pause", params={"mode": mode, "clear_cache": "true"})

    def resume(self) -> None:
        # Cached keys and values are of the old weights; requests that are held compute theirs anew.
        self.client.call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})
        self.client.call("POST", "/resume")

    def num_workers(self) -> list[int]:
        """Ranks of each server."""
        return [int(answer["world_size"]) for answer in self.client.call("GET", "/get_world_size")]

    def versions(self) -> list[str | None]:
        """What each server was last sent; vLLM says "default" of the weights it started with."""
        return [answer.get("weight_version") for answer in self.client.call("GET", "/weight_info")]

    def check_same_weights(self) -> None:
        """Compare vLLM's checksums of every parameter over the servers.

        Raises:
            RolloutError: names servers and parameters that differ.
        """
        answers = self.client.call("POST", "/weight_checker", json={"action": "checksum"})
        first, *others = [answer["checksums"] for answer in answers]
        for endpoint, found in zip(self.client.endpoints[1:], others, strict=True):
            names = sorted(name for name in first if found.get(name) != first[name])
            if names or len(found) != len(first):
                raise RolloutError(
                    f"{endpoint} and {self.client.endpoints[0]} hold different weights after the "
                    f"same update ({', '.join(names[:3])}, {len(names)} of {len(first)} parameters)"
                )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every server joins; blocks until the trainer has joined too."""
        if "rank_offset" not in init_info:
            self._post("/init_weight_transfer_engine", {"init_info": init_info})
            return
        infos, offset = [], init_info["rank_offset"]
        for workers in self.num_workers():
            infos.append({"init_info": {**init_info, "rank_offset": offset}})
            offset += workers
        self._post_each("/init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self.client.call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Blocks until every server has loaded what is sent."""
        parts = [update_info] if isinstance(update_info, dict) else update_info
        safe = [_json_safe(part) for part in parts]
        one = isinstance(update_info, dict)
        self._post("/update_weights", {"update_info": safe[0] if one else safe})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or self.version
        self._post("/finish_weight_update", {"weight_version": version})

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self.client.call("POST", path, json=body)

    def _post_each(self, path: str, bodies: Sequence[dict[str, Any]]) -> None:
        """Of every server its own, at once: they wait for each other."""
        timeout_s = self.client.request_timeout_s
        with ThreadPoolExecutor(len(bodies)) as pool:
            posted = [
                pool.submit(
                    self.client.only(endpoint, timeout_s=timeout_s).call, "POST", path, json=body
                )
                for endpoint, body in zip(self.client.endpoints, bodies, strict=True)
            ]
            for answer in posted:
                answer.result()


def _json_safe(update_info: dict[str, Any]) -> dict[str, Any]:
    """CUDA IPC handles are tuples of bytes: pickled for the server, which asks for our key."""
    if "ipc_handles" not in update_info:
        return update_info
    rest = {name: value for name, value in update_info.items() if name != "ipc_handles"}
    rest.pop("ipc_handles_pickled", None)
    pickled = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    return {**rest, "ipc_handles_pickled": pickled}
