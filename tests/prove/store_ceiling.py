"""How many requests can one partition admit? Processes that reserve and settle four limits as fast as Redis lets them.

All keys of a partition share one slot, hence one thread of one Redis: this is the ceiling of `limits.partition`. Run as
a program it is one of those processes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from gateway.limiter import Item, Order
from gateway.partition import Settings
from gateway.redis_store import Place, RedisStore
from gateway.shared_limiter import SharedLimiter, replica_name
from policies.accounts import Budget, Concurrency, Entry, Rate
from policies.operations import Granted
from tests.prove.proof import Figures, Size
from tests.servers.redis import RedisServer, running_redis

_ROOT = Path(__file__).parents[2]
_PARTITION = "deployment"
# Room for everybody: what is measured is counting, not refusing.
_ITEMS = (
    Item(Entry("requests", Rate(1_000_000_000, 60_000, 1_000_000_000), 1), "share"),
    Item(Entry("tokens", Rate(1_000_000_000, 60_000, 1_000_000_000), 0, 900), "share"),
    Item(Entry("concurrent", Concurrency(1_000_000), 0, 1), "share"),
    Item(Entry("spend", Budget(9_000_000_000_000_000), 0, 40_000), "share"),
)
_ACTUAL = (0, 400, 0, 17_000)


def run(seed: int, size: Size) -> Figures:
    """Measure one process with 1 and with 64 requests at a time, then several with 64 each."""
    del seed
    seconds = 5.0 if size == "full" else 0.5
    figures: Figures = {}
    admitted = 0
    with running_redis() as server:
        for processes, concurrent in ((1, 1), (1, 64), (2, 64), (4, 64)) if size == "full" else ((1, 1), (2, 64)):
            redis_before_s = _cpu_s(server)
            told = _measure(server, processes, concurrent, seconds)
            redis_s = _cpu_s(server) - redis_before_s
            count = sum(one["requests"] for one in told)
            admitted += int(count)
            name = f"{processes} x {concurrent}"
            figures[f"{name}: requests a second"] = round(sum(one["requests"] / one["took_s"] for one in told))
            figures[f"{name}: CPU us a request"] = round(1e6 * sum(one["cpu_s"] for one in told) / count, 1)
            figures[f"{name}: of Redis"] = round(1e6 * redis_s / count, 1)
            figures[f"{name}: round trips a request"] = round(sum(one["batches"] for one in told) / count, 3)
        used, reserved = asyncio.run(_spent(server))
    assert reserved == 0, f"{reserved} are reserved after the last settlement"
    assert used == admitted * _ACTUAL[3], f"{used} were counted for {admitted} requests"
    return figures


def _measure(server: RedisServer, processes: int, concurrent: int, seconds: float) -> list[dict[str, float]]:
    command = [
        sys.executable,
        "-m",
        "tests.prove.store_ceiling",
        str(server.port),
        server.password,
        str(concurrent),
        str(seconds),
    ]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT) for _ in range(processes)]
    told = []
    for process in started:
        output, _ = process.communicate(timeout=60 + seconds)
        assert process.returncode == 0, f"a process ended with {process.returncode}"
        told.append(json.loads(output))
    return told


async def _spent(server: RedisServer) -> tuple[int, int]:
    limiter, store = _limiter(server.port, server.password)
    await limiter.open()
    standing = (await limiter.look(_PARTITION, _ITEMS))[3]
    await limiter.close()
    await store.close()
    return standing.used, standing.reserved


def _limiter(port: int, password: str) -> tuple[SharedLimiter, RedisStore]:
    # Two busy cores must not be taken for a store that is down.
    store = RedisStore(Place(addresses=(("127.0.0.1", port),), password=password, timeout_s=10.0))
    return SharedLimiter(store, Settings(replica=replica_name())), store


async def _work(port: int, password: str, concurrent: int, seconds: float) -> None:
    limiter, store = _limiter(port, password)
    await limiter.open()
    mine, numbers = replica_name(), itertools.count()
    until_s = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until_s:
            order = Order(f"{mine}{next(numbers)}", _PARTITION, _ITEMS)
            reply = await limiter.reserve(order, lambda: (0, 0, 0, 0))
            assert isinstance(reply, Granted), reply
            limiter.settle(order, _ACTUAL)

    began_s, cpu_s, batches = time.monotonic(), time.process_time(), limiter.numbers.batches
    await asyncio.gather(*(client() for _ in range(concurrent)))
    told = {
        "requests": float(next(numbers)),
        "took_s": time.monotonic() - began_s,
        "cpu_s": time.process_time() - cpu_s,
        "batches": float(limiter.numbers.batches - batches),
    }
    await limiter.close()
    await store.close()
    print(json.dumps(told))


def _cpu_s(server: RedisServer) -> float:
    """The CPU time of a process in seconds, to a hundredth."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    uvloop.run(_work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
