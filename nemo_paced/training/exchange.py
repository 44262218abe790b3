"""Exchange of batches: rank 0 makes them, ahead of their turn where that helps, for every rank.

Rank 0 makes a batch (stored responses, or rollouts of the served student) and gives it to the other
ranks through the store. It makes the next ones early in two cases: a teacher on ranks of its own
works one batch ahead, and with ``rollout.max_staleness`` the server samples for the steps to come,
in a thread, while this one is trained on. All ranks count what is ahead: a refit is collective.

Whatever the others wait for, under its key they may also hear that the run stops (``stop.py``), or
that the servers have lost the weights: all stop, or send them, at the same place then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

from nemo_paced.config import PacedConfig, ResponseSource
from nemo_paced.errors import WeightsLost
from nemo_paced.parallel.groups import Parallel
from nemo_paced.teacher.remote import RemoteTeacher
from nemo_paced.training import schedule, stop
from nemo_paced.training.batches import Batch
from nemo_paced.training.driver import Driver
from nemo_paced.training.schedule import Stage

_STOP = "stop"  # rank 0's message in place of the one that is waited for
_LOST = "weights lost"  # likewise
_STOP_WANTED = "stop_wanted"  # the key under which a rank that was asked to stop tells rank 0

T = TypeVar("T")


class BatchExchange:
    """Gives rank 0's batches and results to every rank.

    It is a context manager: leaving it waits for what is being sampled, unless by an error.

    Args:
        driver: rank 0's; ``None`` elsewhere.
        remote: a teacher on ranks of its own.
    """

    def __init__(
        self,
        config: PacedConfig,
        stages: list[Stage],
        driver: Driver | None,
        parallel: Parallel,
        remote: RemoteTeacher | None,
    ) -> None:
        self.config = config
        self.stages = stages
        self.driver = driver
        self.parallel = parallel
        self.remote = remote
        self._sampled_until = 0  # rollouts of the steps below are made or being made
        self._announced_until = 0  # the remote teacher knows the batches of the steps below
        self._ahead: dict[int, Future[Batch]] = {}  # rank 0's
        self._given = 0  # batches of give_all; part of their keys
        self._losses = 0  # of the servers' weights; what is asked for again has another key
        self._published: list[str] = []  # rank 0's: keys that are still in the store
        self._sampler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")

    def __enter__(self) -> BatchExchange:
        return self

    def __exit__(self, *error: object) -> None:
        # on an error the server is about to be stopped, which ends what waits for it
        self._sampler.shutdown(wait=error[0] is None, cancel_futures=True)

    def is_sampled(self, step: int) -> bool:
        """Whether the step's rollouts have been asked for already; the same on every rank."""
        return step < self._sampled_until

    def batch(self, step: int, consumed: int, stage: Stage, served_step: int | None) -> Batch:
        """The batch of a step, on every rank; it is made now if it is not yet.

        Args:
            consumed: problems of the steps before.
            served_step: optimizer steps behind the weights that it would be sampled with.

        Raises:
            StopRequested, WeightsLost: as in :meth:`give`.
        """
        batch = self.give(_key(step), lambda: self._made(step, consumed, stage, served_step))
        self._sampled_until = max(self._sampled_until, step + 1)
        if self.remote is not None and self.driver is not None:
            self._announce(self.remote, batch, step)
            if stage.config.responses is ResponseSource.references and self._goes_on(stage, step):
                ahead = self._make_later(step + 1, consumed + self._size, stage, None)
                self._announce(self.remote, ahead.result(), step + 1)
        return batch

    def sample_ahead(self, step: int, consumed: int, stage: Stage, served_step: int) -> None:
        """Begin to sample the following steps, as many as may be sampled before their turn.

        Args:
            consumed: problems of the steps before ``step``.
            served_step: optimizer steps behind the served weights.
        """
        last = step
        while last < step + self.config.rollout.steps_ahead and self._goes_on(stage, last):
            last += 1
            if self.driver is not None and not self.is_sampled(last):
                later = consumed + (last - step) * self._size
                self._make_later(last, later, stage, served_step)
        self._sampled_until = max(self._sampled_until, last + 1)

    def settle(self) -> None:
        """Wait until nothing is being sampled: the server is needed for something else.

        What failed is told to all ranks when its batch is asked for.
        """
        wait(self._ahead.values())

    def give_all(self, make: Callable[[], Batch]) -> Batch:
        """A batch beside those of the steps, which rank 0 makes now, on every rank."""
        self._given += 1
        return self.give(f"given/{self._given}", make)

    def give(self, key: str, make: Callable[[], Batch]) -> Batch:
        """The batch that rank 0 makes, on every rank.

        Args:
            key: its name in the store, the same on every rank and used once.

        Raises:
            StopRequested: on every rank.
            WeightsLost: on every rank: after another refit the same is to be asked for again.
        """
        if self.driver is None:
            return Batch.from_message(self._await(key))
        batch = self._unless_stopped(key, make)
        self._publish(key, batch.to_message())
        return batch

    def read_everywhere(self) -> None:
        """Remove what was given so far from the store.

        It is called after a collective, before which every rank has read what was given.
        """
        while self._published:
            self.parallel.messages.forget(self._published.pop())

    def tell(self, key: str, work: Callable[[Driver], T]) -> T:
        """Rank 0's result, plain data, on every rank; the others do not wait in a collective.

        Raises:
            StopRequested: on every rank.
            WeightsLost: on every rank: after another refit the same is to be asked for again.
        """
        driver = self.driver
        if driver is None:
            return self._await(key)  # type: ignore[no-any-return]
        result = self._unless_stopped(key, lambda: work(driver))
        self._publish(key, result)
        return result

    def on_rank_0(self, key: str, work: Callable[[Driver], T]) -> T | None:
        """The result of ``work`` on rank 0; the others wait for its end, as in :meth:`tell`."""
        results: list[T] = []

        def done(driver: Driver) -> str:
            results.append(work(driver))
            return "done"

        self.tell(key, done)
        return results[0] if results else None

    def _await(self, key: str) -> Any:
        if stop.requested():
            self.parallel.messages.publish(_STOP_WANTED, self.parallel.rank)
        message = self.parallel.messages.wait(self._numbered(key))
        if message == _STOP:
            raise stop.StopRequested
        if message == _LOST:
            self._losses += 1
            raise WeightsLost("told by rank 0")
        return message

    def _unless_stopped(self, key: str, make: Callable[[], T]) -> T:
        """What rank 0 makes while the others wait for it, or all stop (or send weights) here."""
        try:
            with stop.interruptible():
                others = self.parallel.world_size > 1
                if others and self.parallel.messages.are_there([_STOP_WANTED]):
                    raise stop.StopRequested
                return make()
        except stop.StopRequested:
            self._publish(key, _STOP)
            raise
        except WeightsLost:
            self._publish(key, _LOST)
            self._losses += 1
            raise

    def _publish(self, key: str, message: Any) -> None:
        if self.parallel.world_size > 1:
            self.parallel.messages.publish(self._numbered(key), message)
            self._published.append(self._numbered(key))

    def _numbered(self, key: str) -> str:
        return f"{key}/{self._losses}"

    @property
    def _size(self) -> int:
        return self.config.model.global_batch_size

    def _goes_on(self, stage: Stage, step: int) -> bool:
        """Whether the next step is of the same stage, with the same estimate of pass rates."""
        following = step + 1
        if following >= self.config.trainer.max_steps:
            return False
        if schedule.reestimation_due(self.config.weights, stage, following):
            return False
        return schedule.stage_at(self.stages, following) is stage

    def _made(self, step: int, consumed: int, stage: Stage, served_step: int | None) -> Batch:
        if step not in self._ahead:
            return self._make(step, consumed, stage, served_step)
        return self._ahead.pop(step).result()

    def _make_later(
        self, step: int, consumed: int, stage: Stage, served_step: int | None
    ) -> Future[Batch]:
        made = self._sampler.submit(self._make, step, consumed, stage, served_step)
        self._ahead[step] = made
        return made

    def _make(self, step: int, consumed: int, stage: Stage, served_step: int | None) -> Batch:
        assert self.driver is not None, "rank 0 has one"
        begin = time.perf_counter()
        batch = self.driver.batch(step, consumed, stage.config)
        if stage.config.responses is ResponseSource.references or served_step is None:
            return batch
        took = {
            "rollout/staleness": step - served_step,
            "rollout/sampling_s": time.perf_counter() - begin,
        }
        return replace(batch, metrics={**batch.metrics, **took})

    def _announce(self, remote: RemoteTeacher, batch: Batch, step: int) -> None:
        if step >= self._announced_until:
            self._announced_until = step + 1
            if batch.items:
                remote.announce(batch.items)


def _key(step: int) -> str:
    return f"batch/{step}"
