"""Refit: all ranks bring the student's weights into the rollout servers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_paced.config import RefitBackend
from nemo_paced.parallel.groups import Parallel
from nemo_paced.refit.meeting import Meeting, Sender
from nemo_paced.refit.transfer import make_sender
from nemo_paced.refit.weight_files import write_weights
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.student.model import Student
from nemo_paced.training.driver import Driver
from nemo_paced.training.exchange import BatchExchange


class Refit:
    """Brings the student's weights into the rollout servers; every student rank has one.

    Its calls are collective.

    Args:
        driver: rank 0's; ``None`` elsewhere.
    """

    def __init__(
        self, student: Student, parallel: Parallel, driver: Driver | None, exchange: BatchExchange
    ) -> None:
        self.student = student
        self.parallel = parallel
        self.driver = driver
        self.exchange = exchange
        self._sender: Sender | None = None
        self._count = 0

    def __call__(self, step: int) -> None:
        """Bring every server to the weights as they are after ``step`` optimizer steps.

        Raises:
            RolloutError: on rank 0; a server refused or was lost.
            StopRequested: on every rank, before anything is sent.
        """
        self.student.sync_parameters()
        self._count += 1
        plan = self.exchange.tell(f"refit/{self._count}", lambda driver: _plan(driver, step))
        if plan["through_files"]:
            self._through_files(step)
            return
        sampler = self.driver.sampler if self.driver is not None else None
        try:
            self._join(plan["meeting"])
            assert self._sender is not None, "the first update forms a group"
            self._sender.send_weights()
        except BaseException:
            if sampler is not None:
                sampler.weights.abandon()
            raise
        if sampler is not None:
            sampler.weights.finish()

    def _through_files(self, step: int) -> None:
        folder = self.driver.sampler.weights.folder if self.driver is not None else None
        source = MegatronWeightSource(self.student.chunks, self.parallel)
        write_weights(source, folder, version=step)
        if self.driver is not None:
            self.driver.sampler.send_weights()

    def _join(self, place: dict[str, Any] | None) -> None:
        """Form a new group with the servers where the last does not stand."""
        if place is None:
            return
        if self._sender is not None:
            self._sender.shutdown()
        meeting = Meeting(
            backend=RefitBackend(place["backend"]),
            address=place["address"],
            port=place["port"],
            workers=tuple(place["workers"]),
        )
        sync = self.driver.sampler.weights.sync if self.driver is not None else None
        self._sender = make_sender(meeting, sync, self.student.chunks, self.parallel)


def _plan(driver: Driver, step: int) -> dict[str, Any]:
    """What every rank has to know of an update; unless files carry it, servers are paused now."""
    sampler = driver.sampler
    if sampler.weights.backend is RefitBackend.file:
        return {"through_files": True}
    meeting = sampler.begin_update(str(step))
    place = None
    if meeting is not None:
        place = {**asdict(meeting), "backend": meeting.backend.value}
    return {"through_files": False, "meeting": place}
