"""HTTP client of OpenAI-compatible vLLM servers: token ids out, token ids and log-probabilities in.

Asynchronous inside, a plain call outside. Requests in flight are bounded; each goes to the server
with the fewest; a transport error, a 5xx or a short answer is tried again a few times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from nemo_paced.errors import RolloutError
from nemo_paced.rollout.sidecar import SERVED_NAME

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """``n`` samples of one prompt; ``key`` comes back with the answer."""

    key: str
    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample.

    Attributes:
        token_ids: with the stop token that ended it.
        logprobs: of each token under the model at temperature 1, nats.
        finish_reason: ``stop``, or ``length`` when cut at ``max_tokens``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


class RolloutClient:
    """Samples from one or several servers of the same model."""

    def __init__(
        self,
        endpoints: Sequence[str],
        api_key: str,
        *,
        max_in_flight: int = 32,
        request_timeout_s: float = 1800.0,
        max_retries: int = 4,
    ) -> None:
        self.endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self.max_in_flight = max_in_flight
        self.request_timeout_s = request_timeout_s
        self.max_retries = max_retries
        self._headers = {"Authorization": f"Bearer {api_key}"}

    def sample(
        self,
        requests: Sequence[SampleRequest],
        on_result: Callable[[SampleRequest, list[Completion]], None],
    ) -> None:
        """Sample all requests; ``on_result`` is called for each as soon as it is finished.

        Raises:
            RolloutError: a request that failed ``max_retries`` times, or was refused. What finished
                before has been handed to ``on_result``.
        """
        asyncio.run(self._sample_all(requests, on_result))

    def call(self, method: str, path: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call a control route on every server; returns their JSON answers.

        Raises:
            RolloutError: a server that cannot be reached or does not answer 200.
        """
        answers = []
        with httpx.Client(
            headers=self._headers, trust_env=False, timeout=self.request_timeout_s
        ) as client:
            for endpoint in self.endpoints:
                try:
                    response = client.request(method, endpoint + path, **arguments)
                except httpx.TransportError as error:
                    raise RolloutError(f"{endpoint}{path}: {error!r}") from error
                if response.status_code != httpx.codes.OK:
                    raise RolloutError(
                        f"{endpoint}{path} answered {response.status_code}: {response.text[:300]}"
                    )
                answers.append(response.json() if response.content else {})
        return answers

    async def _sample_all(
        self,
        requests: Sequence[SampleRequest],
        on_result: Callable[[SampleRequest, list[Completion]], None],
    ) -> None:
        load = dict.fromkeys(self.endpoints, 0)
        gate = asyncio.Semaphore(self.max_in_flight)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            headers=self._headers, trust_env=False, timeout=self.request_timeout_s, limits=limits
        ) as client:

            async def one(request: SampleRequest) -> None:
                async with gate:
                    endpoint = min(load, key=load.__getitem__)
                    load[endpoint] += 1
                    try:
                        completions = await self._with_retries(client, endpoint, request)
                    finally:
                        load[endpoint] -= 1
                on_result(request, completions)

            tasks = [asyncio.create_task(one(request)) for request in requests]
            try:
                await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    async def _with_retries(
        self, client: httpx.AsyncClient, endpoint: str, request: SampleRequest
    ) -> list[Completion]:
        for attempt in range(self.max_retries + 1):
            try:
                return await self._ask(client, endpoint, request)
            except (httpx.TransportError, _Again) as error:
                if attempt == self.max_retries:
                    raise RolloutError(
                        f"sampling {request.n} responses to problem {request.key!r} failed "
                        f"{attempt + 1} times at {endpoint}: {error!r}"
                    ) from error
                logger.debug("%s: %r, trying again", request.key, error)
                await asyncio.sleep(FIRST_RETRY_S * 2**attempt)
        raise AssertionError("the last attempt returned or raised")

    async def _ask(
        self, client: httpx.AsyncClient, endpoint: str, request: SampleRequest
    ) -> list[Completion]:
        response = await client.post(f"{endpoint}/v1/completions", json=_body(request))
        if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise _Again(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code != httpx.codes.OK:
            raise RolloutError(
                f"{endpoint} refused to sample problem {request.key!r}: "
                f"{response.status_code} {response.text[:300]}"
            )
        return _completions(response, request)


class _Again(Exception):
    """An answer that is worth another try."""


def _body(request: SampleRequest) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "prompt": list(request.prompt_ids),
        "n": request.n,
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "stop_token_ids": list(request.stop_token_ids),
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "detokenize": False,
    }


def _completions(response: httpx.Response, request: SampleRequest) -> list[Completion]:
    """Check and unpack an answer: exactly n samples, a log-probability a token."""
    try:
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        completions = [
            Completion(
                tuple(choice["token_ids"]),
                tuple(choice["logprobs"]["token_logprobs"]),
                choice["finish_reason"],
            )
            for choice in choices
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise _Again(f"malformed answer ({error!r}): {response.text[:200]}") from error
    if len(completions) != request.n:
        raise _Again(f"{len(completions)} samples came, {request.n} were asked for")
    for completion in completions:
        if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
            raise _Again(f"a sample of {len(completion.token_ids)} tokens came with "
                         f"{len(completion.logprobs)} log-probabilities")  # fmt: skip
        if completion.finish_reason not in ("stop", "length"):
            raise _Again(f"a sample ended by {completion.finish_reason!r}")
    return completions
