"""Load balancing over rollout servers: the next request goes to the least loaded that answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from nemo_paced.errors import RolloutError

logger = logging.getLogger(__name__)

FIRST_PROBE_S, LONGEST_PROBE_S = 0.5, 10.0  # pause between two attempts to bring a server back


class Balancer:
    """Chooses the least loaded of the rollout servers that answer; lives in one event loop.

    A server that breaks a connection or does not answer gets no requests until ``revive`` has
    brought it back.

    Args:
        revive: called with an endpoint until it returns ``True``: the server is there again, with
            the weights it should have. It runs in a thread and may start a process; a
            ``RolloutError`` that it raises ends the sampling.
        patience_s: seconds to wait when no server answers.
    """

    def __init__(
        self, endpoints: Sequence[str], *, revive: Callable[[str], bool], patience_s: float
    ) -> None:
        self._revive = revive
        self._patience_s = patience_s
        self._load = dict.fromkeys(endpoints, 0)  # requests in flight
        self._taken = dict.fromkeys(endpoints, 0)  # requests so far: decides between equal loads
        self._last_error: dict[str, str] = {}  # by endpoint, of the servers that are down
        self._returns: dict[str, asyncio.Task[None]] = {}
        self._failure: RolloutError | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Balancer:
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._returns.values():
            task.cancel()
        await asyncio.gather(*self._returns.values(), return_exceptions=True)

    async def acquire(self, avoid: str | None = None) -> str:
        """The endpoint for one request, which counts as in flight until :meth:`release`.

        ``avoid`` is taken only when no other server is up.

        Raises:
            RolloutError: no server answers, or one could not be brought back.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            up = [endpoint for endpoint in self._load if endpoint not in self._last_error]
            others = [endpoint for endpoint in up if endpoint != avoid]
            if up:
                chosen = min(others or up, key=lambda e: (self._load[e], self._taken[e]))
                self._load[chosen] += 1
                self._taken[chosen] += 1
                return chosen
            await self._wait_for_change()

    def release(self, endpoint: str) -> None:
        self._load[endpoint] -= 1

    def down(self, endpoint: str, error: str) -> None:
        """Send nothing to this server until ``revive`` has brought it back."""
        if endpoint in self._last_error:
            return
        up = len(self._load) - len(self._last_error) - 1
        logger.warning("%s does not answer (%s); %d other servers go on", endpoint, error, up)
        self._last_error[endpoint] = error
        self._returns[endpoint] = asyncio.create_task(self._bring_back(endpoint))

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), self._patience_s)
        except TimeoutError:
            errors = "; ".join(f"{e}: {error}" for e, error in self._last_error.items())
            raise RolloutError(
                f"no rollout server has answered for {self._patience_s:g} s ({errors})"
            ) from None

    async def _bring_back(self, endpoint: str) -> None:
        pause = FIRST_PROBE_S
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PROBE_S)
            try:
                back = await asyncio.to_thread(self._revive, endpoint)
            except RolloutError as error:
                self._failure = error
                back = False
            if back:
                del self._last_error[endpoint]
                logger.warning("%s answers again", endpoint)
            if back or self._failure:
                self._changed.set()
                return
