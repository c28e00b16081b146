"""What do a million users cost, each with limits of its own? Memory a user and time a request, in a process and in Redis.

Every user asks once, so nothing is ever found again. The time of the process is simulated: when the users' hour is over
what was kept of them must go by itself. In Redis every key must have been given its end.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import monotonic, process_time
from typing import Any, NamedTuple
from uuid import uuid4

import redis
import uvloop

from gateway.admission import Admission, Request
from gateway.limiter import Clock, MemoryLimiter
from gateway.metrics import Metrics
from gateway.partition import Settings
from gateway.redis_line import Place
from gateway.redis_store import RedisStore
from gateway.shared_limiter import SharedLimiter, replica_name
from policies.access import Caller
from policies.accounts import Rate
from policies.limits import Amounts, Facts, Limit, Meter, Need, Use
from tests.prove.clients import ask
from tests.prove.limits_site import Site, ask_for, running_site
from tests.prove.limits_upstream import Plan
from tests.prove.proof import Figures, Size
from tests.servers.redis import running_redis

_HOUR_MS = 3_600_000
_WARM = 1000
"""Users who come before anything is measured."""
_AT_ONCE = 64
_LIMITS = (
    Limit(
        name="users",
        scope=(("key", "each"), ("user", "each")),
        meters=(
            Meter(measure="requests", rule=Rate(100, _HOUR_MS, 100)),
            Meter(measure="tokens", rule=Rate(100_000, _HOUR_MS, 100_000), span=":hour"),
        ),
    ),
)
_CALLER = Caller(key="app")
_NEED = Need(
    estimate=Amounts(input_tokens=100, output_tokens=500),
    most_shown=Amounts(input_tokens=100, output_tokens=500),
    most_of_all=Amounts(input_tokens=100, output_tokens=500),
)
_USED = Use(shown=Amounts(input_tokens=90, output_tokens=200), of_all=Amounts(input_tokens=90, output_tokens=200))
_MOST_BYTES_A_USER = 2500
_MOST_LEFT = 0.05
_MOST_REDIS_BYTES_A_USER = 1500
_LONGEST_NAME = 200
_KEPT_MS = 10 * 60_000
"""Longer than the hour of a limit nothing is remembered by more than that."""


class _Cost(NamedTuple):
    """Of so many users: memory in bytes of each, and CPU of each among the first and among the last of them."""

    user_bytes: float
    first_us: float
    last_us: float


def run(seed: int, size: Size) -> Figures:
    """Let users come once, in memory, in Redis, and over HTTP."""
    random = Random(seed)
    users, over_http = (1_000_000, 10_000) if size == "full" else (6_000, 200)
    return {
        "users": float(users),
        **uvloop.run(_in_memory(users)),
        **uvloop.run(_in_redis(users)),
        **_over_http(over_http, random),
    }


async def _in_memory(users: int) -> Figures:
    later_s = 0.0
    # What only the first request ever needs is no part of what is measured.
    await _come(Admission(MemoryLimiter(), _LIMITS, metrics=Metrics()), 0, _WARM)
    gc.collect()
    blocks = sys.getallocatedblocks()
    limiter = MemoryLimiter(clock=Clock(lambda: monotonic() + later_s))
    admission = Admission(limiter, _LIMITS, metrics=Metrics())
    await _come(admission, 0, _WARM)
    cost = await _measure(admission, users, _resident_bytes)
    assert cost.user_bytes < _MOST_BYTES_A_USER, f"{cost.user_bytes:.0f} bytes a user"
    held = sys.getallocatedblocks() - blocks
    # Two hours on, a few ask now and then: what was kept of the others goes.
    later_s = 2 * 3600.0
    for number in range(users // 25):
        await _come(admission, 10**9 + number % (20 + users // 2000), 1)
    # What admission has cached, 10,000 of a kind at most, it keeps: only what the limiter holds is of interest.
    del admission
    gc.collect()
    left = (sys.getallocatedblocks() - blocks) / held
    assert left < _MOST_LEFT, f"{left:.0%} of the memory is still held two hours later"
    return {
        "memory: bytes a user": round(cost.user_bytes),
        "memory: us a request, first ones": round(cost.first_us, 1),
        "memory: us a request, last ones": round(cost.last_us, 1),
        "memory: left after two hours, %": round(100 * max(0.0, left), 1),
    }


async def _in_redis(users: int) -> Figures:
    with running_redis() as server, redis.Redis.from_url(server.url) as client:
        place = Place(addresses=(("127.0.0.1", server.port),), password=server.password, timeout_s=5.0)
        store = RedisStore(place)
        limiter = SharedLimiter(store, Settings(replica=replica_name()))
        await limiter.open()
        admission = Admission(limiter, _LIMITS, metrics=Metrics())
        await _come(admission, 0, _WARM)
        before = _evals(client)

        def redis_bytes() -> int:
            return int(client.info("memory")["used_memory"])

        resident = _resident_bytes()
        cost = await _measure(admission, users, redis_bytes)
        grown = (_resident_bytes() - resident) / users
        calls, spent_us = (now - then for now, then in zip(_evals(client), before, strict=True))
        assert limiter.state == "shared"
        assert limiter.numbers.faults == 0, "the store was too slow for this to show anything"
        assert cost.user_bytes < _MOST_REDIS_BYTES_A_USER, f"{cost.user_bytes:.0f} bytes of Redis a user"
        _all_end(client)
        await limiter.close()
        await store.close()
    return {
        "Redis: bytes a user": round(cost.user_bytes),
        "Redis: the process grew by, bytes a user": round(grown, 1),
        "Redis: us a request, first ones": round(cost.first_us, 1),
        "Redis: us a request, last ones": round(cost.last_us, 1),
        "Redis: its own us a request": round(spent_us / users, 1),
        "Redis: requests a call": round(users / calls, 1),
    }


async def _measure(admission: Admission, users: int, used_bytes: Callable[[], int]) -> _Cost:
    gc.collect()
    before = used_bytes()
    few = min(10_000, users // 4)
    first_us = await _come(admission, _WARM, few)
    await _come(admission, _WARM + few, users - 2 * few)
    last_us = await _come(admission, _WARM + users - few, few)
    # What is to be settled goes a little later.
    await asyncio.sleep(0.1)
    user_bytes = (used_bytes() - before) / users
    # Twice as many or a hundred times as many: the same, but for a noisy machine.
    assert last_us < 2 * first_us + 20, f"{last_us:.1f} us a request in the end, {first_us:.1f} in the beginning"
    return _Cost(user_bytes, first_us, last_us)


async def _come(admission: Admission, first: int, count: int) -> float:
    """Let `count` users come, from number `first` on; the CPU microseconds of each here."""
    began_s = process_time()
    numbers = iter(range(first, first + count))

    async def work() -> None:
        for number in numbers:
            user = f"{number:032x}"
            request = Request(
                id=uuid4().hex,
                caller=_CALLER,
                facts=Facts(key="app", user=user, route="auto", model="auto"),
                need=_NEED,
                so_far=Use,
            )
            (await admission.admit(request)).settle(_USED)

    await asyncio.gather(*(work() for _ in range(min(_AT_ONCE, count))))
    return 1e6 * (process_time() - began_s) / count


def _evals(client: redis.Redis) -> tuple[int, int]:
    """Return how many calls of the script there were, and the microseconds that they took Redis."""
    told = client.info("commandstats").get("cmdstat_evalsha", {})
    return int(told.get("calls", 0)), int(told.get("usec", 0))


def _all_end(client: redis.Redis) -> None:
    """See that of a sample of all keys each has an end, and not a late one."""
    found = [client.randomkey() for _ in range(1000)]
    names = [name for name in found if isinstance(name, bytes) and (b":a:" in name or b":r:" in name)]
    assert names
    pipe = client.pipeline()
    for name in names:
        pipe.pttl(name)
    ends_ms = pipe.execute()
    # One that has gone since it was named (-2) has shown what it should.
    assert all(end_ms == -2 or 0 < end_ms <= _HOUR_MS + _KEPT_MS for end_ms in ends_ms), (min(ends_ms), max(ends_ms))


def _resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


# -- over HTTP -------------------------------------------------------------------------------------------------------


def _over_http(users: int, random: Random) -> Figures:
    """Let users of all kinds of names come through the front door."""
    limits: list[dict[str, Any]] = [
        {"name": "users", "scope": {"key": "each", "user": "each"}, "requests": {"limit": 1, "per": "hour"}}
    ]
    with running_site("--workers", "2", keys=["app"], limits=limits, state={"timeout": "2s"}) as site:
        names = [_name(random, number) for number in range(users)]
        with redis.Redis.from_url(site.store.url) as client:
            before = int(client.info("memory")["used_memory"])
            statuses = uvloop.run(_ask_all(site, names))
            assert set(statuses) == {200}, f"users were refused for what others did: {Counter(statuses)}"
            again = uvloop.run(_ask_all(site, names[:50]))
            assert again == [429] * 50, "a name is not the same user twice"
            each_bytes = (int(client.info("memory")["used_memory"]) - before) / users
            longest = max(len(name) for name in client.keys("tierway:*"))
            assert longest < _LONGEST_NAME, f"a key of {longest} bytes"
            _all_end(client)
        (shown,) = [one for one in site.limits("app", names[0].replace(" ", "%20")) if "user" in one.scope]
        assert shown.used == 1
        site.sound()
    return {"HTTP: users": float(users), "HTTP: Redis, bytes a user": round(each_bytes)}


def _name(random: Random, number: int) -> str:
    kind = number % 4 if number else 0
    if kind == 1:
        return f"{number} " + "x" * random.randrange(5000)
    if kind == 2:
        return f"{number}|user=each\r\n{{}}%7C\u0007"
    return f"\U0001f600 {number}" if kind == 3 else f"user {number}"


async def _ask_all(site: Site, names: list[str]) -> list[int]:
    waiting = iter(enumerate(names))
    statuses = [0] * len(names)

    async def work() -> None:
        for number, name in waiting:
            plan = Plan(tag="app", number=number, tokens=1)
            answer = await ask(site.gateway.port, ask_for("app", plan, user=name))
            statuses[number] = answer.status

    await asyncio.gather(*(work() for _ in range(_AT_ONCE // 4)))
    return statuses
