"""The trainer's end of ``rollout.refit=gloo``: rank 0 broadcasts parameters over the network.

Laid out like vLLM's NCCL engine, with a gloo group of rank 0 and every server's workers in place of
NCCL's, so that it runs wherever two processes reach each other: between CPUs, and to servers on
other nodes that share no disk with the trainer. The servers' end is in ``vllm_plugin.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from nemo_paced.errors import RolloutError
from nemo_paced.refit.gloo_group import JOIN_TIMEOUT_S, broadcast, join_group
from nemo_paced.refit.meeting import Meeting
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.refit.weight_sync import WeightSync


class GlooSender:
    """Sender of ``rollout.refit=gloo``; every trainer rank makes one and calls it at the same time.

    Args:
        meeting: where rank 0 and all workers of the servers form a group.
        sync: rank 0's; ``None`` on the others, which only take part in gathering the weights.

    Raises:
        RolloutError: a server did not join.
    """

    again = None  # what is broadcast all ranks have to gather

    def __init__(
        self, meeting: Meeting, sync: WeightSync | None, source: MegatronWeightSource
    ) -> None:
        self.sync = sync
        self.source = source
        self._group: Any = None
        if sync is not None:
            rendezvous: dict[str, Any] = {
                "master_address": meeting.address,
                "master_port": meeting.port,
                "world_size": 1 + sum(meeting.workers),
            }
            info = {**rendezvous, "rank_offset": 1}
            self._group = _beside(
                lambda: sync.init_weight_transfer_engine(info),
                lambda: join_group(**rendezvous, rank=0),
            )

    def prepare(self) -> None:
        """Nothing: parameters are gathered one at a time, while they are sent."""

    def send_weights(self) -> None:
        """Send the student's weights to all servers; collective, see :class:`~.meeting.Sender`."""
        if self.sync is None:
            for _ in self.source:  # take part in the gathers
                pass
            return
        sync, parameters = self.sync, self.source.metadata()
        info = {
            "names": [meta.name for meta in parameters],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in parameters],
            "shapes": [list(meta.shape) for meta in parameters],
        }
        sync.start_weight_update()
        _beside(lambda: sync.update_weights(info), self._broadcast)
        sync.finish_weight_update()

    def shutdown(self) -> None:
        self._group = None

    def _broadcast(self) -> None:
        assert self._group is not None, "rank 0 has one"
        for name, tensor in self.source:
            assert tensor is not None, f"rank 0 gets every tensor, {name} too"
            broadcast(self._group, tensor.cpu().contiguous())


def _beside(server_side: Callable[[], None], ours: Callable[[], Any]) -> Any:
    """Run both at once, since each waits for the other; returns the result of ``ours``.

    Where ours fails, the servers' error comes first: it says more.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-sync")
    asked = pool.submit(server_side)
    try:
        result = ours()
        asked.result()
        return result
    except RuntimeError as error:  # torch's of a broken connection are subclasses
        ended, _ = wait([asked], JOIN_TIMEOUT_S)
        cause = (asked.exception() if ended else None) or error
        raise RolloutError(f"the weights did not reach the rollout servers: {cause}") from cause
    finally:
        pool.shutdown(wait=False)
