"""Sampling requests to a rollout server and its answers: token ids, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NO_LOGPROB = -9999.0  # vLLM's number for a log-probability that is not finite, or that it lacks


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request for ``n`` samples of one prompt.

    Attributes:
        key: id of the problem; like ``first_sample`` not sent, but given back with the answer.
        seed: of the whole request; the server derives those of its samples.
        max_tokens: longest response, tokens.
        stop_token_ids: the first of these ends a sample, and is a part of it.
        first_sample: number of the first of the ``n`` among the problem's samples.
    """

    key: str
    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    first_sample: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: of the response, with the stop token that ended it.
        logprobs: of each token under the model at temperature 1, nats.
        finish_reason: ``stop``, or ``length`` when cut at ``max_tokens``.
        weight_versions: (version, tokens) of each run of tokens that one version of the weights
            sampled, in order; their tokens add up to all of them. Empty: the server did not say.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_versions: tuple[tuple[str, int], ...] = ()


class MalformedAnswer(ValueError):
    """An answer that does not hold what was asked for."""


class Aborted(Exception):
    """The server gave a request up: it is stopping, or being paused."""


@dataclass(frozen=True, slots=True)
class Route:
    """A sampling route of a server.

    Attributes:
        path: of the URL.
        body: makes the JSON body of a request.
        read_choice: reads one sample out of the answer's ``choices``.
    """

    path: str
    body: Callable[[SampleRequest], dict[str, Any]]
    read_choice: Callable[[dict[str, Any]], Completion]


def read_completions(answer: Any, request: SampleRequest, route: Route) -> list[Completion]:
    """Read exactly ``request.n`` samples out of a JSON answer, in order, and check each.

    Raises:
        MalformedAnswer: anything else.
        Aborted: a sample that the server did not finish.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [route.read_choice(choice) for choice in choices]
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedAnswer(f"no list of samples ({error!r})") from error
    if any(completion.finish_reason == "abort" for completion in completions):
        raise Aborted("the server aborted it")
    if len(completions) != request.n:
        raise MalformedAnswer(f"{len(completions)} samples came, {request.n} were asked for")
    for completion in completions:
        _check(completion, request)
    return completions


def _check(completion: Completion, request: SampleRequest) -> None:
    tokens, logprobs = len(completion.token_ids), len(completion.logprobs)
    if not tokens or tokens != logprobs:
        raise MalformedAnswer(f"a sample of {tokens} tokens has {logprobs} log-probabilities")
    if not all(logprob > NO_LOGPROB for logprob in completion.logprobs):
        raise MalformedAnswer("a sampled token has no finite log-probability")
    versioned = sum(count for _, count in completion.weight_versions)
    if completion.weight_versions and versioned != tokens:
        raise MalformedAnswer(f"a sample of {tokens} tokens has weight versions of {versioned}")
    if completion.finish_reason not in ("stop", "length"):
        raise MalformedAnswer(f"a sample ended by {completion.finish_reason!r}")
    cut = completion.finish_reason == "length"
    if tokens > request.max_tokens or (cut and tokens < request.max_tokens):
        raise MalformedAnswer(
            f"a sample of {tokens} tokens ended by {completion.finish_reason!r}; the limit is "
            f"{request.max_tokens}"
        )
