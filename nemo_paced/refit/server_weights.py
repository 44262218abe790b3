"""Rank 0's account of the weights that the rollout servers hold, and of those they should hold.

A server that was started anew is sent the last weights again, where rank 0 can do so alone (from
files). Over the other transports only all trainer ranks together can send: such a server is left
out until the next refit, and when no server is left, :class:`WeightsLost` asks for a refit now.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_paced.config import RefitBackend, WeightSwap
from nemo_paced.errors import RolloutError, WeightsLost
from nemo_paced.refit.meeting import Meeting, Sender, meeting
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.serving.client import PROBE_TIMEOUT_S, RolloutClient

logger = logging.getLogger(__name__)


class ServerWeights:
    """The weights of the rollout servers: what each should hold, and how it gets them again.

    It is thread-safe: the trainer's thread sends weights while the sampler's brings servers back.

    Args:
        client: talks to all servers.
        swap: what a new version does to responses under way.
        folder: where a transport may put files that the servers read.
    """

    def __init__(
        self, client: RolloutClient, backend: RefitBackend, swap: WeightSwap, folder: Path
    ) -> None:
        self.client = client
        self.backend = backend
        self.folder = folder
        self.sync = WeightSync(client, swap)
        self._sent: str | None = None  # version last sent
        self._again: Callable[[WeightSync], None] | None = None  # its sender's
        self._compared = len(client.endpoints) == 1
        self._lock = threading.RLock()

    @property
    def version(self) -> str | None:
        """The version of weights that the servers should have; ``None``: those they began with."""
        return self._sent

    def begin(self, version: str) -> Meeting | None:
        """Name the weights that :meth:`update` will send; returns the group to form.

        ``None``: the last group still stands.

        Raises:
            RolloutError: a server cannot be reached.
        """
        with self._lock:
            before = self.sync.versions()
            self.sync.version = version
            if self._sent is not None and set(before) == {self._sent}:
                return None
            for endpoint, served in zip(self.client.endpoints, before, strict=True):
                if self._sent is not None and served == self._sent:  # still in the old group
                    self._only(endpoint).control.leave_group()
            return meeting(self.backend, self.sync)

    def update(self, sender: Sender) -> None:
        """Pause the servers, send them the weights, let them go on; rank 0's part of an update.

        Where it fails the servers stay paused, since they may hold half an update.

        Raises:
            RolloutError: a server cannot be reached or refused, or two of them differ.
        """
        with self._lock:
            self.sync.pause()
            sender.send_weights()
            self._compare()
            self.sync.resume()
            self._sent, self._again = self.sync.version, sender.again

    def give_up_update(self) -> None:
        """After a failed update: the servers should have its weights, and rank 0 cannot send them.

        What samples next raises WeightsLost then, whatever versions the servers began with.
        """
        with self._lock:
            self._sent, self._again = self.sync.version, None

    def current(self, endpoint: str) -> bool:
        """Whether a server has the weights that it should; it is sent them where rank 0 can.

        Raises:
            WeightsLost: it has not, no other server has, and only all ranks together can send them.
        """
        with self._lock:
            version = self.version
            if version is None:
                return True
            served = self._served(endpoint)
            if served == version or served is _UNREACHABLE:
                return served == version
            if self._again is not None:
                return self._send_again(self._again, endpoint, served)
            if all(self._served(other) != version for other in self.client.endpoints):
                raise WeightsLost(
                    f"{endpoint} was started again and lost the weights of step {version}"
                )
            return False

    def usable(self) -> Sequence[str]:
        """Endpoints to sample from: those that answer, with the weights that they should have.

        All of them where none answers: whoever asks then waits for them.
        """
        if self.version is None:
            return self.client.endpoints
        found = [endpoint for endpoint in self.client.endpoints if self.current(endpoint)]
        if len(found) in (0, len(self.client.endpoints)):
            return self.client.endpoints
        for endpoint in set(self.client.endpoints) - set(found):
            logger.warning("%s has not the current weights: its requests go to others", endpoint)
        return found

    def _served(self, endpoint: str) -> str | None:
        try:
            control = self.client.only(endpoint, timeout_s=PROBE_TIMEOUT_S).control
            return control.weight_versions()[0]
        except RolloutError:
            return _UNREACHABLE

    def _send_again(
        self, again: Callable[[WeightSync], None], endpoint: str, served: str | None
    ) -> bool:
        logger.warning("%s has weights %s, not %s: sent again", endpoint, served, self._sent)
        sync = WeightSync(self._only(endpoint), self.sync.swap)
        sync.version = self._sent or ""
        try:
            sync.pause()
            again(sync)
            sync.resume()
        except RolloutError:
            return False
        return True

    def _compare(self) -> None:
        """Compare the servers' weights, after the first update alone.

        A transport that reaches one server intact and another one not would show then.
        """
        if not self._compared:
            self.sync.check_same_weights()
            self._compared = True

    def _only(self, endpoint: str) -> RolloutClient:
        return self.client.only(endpoint, timeout_s=self.client.request_timeout_s)


_UNREACHABLE = "no answer"  # in place of a version
