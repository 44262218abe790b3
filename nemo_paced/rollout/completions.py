"""The bodies of ``/v1/completions``: token ids out, token ids and log-probabilities in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SERVED_NAME = "nemo-paced"  # what our servers call their model, student or teacher


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


class MalformedAnswer(ValueError):
    """An answer that does not hold what was asked for."""


class Aborted(Exception):
    """The server gave a request up: it is stopping, or being paused."""


def request_body(request: SampleRequest) -> dict[str, Any]:
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


def read_completions(answer: Any, request: SampleRequest) -> list[Completion]:
    """Exactly n samples, each of tokens with a log-probability.

    Raises:
        MalformedAnswer: anything else.
        Aborted: a sample that the server did not finish.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [
            Completion(
                tuple(int(token) for token in choice["token_ids"]),
                tuple(float(value) for value in choice["logprobs"]["token_logprobs"]),
                choice["finish_reason"],
            )
            for choice in choices
        ]
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
    if completion.finish_reason not in ("stop", "length"):
        raise MalformedAnswer(f"a sample ended by {completion.finish_reason!r}")
    cut = completion.finish_reason == "length"
    if tokens > request.max_tokens or (cut and tokens < request.max_tokens):
        raise MalformedAnswer(
            f"a sample of {tokens} tokens ended by {completion.finish_reason!r}; the limit is "
            f"{request.max_tokens}"
        )
