"""HTTP client of rollout servers: samples, and the engine's control routes.

The client is asynchronous inside and a plain call outside. Requests in flight are bounded; each
goes to the server with the fewest. A transport error, no answer in time or a 5xx is tried again,
at another server where there is one; an answer that does not hold what was asked for is refused.

Samples come through aiohttp, which takes a sixth of httpx's processor time for each request
(benchmarks/README.md) and so leaves it to a server on the same cores; the few control calls are
plain httpx.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import ssl
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import httpx

from nemo_paced.errors import RolloutError
from nemo_paced.serving.balancer import Balancer
from nemo_paced.serving.completions import (
    Aborted,
    Completion,
    MalformedAnswer,
    Route,
    SampleRequest,
    read_completions,
)
from nemo_paced.serving.engine import Control, Engine
from nemo_paced.serving.vllm_engine import VLLM

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 30.0
CONNECT_TIMEOUT_S = 30.0
HANDING_OVER = 32  # threads that run on_result; they mostly wait for graders and for the disk
PROBE_TIMEOUT_S = 10.0  # a server that is well answers at once
# Less than the 5 s after which vLLM's server closes an idle connection: a request sent on one that
# is being closed would look like a server that died.
KEEP_ALIVE_S = 3.0
OnResult = Callable[[SampleRequest, list[Completion]], None]


class RolloutClient:
    """Client that samples from one or several rollout servers of the same model.

    Args:
        max_in_flight: requests in flight per server; their sum over all servers is bounded.
        request_timeout_s: seconds from sending a request to the end of its answer.
        max_retries: attempts at one request after its first.
        revive: brings a server back that does not answer (see :class:`Balancer`); without it the
            client waits until the server passes its health check again.
        patience_s: seconds for which no server at all may answer before sampling fails.
        engine: what the servers run: their routes and answers.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        api_key: str,
        *,
        max_in_flight: int = 32,
        request_timeout_s: float = 1800.0,
        max_retries: int = 4,
        revive: Callable[[str], bool] | None = None,
        patience_s: float = 60.0,
        engine: Engine = VLLM,
    ) -> None:
        self.endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self.max_in_flight = max_in_flight
        self.request_timeout_s = request_timeout_s
        self.max_retries = max_retries
        self.revive = revive or self.healthy
        self.patience_s = patience_s
        self.engine = engine
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._routes: dict[str, Route] = {}  # by endpoint, where it lacks the engine's first route

    def only(self, endpoint: str, *, timeout_s: float) -> RolloutClient:
        """A client of one of the servers, with the same key and a timeout of its own."""
        client = RolloutClient([endpoint], "", request_timeout_s=timeout_s, engine=self.engine)
        client._headers = self._headers
        return client

    @property
    def control(self) -> Control:
        """The engine's control routes, on every server at once."""
        return self.engine.control(self.call)

    def sample(self, requests: Iterable[SampleRequest], on_result: OnResult) -> None:
        """Sample all requests, in this order; ``on_result`` is called for each when it is finished.

        Args:
            requests: each is taken when it can be sent: there may be more than memory holds.
            on_result: runs in a thread, several at a time: grading and writing must not hold up
                the requests.

        Raises:
            RolloutError: a request that failed ``1 + max_retries`` times, was refused, or was
                answered wrongly. What finished before has been handed to ``on_result``.
        """
        # A pool of its own: the event loop's default one runs ``revive``, which must not queue
        # behind results whose storing is slow.
        with ThreadPoolExecutor(HANDING_OVER) as pool:
            asyncio.run(self._sample_all(requests, on_result, pool))

    def call(self, method: str, path: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call a control route on every server at once; returns their JSON answers in order.

        Args:
            arguments: of ``httpx.Client.request``, such as ``json`` or ``params``.

        Raises:
            RolloutError: a server cannot be reached, or does not answer 200 (RouteRefused).
        """
        with (
            httpx.Client(
                headers=self._headers,
                trust_env=False,
                timeout=self.request_timeout_s,
                verify=_tls(),
            ) as client,
            ThreadPoolExecutor(len(self.endpoints)) as pool,
        ):

            def one(endpoint: str) -> dict[str, Any]:
                try:
                    response = client.request(method, endpoint + path, **arguments)
                except httpx.TransportError as error:
                    raise RolloutError(f"{endpoint}{path}: {error!r}") from error
                if response.status_code != httpx.codes.OK:
                    raise RouteRefused(endpoint, path, response.status_code, response.text[:300])
                return response.json() if response.content else {}

            return list(pool.map(one, self.endpoints))

    def healthy(self, endpoint: str) -> bool:
        """Whether a server passes its health check within ``PROBE_TIMEOUT_S`` seconds."""
        try:
            self.only(endpoint, timeout_s=PROBE_TIMEOUT_S).control.check_health()
        except RolloutError:
            return False
        return True

    async def _sample_all(
        self, requests: Iterable[SampleRequest], on_result: OnResult, pool: ThreadPoolExecutor
    ) -> None:
        gate = asyncio.Semaphore(self.max_in_flight * len(self.endpoints))
        timeout = aiohttp.ClientTimeout(self.request_timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        # no limit on connections: the gate bounds the requests
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        loop = asyncio.get_running_loop()
        async with (
            Balancer(self.endpoints, revive=self.revive, patience_s=self.patience_s) as balancer,
            aiohttp.ClientSession(
                headers=self._headers, trust_env=False, timeout=timeout, connector=connector
            ) as session,
        ):

            async def one(request: SampleRequest) -> None:
                try:
                    completions = await self._with_retries(session, balancer, request)
                finally:
                    gate.release()
                # shielded: an answer that has come is kept though another request fails
                await asyncio.shield(loop.run_in_executor(pool, on_result, request, completions))

            try:
                async with asyncio.TaskGroup() as group:
                    for request in requests:
                        await gate.acquire()
                        group.create_task(one(request))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors.exceptions[0].__cause__

    async def _with_retries(
        self, session: aiohttp.ClientSession, balancer: Balancer, request: SampleRequest
    ) -> list[Completion]:
        endpoint: str | None = None
        for attempt in range(self.max_retries + 1):
            endpoint = await balancer.acquire(avoid=endpoint)
            try:
                return await self._ask(session, endpoint, request)
            except aiohttp.ClientError as error:
                failed = repr(error)
                balancer.down(endpoint, failed)
            except TimeoutError:
                failed = f"no answer within {self.request_timeout_s:g} s"
                balancer.down(endpoint, failed)
            except _TryAgain as error:
                failed = str(error)
            finally:
                balancer.release(endpoint)
            if attempt < self.max_retries:
                logger.debug("%s at %s: %s, trying again", request.key, endpoint, failed)
                await asyncio.sleep(min(FIRST_RETRY_S * 2**attempt, LONGEST_RETRY_S))
        raise RolloutError(
            f"sampling {request.n} responses to problem {request.key!r} failed "
            f"{self.max_retries + 1} times, last at {endpoint}: {failed}"
        )

    async def _ask(
        self, session: aiohttp.ClientSession, endpoint: str, request: SampleRequest
    ) -> list[Completion]:
        routes = self.engine.routes
        route = self._routes.get(endpoint, routes[0])
        url, body = endpoint + route.path, route.body(request)
        async with session.post(url, json=body, allow_redirects=False) as response:
            status, content = response.status, await response.read()
        if route is not routes[-1] and status in self.engine.no_such_route:
            self._fall_back(endpoint, route, status)
            return await self._ask(session, endpoint, request)
        if status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise _TryAgain(f"status {status}: {_excerpt(content, 200)}")
        if status != httpx.codes.OK:
            too_many = self.engine.too_many_samples in content
            remedy = ": set rollout.max_num_seqs to this server's" if too_many else ""
            raise RolloutError(
                f"{endpoint} refused to sample problem {request.key!r}: "
                f"{status} {_excerpt(content, 300)}{remedy}"
            )
        try:
            return read_completions(json.loads(content), request, route)
        except Aborted as error:
            raise _TryAgain(str(error)) from error
        except ValueError as error:  # no JSON, or not what was asked for
            why = str(error) if isinstance(error, MalformedAnswer) else f"no JSON ({error})"
            raise RolloutError(
                f"{endpoint} answered wrongly for problem {request.key!r}: {why}: "
                f"{_excerpt(content, 200)}"
            ) from error

    def _fall_back(self, endpoint: str, lacking: Route, status: int) -> None:
        routes = self.engine.routes
        following = routes[routes.index(lacking) + 1]
        if self._routes.get(endpoint) is not following:  # several requests may find out at once
            self._routes[endpoint] = following
            logger.info(
                "%s answers %d at %s: %s is used, which does not tell the version of the weights",
                *(endpoint, status, lacking.path, following.path),
            )


def _excerpt(content: bytes, characters: int) -> str:
    return content[: 4 * characters].decode(errors="replace")[:characters]


class RouteRefused(RolloutError):
    """Error of a control route that did not answer 200; ``path`` and ``status`` say which."""

    def __init__(self, endpoint: str, path: str, status: int, text: str) -> None:
        super().__init__(f"{endpoint}{path} answered {status}: {text}")
        self.path = path
        self.status = status


class _TryAgain(Exception):
    """A failure of the server that another attempt may not meet."""


@functools.cache
def _tls() -> ssl.SSLContext:
    """httpx's default TLS context, made once: each call of a refit would read all certificates.

    That takes 15 ms.
    """
    return httpx.create_ssl_context()
