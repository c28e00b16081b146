"""What can be asked beside a model? The lists, the records and the state: small answers without a backend."""

from __future__ import annotations

from time import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from backends.backend import Endpoint
from gateway import __version__
from gateway.allowance import user_digest
from gateway.decision import as_json
from gateway.edge import App
from gateway.errors import Refusal
from gateway.exchange import Gateway, exchange, find_route
from gateway.http import Receive, Scope, recognise
from gateway.metrics import render
from gateway.peers import Peers
from gateway.sinks import Send
from gateway.standing import as_json as standings_json
from gateway.standing import facts_of
from gateway.usage import Usage

_JSON = "application/json"


class ExchangeEndpoint:
    """The raw ASGI application behind the two routes that models answer."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._gateway = gateway
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await exchange(self._gateway, self._endpoint, scope, receive, send)


class Endpoints:
    """Everything else that is served."""

    def __init__(self, gateway: Gateway, peers: Peers, usage: Usage | None = None) -> None:
        self._gateway = gateway
        self._peers = peers
        self._used = usage
        self._started_at = int(time())

    def busiest(self) -> dict[tuple[str, str], App]:
        """Return the raw applications behind the routes that models answer, by method and path."""
        return {
            ("POST", "/v1/chat/completions"): ExchangeEndpoint(self._gateway, "chat/completions"),
            ("POST", "/v1/completions"): ExchangeEndpoint(self._gateway, "completions"),
        }

    def routes(self) -> list[BaseRoute]:
        """Return all routes."""
        return [
            *(Route(path, app, methods=[method]) for (method, path), app in self.busiest().items()),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/limits", self._limits, methods=["GET"]),
            Route("/v1/usage", self._usage, methods=["GET"]),
            Route("/v1/requests/{exchange_id}", self._decision, methods=["GET"]),
            Route("/healthz", self._alive, methods=["GET"]),
            Route("/readyz", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/status", self._status, methods=["GET"]),
        ]

    async def _models(self, request: Request) -> Response:
        caller = await recognise(self._gateway.keys, request.scope)
        names = self._gateway.ladder.names.items()
        shown = [self._entry(name) for name, route in names if caller.may_ask(name, route.name)]
        return _json({"object": "list", "data": shown})

    async def _model(self, request: Request) -> Response:
        caller = await recognise(self._gateway.keys, request.scope)
        name = request.path_params["name"]
        find_route(self._gateway.ladder, caller, name)
        return _json(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started_at, "owned_by": "tierway"}

    async def _limits(self, request: Request) -> Response:
        gateway = self._gateway
        caller = await recognise(gateway.keys, request.scope)
        user = user_digest(caller.user, request.query_params.get("user"))
        facts = facts_of(gateway.ladder, caller, user)
        return Response(standings_json(await gateway.admission.standings(facts)), media_type=_JSON)

    async def _usage(self, request: Request) -> Response:
        caller = await recognise(self._gateway.keys, request.scope)
        if self._used is None:
            raise Refusal("ledger_unavailable", "This gateway keeps no ledger, so it does not know what was used.")
        return await self._used.answer(request, caller)

    async def _decision(self, request: Request) -> Response:
        caller = await recognise(self._gateway.keys, request.scope)
        exchange_id = request.path_params["exchange_id"]
        decision = self._gateway.store.get(exchange_id) or await self._peers.decision(exchange_id)
        # Somebody else's record looks like none: ids tell nothing about who else is here.
        if decision is None or decision.key != caller.key:
            raise Refusal("exchange_not_found", "There is no such exchange, or it is no longer kept.")
        return Response(as_json(decision), media_type=_JSON)

    async def _alive(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        if not self._gateway.fleet.ready:
            why = "no backend answers"
        elif not self._gateway.ledger.accepting:
            why = "the ledger cannot be written"
        else:
            return _json({"status": "ready"})
        return Response(msgspec.json.encode({"status": why}), 503, {"retry-after": "1"}, media_type=_JSON)

    async def _metrics(self, _request: Request) -> Response:
        snapshot = self._gateway.metrics.snapshot()
        for other in await self._peers.snapshots():
            snapshot.add(other)
        up = {name: member.up for name, member in self._gateway.fleet.members.items()}
        text = render(snapshot, up=up, version=__version__, config=self._gateway.config)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _status(self, request: Request) -> Response:
        caller = await recognise(self._gateway.keys, request.scope)
        if not caller.admin:
            raise Refusal("admin_only", "This key may not read the operator's status.")
        members = self._gateway.fleet.members.values()
        tiers: dict[str, list[dict[str, Any]]] = {}
        for member in members:
            tiers.setdefault(member.tier, []).append(
                {
                    "name": member.name,
                    "kind": member.kind,
                    "model": member.model,
                    "state": {None: "unknown", True: "up", False: "down"}[member.up],
                    "since": member.since or None,
                    "last_fault": member.last_fault,
                }
            )
        return _json(
            {
                "version": __version__,
                "config": self._gateway.config,
                "started_at": self._started_at,
                "workers": self._peers.count,
                "confidence_kind": "raw",
                "tiers": [{"name": name, "backends": backends} for name, backends in tiers.items()],
                "routes": {
                    name: {
                        "serves": route.name,
                        "steps": [{"tier": rung.tier, "doubt_below": rung.doubt_below} for rung in route.rungs],
                    }
                    for name, route in self._gateway.ladder.names.items()
                },
            }
        )


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type=_JSON)
