"""Could this configuration be served here, by so many workers? What the file alone cannot say.

Beside the secrets (`gateway.config.secrets`), which are looked at in the same breath.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

from gateway.config.load import Loaded
from gateway.config.model import Config, MemoryState, RedisState, VllmBackend
from gateway.config.prices_meaning import stated
from gateway.config.problem import Problem, in_order
from gateway.config.shape import Place
from gateway.price_list import LiteLlmPrices, PriceUnknownError
from gateway.tokenizer_file import why_unusable

_REDIS = "`state: {kind: redis, …}`"
_SHARES = "`state: {kind: memory, per_worker_shares: true}`"


def check(loaded: Loaded, *, workers: int) -> tuple[Problem, ...]:
    """Return what keeps `workers` processes on this machine from serving a configuration, by position."""
    return in_order([*_files(loaded), *_prices(loaded), *_workers(loaded, workers)])


def _files(loaded: Loaded) -> Iterator[Problem]:
    config = loaded.config
    for name, backend in config.backends.items():
        if isinstance(backend, VllmBackend) and backend.tokenizer is not None:
            path = loaded.beside(backend.tokenizer)
            fault = _unreadable(path) or why_unusable(str(path))
            if fault:
                yield loaded.problem(("backends", name, "tokenizer"), fault)
    tls = config.state.tls if isinstance(config.state, RedisState) else None
    if tls is not None and tls.ca is not None:
        path = loaded.beside(tls.ca)
        fault = _unreadable(path) or _untrustworthy(path)
        if fault:
            yield loaded.problem(("state", "tls", "ca"), fault)


def _prices(loaded: Loaded) -> Iterator[Problem]:
    prices = LiteLlmPrices()
    for one in stated(loaded.config):
        if one.price.litellm is not None:
            try:
                prices.price_of(one.price.litellm)
            except PriceUnknownError as fault:
                yield loaded.problem((*one.place, "litellm"), str(fault))


def _unreadable(path: Path) -> str:
    try:
        # Looked at first: to open a pipe would wait for its writer.
        if not path.is_file():
            return f"the file `{path}` " + ("is not a regular file" if path.exists() else "does not exist")
        with path.open("rb") as stream:
            stream.read(1)
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        reason = (fault.strerror if isinstance(fault, OSError) else None) or "not a path"
        return f"the file `{path}` cannot be read: {reason}"
    return ""


def _untrustworthy(path: Path) -> str:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return f"the file `{path}` holds no certificate in PEM"
    return ""


def _workers(loaded: Loaded, workers: int) -> Iterator[Problem]:
    """Memory is not shared: limits in it would be multiplied by the workers, and keys in it known to one of them."""
    config = loaded.config
    if workers == 1 or not isinstance(config.state, MemoryState):
        return
    if config.server.admin is not None:
        message = f"its keys would be kept in the memory of one of {workers} workers; set {_REDIS}, or serve with one"
        yield loaded.problem(("server", "admin"), message)
    counted = [place for place, _ in _counts(config)]
    if not counted:
        return
    if not config.state.per_worker_shares:
        where: Place = ("state",) if ("state",) in loaded.marks else counted[0][: 1 if config.limits else 3]
        message = f"counted in memory, which {workers} workers do not share; set {_REDIS} to count together"
        yield loaded.problem(where, f"{message}, or {_SHARES} to give each of them its share")
        return
    for place, most in _counts(config):
        if most < workers:
            yield loaded.problem(place, f"{most} cannot be shared by {workers} workers; set {_REDIS}")


def _counts(config: Config) -> Iterator[tuple[Place, int]]:
    """Everything that is counted, with its place and the most of it at once."""
    for i, limit in enumerate(config.limits):
        for measure in ("requests", "tokens", "input_tokens", "output_tokens"):
            rate = getattr(limit, measure)
            if rate is not None:
                key = "limit" if rate.burst is None else "burst"
                yield ("limits", i, measure, key), getattr(rate, key)
        if limit.concurrent is not None:
            yield ("limits", i, "concurrent"), limit.concurrent
        if limit.spend is not None:
            yield ("limits", i, "spend", "usd"), limit.spend.usd
    for i, tier in enumerate(config.tiers):
        if tier.queue is not None:
            yield ("tiers", i, "queue", "concurrent"), tier.queue.concurrent
