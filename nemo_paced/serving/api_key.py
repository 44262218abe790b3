"""ASGI middleware for vLLM's server: every route requires the API key.

vLLM's own ``--api-key`` guards paths under a few prefixes only; whoever reaches the port could
pause the server or replace its weights. The server loads this class by ``--middleware``; the key
comes through the environment, never through the command line that other users can see.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

API_KEY_VARIABLE = "NEMO_PACED_API_KEY"


class ApiKeyMiddleware:
    """ASGI app that passes on only requests with the header ``Authorization: Bearer KEY``.

    Others are answered 401 (a websocket is closed), requests for the server's health included.

    Raises:
        RuntimeError: the environment has no key.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        key = os.environ.get(API_KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{API_KEY_VARIABLE} is not set: the server would be open to anyone")
        self.expected = f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not self._authorized(scope):
            await _refuse(scope, send)
            return
        await self.app(scope, receive, send)

    def _authorized(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self.expected)


async def _refuse(scope: dict[str, Any], send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = b'{"error": "missing or wrong API key"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
