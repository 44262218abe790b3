"""Rank 0's account of the weights that the rollout servers hold, and of those they should hold.

With ``rollout.refit=file`` what was last written can be sent again to a server that was started
anew. Over the other transports only all trainer ranks together can send: such a server is left out
until the next refit, and when no server is left, :class:`WeightsLost` asks for a refit now.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from nemo_paced.config import RefitBackend, WeightSwap
from nemo_paced.errors import RolloutError, WeightsLost
from nemo_paced.refit.file_transfer import send_files, written_version
from nemo_paced.refit.meeting import Meeting, meeting
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.serving.client import PROBE_TIMEOUT_S, RolloutClient

logger = logging.getLogger(__name__)


class ServerWeights:
    """The weights of the rollout servers: what each should hold, and how it gets them again.

    It is thread-safe: the trainer's thread sends weights while the sampler's brings servers back.

    Args:
        client: talks to all servers.
        swap: what a new version does to responses under way.
        folder: where the files of ``rollout.refit=file`` lie.
    """

    def __init__(
        self, client: RolloutClient, backend: RefitBackend, swap: WeightSwap, folder: Path
    ) -> None:
        self.client = client
        self.backend = backend
        self.folder = folder
        self.sync = WeightSync(client, swap)
        self._swap = swap
        self._sent: str | None = None  # version last sent over a transport other than files
        self._compared = len(client.endpoints) == 1
        self._lock = threading.RLock()
        self._held = False  # whether begin has the lock, which finish or abandon releases

    @property
    def version(self) -> str | None:
        """The version of weights that the servers should have; ``None``: those they began with."""
        return written_version(self.folder) if self.backend is RefitBackend.file else self._sent

    def send_written(self) -> None:
        """Make every server load the files that were last written, if there are any.

        Raises:
            RolloutError: a server refused or cannot be reached.
        """
        version = self.version
        if version is not None:
            with self._lock:
                send_files(self.sync, self._files(), version)
                self._compare()

    def begin(self, version: str) -> Meeting | None:
        """Pause the servers until :meth:`finish`; returns the group to form.

        ``None``: the last group still stands. Where the weights do not reach the servers, the
        caller calls :meth:`abandon`.

        Raises:
            RolloutError: a server cannot be reached.
        """
        self._lock.acquire()
        self._held = True
        try:
            before = self.sync.versions()
            stands = self._sent is not None and set(before) == {self._sent}
            self.sync.pause()
            self.sync.version = version
            if stands:
                return None
            for endpoint, served in zip(self.client.endpoints, before, strict=True):
                if self._sent is not None and served == self._sent:  # still in the old group
                    self._only(endpoint).control.leave_group()
            return meeting(self.backend, self.sync)
        except BaseException:
            self.abandon()
            raise

    def finish(self) -> None:
        """Let the servers go on, after all ranks have sent.

        Raises:
            RolloutError: a server cannot be reached, or two of them differ.
        """
        self._compare()
        self.sync.resume()
        self._sent = self.sync.version
        self.abandon()

    def abandon(self) -> None:
        """Let other threads look at the weights again; safe to call twice.

        Where sending failed the run ends: servers with half an update stay paused.
        """
        if self._held:
            self._held = False
            self._lock.release()

    def current(self, endpoint: str) -> bool:
        """Whether a server has the weights that it should; where files hold them it is sent them.

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
            if self.backend is RefitBackend.file:
                return self._send_again(endpoint, served, version)
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
            sync = WeightSync(self.client.only(endpoint, timeout_s=PROBE_TIMEOUT_S), self._swap)
            return sync.versions()[0]
        except RolloutError:
            return _UNREACHABLE

    def _send_again(self, endpoint: str, served: str | None, version: str) -> bool:
        logger.warning("%s has weights %s, not %s: sent again", endpoint, served, version)
        try:
            send_files(WeightSync(self._only(endpoint), self._swap), self._files(), version)
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

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


_UNREACHABLE = "no answer"  # in place of a version
