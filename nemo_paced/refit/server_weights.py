"""Which weights the rollout servers hold, and how they come to the trainer's; rank 0's part.

With ``rollout.refit=file`` what was last written can be sent again to a server that was started
anew. Over the other transports only all trainer ranks together can send: such a server is left out
until the next refit, and when no server is left, :class:`WeightsLost` asks for one now.
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
    """Thread-safe: the sampler's thread mends what the trainer's thread sends.

    Args:
        client: of all servers.
        folder: of the files that weights go through.
    """

    def __init__(
        self, client: RolloutClient, backend: RefitBackend, swap: WeightSwap, folder: Path
    ) -> None:
        self.client = client
        self.backend = backend
        self.folder = folder
        self.sync = WeightSync(client, swap)
        self._swap = swap
        self._sent: str | None = None  # not through files
        self._compared = len(client.endpoints) == 1
        self._lock = threading.RLock()
        self._held = False  # between begin and what ends it

    @property
    def version(self) -> str | None:
        """What the servers should have; ``None``: what they started with."""
        return written_version(self.folder) if self.backend is RefitBackend.file else self._sent

    def send_written(self) -> None:
        """Make every server load the files; nothing where none were ever written.

        Raises:
            RolloutError: a server refused or cannot be reached.
        """
        version = self.version
        if version is not None:
            with self._lock:
                send_files(self.sync, self._files(), version)
                self._compare()

    def begin(self, version: str) -> Meeting | None:
        """Hold the servers until :meth:`finish`; the group to form, ``None`` if the last stands.

        Followed by :meth:`abandon` where the weights do not get there.

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
        """All ranks have sent: the servers go on.

        Raises:
            RolloutError: a server cannot be reached, or two of them differ.
        """
        self._compare()
        self.sync.resume()
        self._sent = self.sync.version
        self.abandon()

    def abandon(self) -> None:
        """Let other threads look at the weights again; safe to call twice.

        Where sending failed the run ends: servers with half an update stay held.
        """
        if self._held:
            self._held = False
            self._lock.release()

    def current(self, endpoint: str) -> bool:
        """Whether a server has the weights that it should; it is sent them where that can be.

        Raises:
            WeightsLost: it has not, nor has any other.
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
        """Once: what reached one server intact and another one not would show here."""
        if not self._compared:
            self.sync.check_same_weights()
            self._compared = True

    def _only(self, endpoint: str) -> RolloutClient:
        return self.client.only(endpoint, timeout_s=self.client.request_timeout_s)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


_UNREACHABLE = "no answer"
