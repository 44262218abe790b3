"""Weights from the trainer's memory into the rollout servers', over one of several transports.

``nccl``, ``nccl_m2n`` and ``ipc`` are vLLM's own trainer-side engines, which need GPUs and vLLM in
the trainer's environment; ``gloo`` is ours (``gloo_transfer.py``) and has the same two methods.
``file`` goes through files instead (``refit.py``).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from nemo_paced.config import RefitBackend
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel import Parallel
from nemo_paced.rollout.backends import LOOPBACK, is_loopback
from nemo_paced.rollout.gloo_transfer import GlooSender
from nemo_paced.rollout.sidecar import free_ports
from nemo_paced.rollout.weight_source import MegatronWeightSource
from nemo_paced.rollout.weight_sync import WeightSync


class Sender(Protocol):
    """What vLLM calls a ``TrainerWeightTransferEngine``."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where trainer and servers form a group, and how large the servers are.

    Attributes:
        workers: ranks of each server.
    """

    backend: RefitBackend
    address: str
    port: int
    workers: tuple[int, ...]


def meeting(backend: RefitBackend, sync: WeightSync) -> Meeting:
    """A free port of this process's machine, at the address that the servers reach it by."""
    host = urlsplit(sync.client.endpoints[0]).hostname or LOOPBACK
    address = LOOPBACK if is_loopback(host) else _address_towards(host)
    (port,) = free_ports(address, 1)
    return Meeting(backend, address, port, tuple(sync.num_workers()))


def make_sender(
    meeting: Meeting,
    sync: WeightSync | None,
    chunks: Sequence[PacedGPTModel],
    parallel: Parallel,
) -> Sender:
    """Join the servers' group; collective over the trainer's ranks.

    Args:
        sync: rank 0's; ``None`` elsewhere.

    Raises:
        RolloutError: a server did not join.
    """
    if meeting.backend is not RefitBackend.gloo:
        from nemo_paced.rollout.vllm_senders import make_vllm_sender

        return make_vllm_sender(meeting, sync, chunks, parallel)
    rendezvous = {
        "master_address": meeting.address,
        "master_port": meeting.port,
        "world_size": 1 + sum(meeting.workers),
    }
    return GlooSender(sync, MegatronWeightSource(chunks, parallel), rendezvous)


def _address_towards(host: str) -> str:
    """This machine's address on the network that leads to a host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
