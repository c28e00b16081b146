"""Where is kept what replicas share, if that is Redis? Its settings, as a limiter and a shelf of keys."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.secrets import Secret
from gateway.key_redis import RedisKeys
from gateway.metrics import Labels
from gateway.partition import Settings
from gateway.redis_line import Address, Place, Tls
from gateway.redis_store import RedisStore
from gateway.shared_limiter import SharedLimiter
from gateway.state import State

_BY = {"deployment": "deployment", "team": "team=", "key": "key="}
"""The first partition that is joined, so that a store which is down is known before the first request."""


def redis_state_of(
    loaded: Loaded, state: noun.RedisState, secrets: Mapping[noun.SecretRef, Secret], *, workers: int
) -> State:
    """Return the state kept in Redis. Nothing is connected yet."""
    store = RedisStore(_place(loaded, state, secrets))
    limiter = SharedLimiter(
        store,
        Settings(
            replica=uuid4().hex,
            prefix=state.prefix,
            partition=_BY[state.partition],
            lease_s=state.lease,
            expected_replicas=state.expected_replicas,
            least_replicas=workers,
            ledger=not isinstance(loaded.config.ledger.store, noun.NoLedger),
        ),
    )

    def numbers() -> Mapping[str, Mapping[Labels, float]]:
        seen = limiter.numbers
        return {
            "tierway_limits_local_total": {
                ("granted",): float(seen.granted_locally),
                ("refused",): float(seen.refused_locally),
                ("closed",): float(seen.closed),
            },
            "tierway_limits_store_faults_total": {(): float(seen.faults)},
            "tierway_limits_apart": {(): float(limiter.state not in ("shared", "unseeded"))},
        }

    return State(
        limiter=limiter,
        keys=RedisKeys(store, prefix=state.prefix),
        keys_valid_for_s=state.keys_valid_for,
        numbers=numbers,
        close=store.close,
    )


def _place(loaded: Loaded, state: noun.RedisState, secrets: Mapping[noun.SecretRef, Secret]) -> Place:
    tls = state.tls
    return Place(
        addresses=tuple(map(_address, state.addresses)),
        mode=state.mode,
        master=state.master,
        database=state.database,
        user=state.user,
        password=None if state.password is None else secrets[state.password].reveal(),
        tls=None
        if tls is None
        else Tls(ca=None if tls.ca is None else str(loaded.beside(tls.ca)), server_name=tls.server_name),
        timeout_s=state.timeout,
    )


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
