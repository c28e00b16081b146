"""What do 100,000 keys of the store cost a process that has seen them all? Memory a key, and time a request."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

from gateway.errors import Refusal
from gateway.key_redis import RedisKeys
from gateway.key_store import StoredKey
from gateway.keys import LiveKeys
from gateway.redis_line import Place
from gateway.redis_store import RedisStore
from policies.access import Keyring
from tests.gateway.key_stores import stored
from tests.prove.proof import Figures, Size
from tests.servers.redis import RedisServer, running_redis

_MOST_BYTES_A_KEY = 2500
_FIRST = 1000
_ASKED = 20_000
_PART = 1000
_FLOOD = 20_000


def run(seed: int, size: Size) -> Figures:
    """Put keys into a Redis, ask for each of them once and for many of them again, then for keys that nobody has."""
    count = 100_000 if size == "full" else 5_000
    # What other proofs have left behind would be collected in the middle, for seconds.
    gc.collect()
    with running_redis() as server:
        return asyncio.run(_play(server, count, Random(seed)))


async def _play(server: RedisServer, count: int, random: Random) -> Figures:
    place = Place(addresses=(("127.0.0.1", server.port),), password=server.password, timeout_s=5.0)
    redis = RedisStore(place)
    try:
        keys = RedisKeys(redis, prefix="proof")
        before_redis = await _redis_bytes(redis)
        for start in range(0, count, 50):
            made = await asyncio.gather(*(keys.replace(_name(n), None, _key(n)) for n in range(start, start + 50)))
            assert all(made)
        redis_bytes = await _redis_bytes(redis) - before_redis
        return {
            "keys": float(count),
            "redis, bytes a key": round(redis_bytes / count),
            **await _ask(keys, count, random),
        }
    finally:
        await redis.close()


async def _ask(source: RedisKeys, count: int, random: Random) -> Figures:
    live = LiveKeys(Keyring.of(()), source, most_cached=count)
    await _find(live, range(_FIRST))
    few_us = _known_us(live, [random.randrange(_FIRST) for _ in range(_ASKED)])
    # The first keys paid for what the others share.
    gc.collect()
    before = _resident_bytes()
    began = perf_counter()
    await _find(live, range(_FIRST, count))
    found_us = 1e6 * (perf_counter() - began) / (count - _FIRST)
    gc.collect()
    each_bytes = (_resident_bytes() - before) / (count - _FIRST)
    many_us = _known_us(live, [random.randrange(count) for _ in range(_ASKED)])
    assert live.counts == (count, 0), "all of them are cached"
    assert each_bytes < _MOST_BYTES_A_KEY, f"{each_bytes:.0f} bytes a cached key"
    assert many_us < 5 * few_us + 5, f"{many_us:.1f} us a request with {count} keys, {few_us:.1f} with {_FIRST}"
    flood_bytes = await _flood(live, random)
    assert live.counts[0] == count, "strange keys drive out no known one"
    assert live.counts[1] <= 10_000
    return {
        "cached, bytes a key": round(each_bytes),
        "known key, us": round(many_us, 2),
        f"known key among {_FIRST}, us": round(few_us, 2),
        "looked up for the first time, us a key": round(found_us, 1),
        f"{_FLOOD} strange keys, MB": round(flood_bytes / 1e6, 1),
    }


async def _find(live: LiveKeys, numbers: Sequence[int]) -> None:
    for start in range(0, len(numbers), 500):
        found = await asyncio.gather(*(live.find(_secret(n)) for n in numbers[start : start + 500]))
        assert [caller.key for caller in found] == [_name(n) for n in numbers[start : start + 500]]


def _known_us(live: LiveKeys, numbers: Sequence[int]) -> float:
    secrets = [_secret(number) for number in numbers]
    took_s = []
    for start in range(0, len(secrets), _PART):
        began = perf_counter()
        for secret in secrets[start : start + _PART]:
            assert live.known(secret) is not None
        took_s.append(perf_counter() - began)
    # The median part: a shared machine pauses now and then.
    return 1e6 * median(took_s) / _PART


async def _flood(live: LiveKeys, random: Random) -> int:
    before = _resident_bytes()
    for _ in range(_FLOOD // 500):
        strange = [random.randbytes(32).hex().encode() for _ in range(500)]
        results = await asyncio.gather(*map(live.find, strange), return_exceptions=True)
        assert all(isinstance(one, Refusal) and one.status == 401 for one in results)
    return _resident_bytes() - before


def _secret(number: int) -> bytes:
    return b"tw-%043d" % number


def _name(number: int) -> str:
    return f"key-{number:06}"


def _key(number: int) -> StoredKey:
    return stored(
        _name(number),
        _secret(number).decode(),
        team=f"team-{number % 100}",
        models=("auto", "small"),
        tags=("nightly",),
        metadata=(("cost-centre", str(number % 50)),),
    )


async def _redis_bytes(redis: RedisStore) -> int:
    told = await redis.command("INFO", "memory")
    assert isinstance(told, bytes)
    return int(next(line[12:] for line in told.split(b"\r\n") if line.startswith(b"used_memory:")))


def _resident_bytes() -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])
