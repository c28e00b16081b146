"""What happens at the very rim of HTTP, before any request is understood? Ids on everything, and no fault escapes.

Pure ASGI, no parsed body. The endpoints of exchanges write their own headers; everything else gets them here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import Refusal
from gateway.http import Receive, Scope, new_id, request_id
from gateway.log import ExchangeLog
from gateway.metrics import Metrics
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
                named = {name for name, _ in headers}
                if b"x-tierway-config" not in named:
                    headers.append((b"x-tierway-config", self._config))
                    if b"x-request-id" not in named:
                        headers.append((b"x-request-id", request_id(scope) or new_id("req-").encode()))
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


class ErrorAnswers:
    """Renders what Starlette and the small endpoints refuse as OpenAI's errors, and tells the operator."""

    def __init__(self, metrics: Metrics, log: ExchangeLog) -> None:
        self._metrics = metrics
        self._log = log

    async def http_exception(self, request: Request, error: Exception) -> Response:
        """Answer for a path or a method that there is not."""
        if isinstance(error, HTTPException) and error.status_code == 405:
            refusal = Refusal("method_not_allowed", f"{request.method} is not allowed here.")
            return self._answer(request, refusal, error.headers or {})
        path = request.url.path
        shown = path if len(path) <= 128 else path[:128] + "…"
        return self._answer(request, Refusal("unknown_url", f"There is nothing at {shown}."))

    async def refusal(self, request: Request, error: Exception) -> Response:
        """Answer for what an endpoint refuses."""
        if not isinstance(error, Refusal):
            raise error
        return self._answer(request, error, {name.decode(): value.decode() for name, value in error.headers()})

    async def fault(self, request: Request, _error: Exception) -> Response:
        """Answer for what nobody expected, in place of Starlette's page; `Edge` sees the fault too and logs it."""
        return self._answer(request, _INTERNAL)

    def _answer(
        self, request: Request, refusal: Refusal, headers: Mapping[str, str] = MappingProxyType({})
    ) -> Response:
        own_id = (request_id(request.scope) or new_id("req-").encode()).decode()
        self._metrics.refused(refusal.code)
        self._log.refused(
            request_id=own_id, key=None, path=request.scope["path"], code=refusal.code, status=refusal.status
        )
        return Response(
            refusal.body(), refusal.status, headers={**headers, "x-request-id": own_id}, media_type="application/json"
        )
