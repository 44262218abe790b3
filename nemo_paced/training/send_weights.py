"""Refit: all ranks bring the student's weights into the rollout servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel.groups import Parallel
from nemo_paced.refit.meeting import Meeting, Sender
from nemo_paced.refit.transfer import make_sender
from nemo_paced.rollout.sampler import Sampler


class HasSampler(Protocol):
    """Rank 0's driver, of a training run or of a measurement."""

    @property
    def sampler(self) -> Sampler: ...


class Refit:
    """Brings a model's weights into the rollout servers; every rank that holds a part has one.

    Its calls are collective.

    Args:
        chunks: this rank's parts of the model.
        driver: rank 0's; ``None`` elsewhere.
        tell: returns, on every rank and under a key, the plain data that a function makes of the
            driver on rank 0.
    """

    def __init__(
        self,
        chunks: Sequence[PacedGPTModel],
        parallel: Parallel,
        driver: HasSampler | None,
        tell: Callable[[str, Callable[[Any], Any]], Any],
    ) -> None:
        self.chunks = chunks
        self.parallel = parallel
        self.driver = driver
        self.tell = tell
        self._sender: Sender | None = None
        self._count = 0

    def __call__(self, step: int) -> None:
        """Bring every server to the weights as they are after ``step`` optimizer steps.

        Where a server of ours dies in its midst, the servers have not these weights when it
        returns: what is sampled next raises WeightsLost on every rank, as whenever they lose them.

        Raises:
            RolloutError: on rank 0; a server refused, or one was lost and could not be replaced.
            StopRequested, WeightsLost: ``tell``'s, before anything is sent.
        """
        self._count += 1
        message = self.tell(f"refit/{self._count}", lambda driver: _begin(driver, step))
        sender = self._joined(message)
        if self.driver is None:
            sender.prepare()
            sender.send_weights()
        else:
            self.driver.sampler.update(sender)

    def _joined(self, message: dict[str, Any] | None) -> Sender:
        """The sender of a new group, or of the last one where that stands."""
        if message is not None:
            if self._sender is not None:
                self._sender.shutdown()
            weights = None if self.driver is None else self.driver.sampler.weights
            meeting = Meeting.from_message(message)
            self._sender = make_sender(meeting, weights, self.chunks, self.parallel)
        assert self._sender is not None, "the first update forms a group"
        return self._sender


def _begin(driver: HasSampler, step: int) -> dict[str, Any] | None:
    meeting = driver.sampler.begin_update(str(step))
    return None if meeting is None else meeting.to_message()
