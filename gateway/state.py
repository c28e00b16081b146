"""Where is kept what replicas share? The state of the configuration, as a limiter and as a shelf of keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.secrets import Secret
from gateway.key_store import KeyShelf, KeySource, MemoryKeys
from gateway.limiter import Limiter, MemoryLimiter
from gateway.metrics import Labels


class StoredKeys(KeySource, KeyShelf, Protocol):
    """Where keys are kept and looked up."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept. `numbers` are counters for `/metrics`; `keys_valid_for_s` how long keys are believed unseen."""

    limiter: Limiter
    keys: StoredKeys
    keys_valid_for_s: float
    numbers: Callable[[], Mapping[str, Mapping[Labels, float]]]
    close: Callable[[], Awaitable[None]]


def state_of(loaded: Loaded, secrets: Mapping[noun.SecretRef, Secret], *, worker: int, workers: int) -> State:
    """Return the state that a configuration names. Nothing is connected yet."""
    state = loaded.config.state
    if isinstance(state, noun.MemoryState):
        return State(
            limiter=MemoryLimiter(rank=worker, count=workers),
            keys=MemoryKeys(),
            keys_valid_for_s=float("inf"),
            numbers=dict,
            close=_nothing,
        )
    # redis-py is a tenth of a second and ten megabytes that memory state has no use for.
    from gateway.redis_state import redis_state_of  # noqa: PLC0415

    return redis_state_of(loaded, state, secrets, workers=workers)


async def _nothing() -> None:
    """Close what never was open."""
