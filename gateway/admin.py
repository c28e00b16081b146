"""What can the operator change while tierway runs? The admin API: keys of the store, on a port of its own.

* Nothing is answered before the admin key was seen, not even that a path does not exist.
* A key is in the answer to its creation or rotation and nowhere else; neither keys nor digests are logged, and as
  anything can be pasted into a path, paths are not either.
* What a key may be is what the configuration lets one be, with bounds on how much.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest
from types import MappingProxyType

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway.config.secrets import Secret
from gateway.edge import App, Edge
from gateway.errors import Refusal
from gateway.http import Receive, Scope, given_key, read_raw_body
from gateway.key_admin import KeyAdmin
from gateway.key_bodies import KeyChange, NewKey, Rotation, read
from gateway.key_store import KeysDown
from gateway.sinks import Send, send_refusal

_log = logging.getLogger("tierway.admin")
_JSON = "application/json"
_LARGEST_BODY = 64 * 1024


def admin_app(keys: KeyAdmin, *, secret: Secret, config: str, more_routes: Sequence[BaseRoute] = ()) -> ASGIApp:
    """Return the application of the admin API. `config` is the configuration's digest, `secret` the admin key.

    `more_routes` stand behind the same key; what they refuse they raise as `Refusal`. It has no lifespan.
    """
    app = Starlette(
        routes=[*_KeyRoutes(keys).routes(), *more_routes],
        exception_handlers={HTTPException: _http_exception, Refusal: _refusal, KeysDown: _down, Exception: _fault},
    )
    app.router.redirect_slashes = False
    return Edge(_Guard(app, secret), config=config)


class _Guard:
    """Lets nobody in without the admin key."""

    def __init__(self, app: App, secret: Secret) -> None:
        self._app = app
        self._digest = sha256(secret.reveal().encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            right = scope["type"] != "http" or self._opens(given_key(scope))
        except Refusal as refusal:
            await send_refusal(send, refusal, [])
            return
        if right:
            await self._app(scope, receive, send)
        else:
            _log.warning("somebody asked the admin API with a key that is not the admin key")
            await send_refusal(send, Refusal("invalid_api_key", "This is not the admin key."), [])

    def _opens(self, key: bytes) -> bool:
        return compare_digest(sha256(key).digest(), self._digest)


class _KeyRoutes:
    """HTTP around `KeyAdmin`."""

    def __init__(self, keys: KeyAdmin) -> None:
        self._keys = keys

    def routes(self) -> list[BaseRoute]:
        # Names may have slashes in them, so the longer path stands first.
        return [
            Route("/admin/keys", self._create, methods=["POST"]),
            Route("/admin/keys", self._list, methods=["GET"]),
            Route("/admin/keys/{name:path}/rotate", self._rotate, methods=["POST"]),
            Route("/admin/keys/{name:path}", self._show, methods=["GET"]),
            Route("/admin/keys/{name:path}", self._change, methods=["PATCH"]),
            Route("/admin/keys/{name:path}", self._delete, methods=["DELETE"]),
        ]

    async def _create(self, request: Request) -> Response:
        created = await self._keys.create(read(await _body(request), NewKey))
        _log.info("key %s was created", created.name)
        return _json(created, 201)

    async def _list(self, request: Request) -> Response:
        asked = request.query_params
        for name in asked:
            if name not in ("limit", "after", "team", "tag"):
                raise Refusal("invalid_value", "The list takes 'limit', 'after', 'team' and 'tag'.")
        limit = asked.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= 500):
            raise Refusal("invalid_value", "Invalid 'limit': expected a number from 1 to 500.", param="limit")
        return _json(
            await self._keys.page(
                after=asked.get("after", ""), limit=int(limit), team=asked.get("team"), tag=asked.get("tag")
            )
        )

    async def _show(self, request: Request) -> Response:
        return _json(await self._keys.show(request.path_params["name"]))

    async def _change(self, request: Request) -> Response:
        changed = await self._keys.change(request.path_params["name"], read(await _body(request), KeyChange))
        _log.info("key %s was changed (now %s)", changed.name, changed.state)
        return _json(changed)

    async def _rotate(self, request: Request) -> Response:
        rotated = await self._keys.rotate(request.path_params["name"], read(await _body(request) or b"{}", Rotation))
        _log.info("key %s was rotated", rotated.name)
        return _json(rotated)

    async def _delete(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._keys.delete(name)
        _log.info("key %s was deleted", name)
        return _json({"object": "key", "name": name, "deleted": True})


async def _body(request: Request) -> bytes:
    return await read_raw_body(request.scope, request.receive, _LARGEST_BODY)


def _json(content: object, status: int = 200) -> Response:
    # A key is shown here, once: nobody on the way may keep it.
    return Response(msgspec.json.encode(content), status, {"cache-control": "no-store"}, media_type=_JSON)


# -- what is refused --------------------------------------------------------------------------------------------------


async def _http_exception(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        refusal = Refusal("method_not_allowed", f"{request.method} is not allowed here.")
        return _answer(refusal, error.headers or {})
    return _answer(Refusal("unknown_url", "There is nothing at this path of the admin API."))


async def _refusal(_request: Request, error: Exception) -> Response:
    if not isinstance(error, Refusal):
        raise error
    return _answer(error)


async def _down(_request: Request, error: Exception) -> Response:
    _log.warning("the store of keys cannot be asked: %s", error)
    return _answer(
        Refusal("keys_unavailable", "The store of keys did not answer. Whether a change was made has to be looked up.")
    )


async def _fault(_request: Request, _error: Exception) -> Response:
    return _answer(Refusal("internal_error", "The gateway failed. It is not your fault."))  # `Edge` logs the fault


def _answer(refusal: Refusal, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    named = {name.decode(): value.decode() for name, value in refusal.headers()}
    return Response(refusal.body(), refusal.status, {**headers, **named}, media_type=_JSON)
