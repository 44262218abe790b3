"""The trainer's end of ``rollout.refit=gloo``: rank 0 broadcasts parameters over the network.

Laid out like vLLM's NCCL engine, with a gloo group of rank 0 and every server's workers in place of
NCCL's, so that it runs wherever two processes reach each other: between CPUs, and to servers on
other nodes that share no disk with the trainer. The servers' end is in ``vllm_plugin.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

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
    """

    again = None  # what is broadcast all ranks have to gather

    def __init__(
        self, meeting: Meeting, sync: WeightSync | None, source: MegatronWeightSource
    ) -> None:
        self.meeting = meeting
        self.sync = sync
        self.source = source
        self._group: Any = None  # rank 0's, as long as it stands
        self._parameters: Iterator[tuple[str, torch.Tensor | None]] = iter(())

    def prepare(self) -> None:
        """Join the servers' group, the first time; parameters are gathered while they are sent.

        Raises:
            RolloutError: on rank 0; a server did not join.
        """
        self._parameters = iter(self.source)
        if self.sync is None or self._group is not None:
            return
        sync = self.sync
        rendezvous: dict[str, Any] = {
            "master_address": self.meeting.address,
            "master_port": self.meeting.port,
            "world_size": 1 + sum(self.meeting.workers),
        }
        info = {**rendezvous, "rank_offset": 1}
        self._group = _beside(
            lambda: sync.init_weight_transfer_engine(info),
            lambda: join_group(**rendezvous, rank=0),
        )

    def send_weights(self) -> None:
        """Send the student's weights to all servers; collective, see :class:`~.meeting.Sender`."""
        if self.sync is None:
            self._gather_the_rest()
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

    def abandon(self) -> bool:
        """Take part in the gathers that are left, for the other ranks, and leave the group."""
        self._gather_the_rest()
        self._group = None
        return True

    def shutdown(self) -> None:
        self._group = None

    def _gather_the_rest(self) -> None:
        for _ in self._parameters:
            pass

    def _broadcast(self) -> None:
        assert self._group is not None, "rank 0 has one"
        try:
            for name, tensor in self._parameters:
                assert tensor is not None, f"rank 0 gets every tensor, {name} too"
                broadcast(self._group, tensor.cpu().contiguous())
        except RuntimeError:
            self._group = None  # closed: servers that are well would wait for the next parameter
            raise


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
