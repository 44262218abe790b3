"""Whether servers that somebody else runs can be asked, before anything waits for them.

Two requests of each, all servers at once: ``/health``, and ``/v1/models``, which also vLLM's own
``--api-key`` guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from nemo_paced.serving.completions import SERVED_NAME

TIMEOUT_S = 5.0  # of connecting and of each answer: a server that is well answers at once
DENIED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Attributes: endpoint; what it did; remedy. Holds no key."""

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
    """What each server would refuse, in their order; empty: all answer.

    Args:
        max_model_len: longest prompt plus response, tokens.
    """
    headers = {"Authorization": f"Bearer {api_key}"}
    with (
        httpx.Client(headers=headers, trust_env=False, timeout=timeout_s) as client,
        ThreadPoolExecutor(max(1, len(endpoints))) as pool,
    ):
        found = pool.map(lambda e: _probe(client, e.rstrip("/"), max_model_len), endpoints)
        return [refusal for refusal in found if refusal is not None]


def _probe(client: httpx.Client, endpoint: str, max_model_len: int) -> Refusal | None:
    try:
        for path in ("/health", "/v1/models"):
            answer = client.get(endpoint + path)
            if answer.status_code in DENIED:
                return Refusal(
                    endpoint,
                    "refuses the key",
                    "export the one that it was started with: servers/student/api_key (or "
                    "servers/teacher) in the run directory of its rollout-server",
                )
            if answer.status_code != httpx.codes.OK:
                return Refusal(
                    endpoint,
                    f"answers {answer.status_code} to {path}",
                    "look into the server's log",
                )
        return _check_model(endpoint, answer.json()["data"], max_model_len)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        return Refusal(
            endpoint,
            f"does not answer ({type(error).__name__}: {error})",
            "start it with `nemo-paced rollout-server`, on an address or interface that this node "
            "reaches (rollout.host), and see whether the port is open",
        )
    except (ValueError, KeyError, TypeError):  # no JSON, or another one
        return Refusal(
            endpoint, "is no vLLM server", "give the URL that `nemo-paced rollout-server` printed"
        )


def _check_model(endpoint: str, models: list[dict[str, Any]], max_model_len: int) -> Refusal | None:
    """The model that we ask for by name, and its longest sequence."""
    lengths = {model["id"]: model.get("max_model_len") for model in models}
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
