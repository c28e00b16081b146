"""On what ground are the proofs of limits played? A gateway with keys and limits over a metered upstream and a Redis.

What a request must have cost is worked out here once more, from the price list and with fractions, so that the gateway
is not its own witness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

from tests.prove.clients import request
from tests.prove.limits_upstream import Metered, Plan, Served, chat_fields, metered
from tests.running import OPERATOR, Gateway, folder_for_a_test, key_line, wait_until
from tests.servers.redis import RedisServer, running_redis

SMALL, LARGE = "tiny-1b", "big-7b"
_PRICES: dict[str, dict[str, Any]] = {SMALL: {"input": 0.0733, "output": 0.31}, LARGE: {"input": 1, "output": 2.5}}
"""Dollars per million tokens; those of the small one are no whole number of nano-dollars a token."""


class Shown(msgspec.Struct, frozen=True):
    """One account of `GET /v1/limits`, money in nano-dollars."""

    name: str
    measure: str
    scope: dict[str, str]
    used: int
    reserved: int


class Site:
    """All that stands: `redis` is None where the gateway counts in its own memory. Its files are in `folder`."""

    def __init__(self, gateway: Gateway, upstream: Metered, redis: RedisServer | None, folder: Path) -> None:
        self.gateway = gateway
        self.folder = folder
        self.upstream = upstream
        self.redis = redis

    @property
    def store(self) -> RedisServer:
        """The Redis that there is."""
        if self.redis is None:
            raise LookupError("this gateway counts in its own memory")
        return self.redis

    def limits(self, key: str, user: str | None = None) -> list[Shown]:
        """Ask how the limits of a key stand."""
        path = "/v1/limits" + ("" if user is None else f"?user={user}")
        reply = self.gateway.get(path, secret(key))
        assert reply.status == 200, reply
        return shown(reply.body)

    def at_rest(self, keys: Sequence[str], limit_s: float = 5.0) -> bool:
        """Wait until nothing is reserved for any of these keys."""
        return wait_until(lambda: not any(one.reserved for key in keys for one in self.limits(key)), limit_s, 0.05)

    def sound(self) -> None:
        """Raise AssertionError if the gateway or one of its workers has stumbled."""
        assert self.gateway.process.running
        said = self.gateway.process.said()
        assert "Traceback" not in said, said[said.index("Traceback") - 500 :][:3000]


def shown(body: bytes) -> list[Shown]:
    """Read the answer of `GET /v1/limits`."""
    return [_shown(one) for one in msgspec.json.decode(body)["data"]]


def _shown(one: dict[str, Any]) -> Shown:
    used, reserved = (
        int(Fraction(one[name]) * 10**9) if one["unit"] == "usd" else one[name] for name in ("used", "reserved")
    )
    return Shown(one["name"], one["measure"], one["scope"], used, reserved)


def secret(key: str) -> str:
    """The key itself of the key of that name."""
    return f"tw-secret-of-{key}"


def cost_nusd(served: Served) -> int:
    """What a model's work costs, in nano-dollars: each part rounded once, half to even."""
    price = _PRICES[served.model]
    parts = ((served.prompt_tokens, price["input"]), (served.tokens, price["output"]))
    return sum(round(Fraction(tokens) * Fraction(str(usd)) * 1000) for tokens, usd in parts)


def ask_for(key: str, plan: Plan, model: str = "small", *, filler: int = 0, **fields: Any) -> bytes:
    """Write a request for `plan`; `fields` are further ones of its body."""
    body = {"model": model, **chat_fields(plan, filler=filler), **fields}
    return request(msgspec.json.encode(body), key=secret(key))


def config_of(
    port: int, keys: Sequence[str], limits: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration of a gateway with two tiers."""
    patient = {"connect": "2s", "first_token": "20s", "between_tokens": "20s", "total": "40s"}
    url = f"http://127.0.0.1:{port}"
    return {
        "server": {"shutdown_grace": "5s"},
        "backends": {
            name: {"kind": "vllm", "url": url, "model": model, "timeouts": patient}
            for name, model in (("small-1", SMALL), ("large-1", LARGE))
        },
        "tiers": [
            {"name": "small", "backends": ["small-1"], "price": _PRICES[SMALL], "max_output_tokens": 500},
            {"name": "large", "backends": ["large-1"], "price": _PRICES[LARGE], "max_output_tokens": 500},
        ],
        "routes": {"auto": {"steps": [{"tier": "small", "doubt_below": 0.5}, {"tier": "large"}]}},
        "keys": [*(key_line(key, secret(key)) for key in keys), key_line("operator", OPERATOR, admin=True)],
        "limits": list(limits),
        # What limits do by themselves; with a ledger they are told again what they have lost.
        "ledger": {"store": {"kind": "none"}},
        "state": dict(state),
        # A line for each of thousands of refusals tells nobody anything.
        "telemetry": {"log": {"level": "warning"}},
    }


def redis_state(folder: Path, redis: RedisServer, port: int | None = None, **more: Any) -> dict[str, Any]:
    """Return the state that is kept in `redis`, spoken to on `port` if something stands in between."""
    password = folder / "password"
    password.write_text(redis.password)
    return {
        "kind": "redis",
        "addresses": [f"127.0.0.1:{port or redis.port}"],
        "password": {"from": "file", "path": str(password)},
        **more,
    }


@contextmanager
def running_site(
    *options: str,
    keys: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any] | None = None,
    memory: bool = False,
    tells: bool = True,
    change: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Iterator[Site]:
    """Start everything. `options` are the gateway's, `state` what is to be said of its Redis; `change` the rest."""
    with ExitStack() as stack:
        folder = stack.enter_context(folder_for_a_test())
        upstream = stack.enter_context(metered(SMALL, LARGE, tells=tells))
        redis = None if memory else stack.enter_context(running_redis())
        kept = {"kind": "memory"} if redis is None else redis_state(folder, redis, **(state or {}))
        config = config_of(upstream.port, keys, limits, kept)
        change(config)
        gateway = Gateway(config, folder, *options)
        stack.callback(gateway.process.stop)
        assert gateway.all_up(), gateway.states()
        yield Site(gateway, upstream, redis, folder)
