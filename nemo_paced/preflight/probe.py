"""Probe of running vLLM servers, before anything waits for their answers.

All servers are asked at once, each by two requests: whether it is well, and what it serves. vLLM's
own ``--api-key`` guards the second route too.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from nemo_paced.errors import RolloutError
from nemo_paced.serving.client import RolloutClient, RouteRefused
from nemo_paced.serving.engine import SERVED_NAME, ModelCard

TIMEOUT_S = 5.0  # of connecting and of each answer: a server that is well answers at once
DENIED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server that would refuse this run's requests; holds no key.

    Attributes:
        endpoint: the server's URL.
        what: what it did, or did not.
        remedy: what to do.
    """

    endpoint: str
    what: str
    remedy: str


def probe_servers(
    endpoints: Sequence[str],
    api_key: str,
    *,
    max_model_len: int,
    timeout_s: float = TIMEOUT_S,
) -> list[Refusal]:
    """A refusal for each server that would not serve this run, in their order.

    Args:
        endpoints: the servers' URLs.
        max_model_len: longest prompt plus response, tokens.
        timeout_s: of connecting and of each answer, seconds.
    """
    with ThreadPoolExecutor(max(1, len(endpoints))) as pool:
        clients = [RolloutClient([e], api_key, request_timeout_s=timeout_s) for e in endpoints]
        found = pool.map(lambda client: _probe(client, max_model_len), clients)
        return [refusal for refusal in found if refusal is not None]


def _probe(client: RolloutClient, max_model_len: int) -> Refusal | None:
    (endpoint,) = client.endpoints
    try:
        client.control.check_health()
        (models,) = client.control.models()
        return _check_model(endpoint, models, max_model_len)
    except RouteRefused as refused:
        if refused.status in DENIED:
            return Refusal(
                endpoint,
                "refuses the key",
                "export the one that it was started with: servers/student/api_key (or "
                "servers/teacher) in the run directory of its rollout-server",
            )
        return Refusal(
            endpoint, f"answers {refused.status} to {refused.path}", "look into the server's log"
        )
    except (RolloutError, httpx.InvalidURL) as error:
        cause = error.__cause__ or error
        return Refusal(
            endpoint,
            f"does not answer ({type(cause).__name__}: {cause})",
            "start it with `nemo-paced rollout-server`, on an address or interface that this node "
            "reaches (rollout.host), and see whether the port is open",
        )
    except (ValueError, KeyError, TypeError):  # no JSON, or none of vLLM's
        return Refusal(
            endpoint, "is no vLLM server", "give the URL that `nemo-paced rollout-server` printed"
        )


def _check_model(endpoint: str, models: list[ModelCard], max_model_len: int) -> Refusal | None:
    """Check that a server has a model of the name asked for, with long enough sequences."""
    lengths = {model.name: model.max_model_len for model in models}
    if SERVED_NAME not in lengths:
        return Refusal(
            endpoint,
            f"serves {', '.join(lengths) or 'nothing'}, not {SERVED_NAME}",
            f"start it with `nemo-paced rollout-server`, or with --served-model-name {SERVED_NAME}",
        )
    longest = lengths[SERVED_NAME]
    if longest is not None and longest < max_model_len:
        return Refusal(
            endpoint,
            f"takes {longest} tokens of prompt and response, and up to {max_model_len} will be "
            "asked for",
            "start it with this configuration's data.max_* and evaluation.max_response_length",
        )
    return None
