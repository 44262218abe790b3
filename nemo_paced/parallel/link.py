"""Two worlds of ranks in one job, the student's and the teacher's, and what goes between them.

``torchrun`` or ``srun`` starts all ranks alike; with ``teacher.separate_ranks`` the last ones form
a world that runs the teacher alone. Megatron's global groups, and a world's collectives, then know
nothing of the other world. Between the worlds go JSON through the job's key-value store, on which
either side waits with a timeout, and tensors point to point once both are known to be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from nemo_paced.errors import ConfigError
from nemo_paced.parallel.messages import Messages


class Link:
    """This rank's end of the connection between the student's and the teacher's worlds.

    Attributes:
        rank, size: in the job, where the student's ranks come before the teacher's.
        students: how many of the job's ranks are the student's.
        messages: JSON between the ranks of both worlds.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        students: int,
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        self.rank = rank
        self.size = size
        self.students = students
        self.messages = Messages(PrefixStore("link", store))
        self._group = _make_group(PrefixStore("tensors", store), rank, size, device, timeout)

    @property
    def is_teacher(self) -> bool:
        return self.rank >= self.students

    def transfer(
        self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]
    ) -> None:
        """Send and receive tensors point to point; returns when all have arrived.

        Args:
            outgoing: by the rank in the job that each tensor goes to.
            incoming: contiguous buffers to receive into, by the rank that sends.
        """
        works = [self._group.send([part.contiguous()], peer, 0) for peer, part in outgoing.items()]
        works += [self._group.recv([buffer], peer, 0) for peer, buffer in incoming.items()]
        for work in works:
            work.wait()


def split_world(
    separate_ranks: int, *, backend: str, device: torch.device, timeout: timedelta
) -> Link:
    """Join the job as a rank of the student's or of the teacher's world.

    Args:
        separate_ranks: how many of the job's last ranks are the teacher's.
        timeout: of collectives, transfers and the store.

    Raises:
        ConfigError: not started by torchrun or srun, or too few ranks.
    """
    if "RANK" not in os.environ:
        raise ConfigError(
            f"teacher.separate_ranks is {separate_ranks} and this process has no others: start "
            "trainer.devices ranks"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    students = size - separate_ranks
    if students < 1:
        raise ConfigError(
            f"{size} ranks were started and teacher.separate_ranks is {separate_ranks}: none is "
            "left for the student"
        )
    store, _, _ = next(torch.distributed.rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    is_teacher = rank >= students
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore("teacher" if is_teacher else "student", store),
        rank=rank - students if is_teacher else rank,
        world_size=separate_ranks if is_teacher else students,
        timeout=timeout,
    )
    return Link(store, rank, size, students, device, timeout)


def _make_group(
    store: Store, rank: int, size: int, device: torch.device, timeout: timedelta
) -> Any:
    """A group over both worlds, for messages point to point only.

    It is made beside torch.distributed's default one, which knows one world.
    """
    if device.type == "cuda":
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return torch.distributed.ProcessGroupNCCL(store, rank, size, options)
    return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
