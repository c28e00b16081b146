"""How does a test play several replicas that share their limits? Each with a store and a limiter of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from gateway.limiter import Closed, Item, Limiter, Order, WhenDown
from gateway.partition import Settings
from gateway.redis_store import Place, RedisStore
from gateway.shared_limiter import SharedLimiter, replica_name
from policies.accounts import Budget, Concurrency, Entry, Rate, Rule, Standing
from policies.operations import Granted, Refused
from tests.servers.redis import RedisServer

T = TypeVar("T")

ALL = "deployment"
# Far more than any bound under test, to tell what does not end from what is slow.
PATIENCE_S = 20.0

_numbers = itertools.count()


def order(*items: Item, partition: str = ALL) -> Order:
    """An order with an id that no other has."""
    return Order(f"order-{next(_numbers)}", partition, items)


def requests(limit: int, *, when_down: WhenDown = "share", account: str = "requests") -> Item:
    """One of so many requests an hour, and no more than that at once."""
    return Item(Entry(account, Rate(limit, 3_600_000, limit), 1), when_down)


def concurrent(limit: int, *, when_down: WhenDown = "share") -> Item:
    return Item(Entry("concurrent", Concurrency(limit), 0, 1), when_down)


def spend(limit: int, held: int, *, when_down: WhenDown = "share") -> Item:
    return Item(Entry("spend", Budget(limit), 0, held), when_down)


def item(account: str, rule: Rule, *, taken: int = 0, held: int = 0, when_down: WhenDown = "share") -> Item:
    return Item(Entry(account, rule, taken, held), when_down)


def place_of(server: RedisServer, *, timeout_s: float = 1.0) -> Place:
    return Place(addresses=(("127.0.0.1", server.port),), password=server.password, timeout_s=timeout_s)


@asynccontextmanager
async def replica(
    place: Place, *, lease_s: float = 30.0, expected_replicas: int = 1, name: str | None = None, prefix: str = "tierway"
) -> AsyncIterator[SharedLimiter]:
    """A replica that has joined, where that is possible."""
    store = RedisStore(place)
    limiter = SharedLimiter(
        store,
        Settings(
            replica=name or replica_name(),
            prefix=prefix,
            lease_s=lease_s,
            expected_replicas=expected_replicas,
            beat_every_s=0.05,
            alive_for_s=5.0,
        ),
    )
    await limiter.open()
    try:
        yield limiter
    finally:
        await limiter.close()
        await store.close()
        await asyncio.sleep(0.005)


async def ask(limiter: Limiter, wanted: Order, *, so_far: tuple[int, ...] | None = None) -> Granted | Refused | Closed:
    used = (0,) * len(wanted.items) if so_far is None else so_far
    return await limiter.reserve(wanted, lambda: used)


async def granted(limiter: Limiter, *items: Item, partition: str = ALL) -> Order | None:
    """The order, where it was granted."""
    wanted = order(*items, partition=partition)
    return wanted if isinstance(await ask(limiter, wanted), Granted) else None


async def count_granted(limiter: Limiter, tries: int, *items: Item) -> int:
    """How many of so many tries at the same time were granted; all of them stay open."""
    return sum(one is not None for one in await asyncio.gather(*(granted(limiter, *items) for _ in range(tries))))


async def until(there: Callable[[], bool | Awaitable[bool]], limit_s: float = PATIENCE_S) -> None:
    """Return once `there()` is true. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while True:
            found = there()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.01)


async def standing(limiter: Limiter, one: Item, partition: str = ALL) -> Standing:
    return (await limiter.look(partition, (one,)))[0]


async def stands_at(limiter: Limiter, one: Item, used: int, reserved: int) -> None:
    """Return once the account of `one` stands so, for the store."""

    async def so() -> bool:
        found = await standing(limiter, one)
        return (found.used, found.reserved) == (used, reserved)

    await until(lambda: limiter.state in ("shared", "unseeded"))
    try:
        await until(so, 5)
    except TimeoutError:
        raise AssertionError(f"{await standing(limiter, one)}, not {used} used and {reserved} reserved") from None
