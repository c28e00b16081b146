"""What happens at the very rim of HTTP, before any request is understood? Ids on everything, and no fault escapes.

Pure ASGI, no parsed body. The endpoints of exchanges write their own headers; everything else gets them here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import Refusal
from gateway.http import Receive, Scope, new_id, request_id
from gateway.sinks import Send, send_refusal

App = Callable[[Scope, Receive, Send], Awaitable[None]]
_log = logging.getLogger("tierway.edge")
_INTERNAL = Refusal("internal_error", "The gateway failed. It is not your fault.")


class Edge:
    """The outermost layer."""

    def __init__(self, app: App, *, config: str) -> None:
        self._app = app
        self._config = config.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = False

        async def send_with_ids(message: MutableMapping[str, Any]) -> None:
            nonlocal begun, ended
            if not begun and message["type"] == "http.response.start":
                begun = True
                headers = list(message.get("headers", ()))
                if all(name != b"x-request-id" for name, _ in headers):
                    headers += [
                        (b"x-request-id", request_id(scope) or new_id("req-").encode()),
                        (b"x-tierway-config", self._config),
                    ]
                    message = {**message, "headers": headers}
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                ended = True
            await send(message)

        try:
            await self._app(scope, receive, send_with_ids)
        except Exception:
            # The outermost boundary: whatever went wrong is ours, and the client learns no more than that.
            _log.exception("internal error on %s", scope["path"])
            if not begun:
                await send_refusal(send_with_ids, _INTERNAL, [])
            elif not ended:
                raise  # which breaks the connection: what was cut must not look complete


class Shortcut:
    """Takes the busiest requests straight to their application, by method and path.

    Starlette's layers of routing and error handling cost as much as reading and planning a request does. Whatever is
    not on the list, and so every error about paths and methods, goes through them.
    """

    def __init__(self, app: App, busiest: Mapping[tuple[str, str], App]) -> None:
        self._app = app
        self._busiest = busiest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            app = self._busiest.get((scope["method"], scope["path"]), app)
        await app(scope, receive, send)


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


async def on_refusal(_request: Request, error: Exception) -> Response:
    """Render what an endpoint refuses."""
    if not isinstance(error, Refusal):
        raise error
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers=headers, media_type="application/json")


async def on_fault(request: Request, _error: Exception) -> Response:
    """Render what nobody expected, in place of Starlette's page; `Edge` sees the fault itself too and logs it."""
    return await on_refusal(request, _INTERNAL)
