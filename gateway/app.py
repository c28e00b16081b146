"""How is it all put together? The composition root: a configuration in, an ASGI application out.

Everything shared is made here and handed on; nothing is looked up from a global place.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from backends.backend import Backend, Timeouts
from backends.missing import MissingBackend
from backends.scripted import recite
from backends.vllm import HttpPool, VllmBackend
from backends.weights import local_model_ids
from gateway.admin import admin_app
from gateway.admission import Admission
from gateway.bodies import BodyReader
from gateway.bookkeeping import bookkeeping_of
from gateway.config import model as noun
from gateway.config.load import Loaded, model_id
from gateway.config.secrets import Secret, resolve_all
from gateway.cost_admin import CostAdmin
from gateway.counting import TokenCounter
from gateway.decision import DecisionStore
from gateway.edge import Edge, ErrorAnswers, Shortcut
from gateway.endpoints import Endpoints
from gateway.errors import Refusal
from gateway.exchange import Gateway
from gateway.fleet import Fleet, Member, Scores
from gateway.key_admin import KeyAdmin
from gateway.keys import LiveKeys, caller_of
from gateway.ledger.opening import open_store
from gateway.log import ExchangeLog
from gateway.metrics import Metrics
from gateway.peers import Peers, id_prefix
from gateway.price_list import LiteLlmPrices
from gateway.pricing import pricing_of
from gateway.rules import limits_of
from gateway.sizing import Sizes, TierSize
from gateway.state import State, state_of
from gateway.telemetry import Tracing
from gateway.usage import Usage
from policies.access import Keyring
from routing.ladder import Hold, Ladder, Route, Rung, Seat


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which of how many workers this process is, and where they meet. `folder` is None for one alone."""

    worker: int = 0
    workers: int = 1
    folder: Path | None = None


class Apps(msgspec.Struct, frozen=True):
    """What is served: to clients, and to the operator where there is an admin API. `main` has the lifespan of both."""

    main: ASGIApp
    admin: ASGIApp | None


