"""What happens at the very rim of HTTP, before any request is understood? Ids on everything, and no fault escapes.

Pure ASGI, no parsed body. The endpoints of exchanges write their own headers; everything else gets them here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import Refusal
from gateway.http import Receive, Scope, request_id
from gateway.sinks import Send, send_refusal

App = Callable[[Scope, Receive, Send], Awaitable[None]]
_log = logging.getLogger("tierway.edge")


class Edge:
    """The outermost layer."""

    def __init__(self, app: App, *, config: str) -> None:
        self._app = app
        self._config = config.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_with_ids(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if not begun and message["type"] == "http.response.start":
                begun = True
                headers = list(message.get("headers", ()))
                if all(name != b"x-request-id" for name, _ in headers):
                    headers += [(b"x-request-id", request_id(scope)), (b"x-tierway-config", self._config)]
                    message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_ids)
        except Refusal as refusal:
            await send_refusal(send_with_ids, refusal, [])
        except Exception:
            # The outermost boundary: whatever went wrong is ours, and the client learns no more than that.
            _log.exception("internal error on %s", scope["path"])
            if begun:
                raise
            await send_refusal(
                send_with_ids, Refusal("internal_error", "The gateway failed. It is not your fault."), []
            )


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Render what Starlette refuses, unknown paths and methods, as OpenAI's errors."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    given = getattr(error, "headers", None) or {}
    if status == 405:
        refusal = Refusal("method_not_allowed", f"{request.method} is not allowed here.")
    else:
        path = request.url.path
        shown = path if len(path) <= 128 else path[:128] + "…"
        refusal = Refusal("unknown_url", f"There is nothing at {shown}.")
    return Response(refusal.body(), refusal.status, headers=given, media_type="application/json")
