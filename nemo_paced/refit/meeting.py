"""Rendezvous of the process group that trainer and servers form to move weights."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from nemo_paced.config import RefitBackend
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.serving.backends import LOOPBACK, is_loopback
from nemo_paced.serving.sidecar import free_ports


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where trainer and servers form a process group, and how large the servers are.

    Attributes:
        backend: the transport that the group is for.
        address, port: where the trainer's rank 0 listens.
        workers: how many ranks each server has.
    """

    backend: RefitBackend
    address: str
    port: int
    workers: tuple[int, ...]

    def to_message(self) -> dict[str, Any]:
        """Plain data, from which :meth:`from_message` makes it on another rank."""
        return {**asdict(self), "backend": self.backend.value}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Meeting:
        given = {"backend": RefitBackend(message["backend"]), "workers": tuple(message["workers"])}
        return cls(**{**message, **given})


class Sender(Protocol):
    """The trainer's side of a transport of weights; every rank of the trainer has one.

    ``prepare`` and ``send_weights`` are collective, in this order.
    """

    @property
    def again(self) -> Callable[[WeightSync], None] | None:
        """How rank 0 alone brings servers, paused, the weights sent last; ``None``: it cannot."""

    def prepare(self) -> None:
        """Do what servers need not be paused for."""

    def send_weights(self) -> None:
        """Bring the prepared weights into all servers, which are paused.

        Raises:
            RolloutError: a server refused, or was lost on the way. Where there is ``again``, the
                call may be repeated by rank 0 alone.
        """

    def abandon(self) -> bool:
        """After an error on rank 0, end there what the other ranks go through all the same.

        Returns:
            Whether that was possible: all ranks may then send anew, through another group.
        """

    def shutdown(self) -> None:
        """Leave the servers' group; the last call."""


def meeting(backend: RefitBackend, sync: WeightSync) -> Meeting:
    """A new rendezvous: a free port of this machine, at the address by which servers reach it.

    Servers on this machine reach it by the address that others use, too.
    """
    hosts = [urlsplit(endpoint).hostname or LOOPBACK for endpoint in sync.client.endpoints]
    elsewhere = [host for host in hosts if not is_loopback(host)]
    address = _address_towards(elsewhere[0]) if elsewhere else LOOPBACK
    (port,) = free_ports(address, 1)
    return Meeting(backend, address, port, tuple(sync.num_workers()))


def _address_towards(host: str) -> str:
    """This machine's address on the network that leads to a host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