def build(loaded: Loaded, *, local_urls: Mapping[str, str] | None = None, place: Place | None = None) -> Apps:
    """Return the applications. Raises `ConfigError` where a secret cannot be had.

    `local_urls` says where each local model is served; one that is missing there is known to be down.
    """
    place = place or Place()
    secrets = resolve_all(loaded)
    config = loaded.config
    metrics = Metrics()
    store = DecisionStore(config.server.kept_decisions)
    peers = Peers(worker=place.worker, count=place.workers, folder=place.folder)
    bodies = BodyReader()
    pool = HttpPool()
    log = config.telemetry.log
    kept = not isinstance(config.ledger.store, noun.NoLedger)
    pricing = pricing_of(config, LiteLlmPrices())
    books = bookkeeping_of(
        loaded, secrets, worker=place.worker, workers=place.workers, pricing=pricing, metrics=metrics
    )
    members = {
        name: Member(
            name=name,
            kind=str(backend.__struct_config__.tag),
            model=model_of(backend),
            tier=tier.name,
            backend=_backend(name, backend, pool, secrets, local_urls or {}),
            scores=_scores(backend),
            takes_priority=isinstance(backend, noun.VllmBackend) and backend.priority,
        )
        for tier in config.tiers
        for name in tier.backends
        for backend in (config.backends[name],)
    }
    counter = TokenCounter({name: member.backend for name, member in members.items()}, _tokenizers(loaded))
    state = state_of(loaded, secrets, worker=place.worker, workers=place.workers)
    metrics.include(state.numbers)
    metrics.include(lambda: {"tierway_waiting": {(): float(gateway.admission.waiting)}})
    admin = config.server.admin
    user_header = config.server.user_header
    gateway = Gateway(
        config=loaded.digest,
        instance=books.instance,
        ledger=books.ledger,
        keep_inputs=kept and config.ledger.decision_inputs.kept,
        id_prefix=id_prefix(place.worker),
        max_body_bytes=config.server.max_body,
        keys=LiveKeys(
            Keyring.of((key.sha256, caller_of(key)) for key in config.keys),
            state.keys if admin is not None or isinstance(config.state, noun.RedisState) else None,
            valid_for_s=state.keys_valid_for_s,
        ),
        user_header=None if user_header is None else user_header.lower().encode(),
        ladder=ladder_of(config),
        pricing=pricing,
        sizes=Sizes(
            {
                tier.name: TierSize(
                    context_tokens=tier.context_tokens,
                    max_output_tokens=tier.max_output_tokens,
                )
                for tier in config.tiers
            },
            counter,
            context_tokens=lambda backend: members[backend].context_tokens,
        ),
        admission=Admission(
            state.limiter,
            limits_of(config),
            partition=config.state.partition if isinstance(config.state, noun.RedisState) else "deployment",
            metrics=metrics,
            watching=books.watching,
        ),
        fleet=Fleet(members),
        bodies=bodies,
        store=store,
        metrics=metrics,
        log=ExchangeLog(_unbuffered_stderr(), format=log.format, level=log.level),
        tracing=Tracing() if config.telemetry.traces else None,
    )

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await peers.open(store, metrics)
        await bodies.open()
        await state.limiter.open()
        await books.open(state.limiter, gateway.admission, members)
        if gateway.admission.limits:
            await gateway.sizes.open(member.model for member in members.values())
        await gateway.fleet.probe_all()
        tasks = [asyncio.create_task(gateway.fleet.keep_probing()), asyncio.create_task(gateway.keys.keep_polling())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            gateway.admission.close()
            await books.close()
            await state.limiter.close()
            await state.close()
            await peers.close()
            gateway.log.flush()
            await gateway.sizes.close()
            await bodies.close()
            await pool.close()

    endpoints = Endpoints(gateway, peers, Usage(open_store(loaded)) if kept else None)
    errors = ErrorAnswers(metrics, gateway.log)
    app = Starlette(
        routes=endpoints.routes(),
        exception_handlers={HTTPException: errors.http_exception, Refusal: errors.refusal, Exception: errors.fault},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    inner: ASGIApp = Shortcut(app, endpoints.busiest())
    if config.server.cors_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return Apps(Edge(inner, config=loaded.digest), _admin(loaded, secrets, gateway, state))


def _admin(loaded: Loaded, secrets: Mapping[noun.SecretRef, Secret], gateway: Gateway, state: State) -> ASGIApp | None:
    config = loaded.config
    if config.server.admin is None:
        return None
    keys = KeyAdmin(
        state.keys,
        configured=config.keys,
        models=gateway.ladder.names.keys(),
        teams={*config.teams, *(key.team for key in config.keys if key.team is not None)},
    )
    kept = not isinstance(config.ledger.store, noun.NoLedger)
    return admin_app(
        keys,
        secret=secrets[config.server.admin.key],
        config=loaded.digest,
        more_routes=CostAdmin(open_store(loaded), idle=config.ledger.idle).routes() if kept else (),
    )


def _tokenizers(loaded: Loaded) -> dict[str, str]:
    return {
        name: str(loaded.beside(backend.tokenizer))
        for name, backend in loaded.config.backends.items()
        if isinstance(backend, noun.VllmBackend) and backend.tokenizer is not None
    }


def _unbuffered_stderr() -> BinaryIO:
    return open(sys.stderr.fileno(), "wb", buffering=0, closefd=False)


def model_of(backend: noun.AnyBackend) -> str:
    """Return the model id that a backend answers to."""
    found = model_id(backend, local_model_ids())
    if found is None:
        raise AssertionError("the configuration was checked with the same catalogue")
    return found


def ladder_of(config: noun.Config) -> Ladder:
    """Return every name that can be asked for."""
    rungs = {
        tier.name: Rung(tier.name, tuple(Seat(name, model_of(config.backends[name])) for name in tier.backends))
        for tier in config.tiers
    }
    names: dict[str, Route] = {}
    for name, route in config.routes.items():
        names[name] = Route(
            name=name,
            rungs=tuple(
                msgspec.structs.replace(rungs[step.tier], doubt_below=step.doubt_below) for step in route.steps
            ),
            estimator=route.confidence,
            hold=Hold(tokens=route.hold.tokens, time_s=route.hold.time, size_bytes=route.hold.bytes),
            doubt_unknown=route.when_unknown == "doubt",
            keep_doubted=route.keep_doubted == "until_first_token",
        )
        names.update(dict.fromkeys(route.aliases, names[name]))
    for rung in rungs.values():
        names[rung.tier] = Route(name=rung.tier, rungs=(rung,))
        for seat in rung.seats:
            same = tuple(other for other in rung.seats if other.model == seat.model)
            names.setdefault(seat.model, Route(name=seat.model, rungs=(Rung(rung.tier, same),)))
    return Ladder(names)


def _backend(
    name: str,
    backend: noun.AnyBackend,
    pool: HttpPool,
    secrets: Mapping[noun.SecretRef, Secret],
    local_urls: Mapping[str, str],
) -> Backend:
    match backend:
        case noun.VllmBackend():
            key = secrets[backend.api_key].reveal() if backend.api_key is not None else None
            return VllmBackend(pool, url=backend.url, api_key=key, timeouts=_timeouts(backend.timeouts))
        case noun.LocalBackend():
            if name not in local_urls:
                return MissingBackend("its model is not there")
            return VllmBackend(pool, url=local_urls[name], timeouts=_timeouts(backend.timeouts))
        case noun.ScriptedBackend():
            return recite(backend.model, backend.tokens, logprob=backend.logprob, delay_s=backend.delay)


def _scores(backend: noun.AnyBackend) -> Scores:
    match backend:
        case noun.VllmBackend():
            return backend.logprobs
        case noun.LocalBackend():
            return "not_with_streamed_tools"
        case noun.ScriptedBackend():
            return "always"


def _timeouts(settings: noun.TimeoutSettings) -> Timeouts:
    return Timeouts(
        connect_s=settings.connect,
        first_token_s=settings.first_token,
        between_tokens_s=settings.between_tokens,
        total_s=settings.total,
    )
