"""How do many replicas keep the same limits? In Redis while it answers, by the operator's choice while it does not.

Each partition is shared by itself (`gateway/partition.py`). Here they are found, and here it is known whether the
servers that hold them answer: one fault of a server is enough, and all that lies on it is decided here until it has
answered again. Who asks again is one task; no request ever does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from random import random

from gateway.breaker import Breaker
from gateway.limiter import Clock, Closed, Item, Numbers, Order, SoFar, State, Told, Unseeded
from gateway.limits_script import script
from gateway.partition import Partition, Settings
from gateway.redis_store import RedisStore, Script
from policies.accounts import Entry, Standing
from policies.operations import Granted, Refused

_TEND_EVERY_S = 0.25
_DROPPED_AFTER_S = 60.0
_JOINED_AT_ONCE = 16

_log = logging.getLogger("tierway.limits")


class SharedLimiter:
    """Limits shared by all replicas that use the same store and prefix."""

    def __init__(self, store: RedisStore, settings: Settings, *, clock: Clock | None = None) -> None:
        self.numbers = Numbers()
        self._store = store
        self._script = Script.of(script())
        self._settings = settings
        self._clock = clock or Clock()
        self._partitions: dict[str, Partition] = {}
        self._breakers: dict[str, Breaker] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._tending: asyncio.Task[None] | None = None
        self._subscribed: list[Callable[[], None]] = []

    @property
    def state(self) -> State:
        main = self._partitions.get(self._settings.partition)
        if main is None:
            return "down"
        return "unseeded" if main.mode == "shared" and not main.seeded else main.mode

    @property
    def partitions(self) -> int:
        """How many partitions are in use."""
        return len(self._partitions)

    async def open(self) -> None:
        """Begin; waits for the store no longer than two requests would."""
        main = self._partition(self._settings.partition)
        # Served without the store if need be, but there is no need where it answers.
        await asyncio.wait([main.join()], timeout=2 * self._store.timeout_s)
        main.wait_no_longer()
        self._tending = asyncio.create_task(self._tend())

    async def close(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
        for asking in self._asking.values():
            asking.cancel()
        within_s = 2 * self._store.timeout_s
        await asyncio.gather(*(partition.leave(within_s) for partition in self._partitions.values()))
        self._partitions.clear()

    def subscribe(self, freed: Callable[[], None]) -> None:
        self._subscribed.append(freed)

    async def reserve(self, order: Order, so_far: SoFar) -> Granted | Refused | Closed:
        return await self._partition(order.partition).reserve(order, so_far)

    def settle(self, order: Order, actual: tuple[int, ...], at_ms: int = 0) -> None:
        partition = self._partitions.get(order.partition)
        if partition is not None:
            partition.settle(order, actual, at_ms)

    def cancel(self, order: Order) -> None:
        partition = self._partitions.get(order.partition)
        if partition is not None:
            partition.cancel(order)

    async def look(self, partition: str, items: tuple[Item, ...]) -> tuple[Standing, ...]:
        return await self._partition(partition).look(items)

    async def seed(self, partition: str, entries: tuple[Entry, ...]) -> bool:
        return await self._partition(partition).seed(entries)

    async def tell(self, partition: str, operations: Sequence[Told], *, epoch: str = "") -> int | None:
        return await self._partition(partition).tell(operations, epoch=epoch)

    async def lose(self, partition: str) -> bool:
        """Have the store begin anew, as if it had lost what was spent, for all replicas; whether it heard that."""
        return await self._partition(partition).lose()

    async def end_seeding(self, partition: str, epoch: str) -> bool:
        return await self._partition(partition).end_seeding(epoch)

    @property
    def unseeded(self) -> tuple[Unseeded, ...]:
        return tuple(one for partition in self._partitions.values() if (one := partition.unseeded) is not None)

    def _freed(self) -> None:
        for freed in self._subscribed:
            freed()

    def _partition(self, name: str) -> Partition:
        partition = self._partitions.get(name)
        if partition is None:
            partition = self._partitions[name] = Partition(
                name,
                self._store,
                self._script,
                self._settings,
                numbers=self.numbers,
                clock=self._clock,
                fault=self._fault,
                freed=self._freed,
            )
            if self._breaker(partition.place).closed:
                partition.begin()
        partition.touched = True
        return partition

    def _breaker(self, place: str) -> Breaker:
        breaker = self._breakers.get(place)
        if breaker is None:
            breaker = self._breakers[place] = Breaker()
        return breaker

    def _fault(self, place: str, why: str) -> None:
        """Note that a server does not answer, and decide here what it would have."""
        self.numbers.faults += 1
        if not self._breaker(place).failed():
            return
        self.numbers.went_down += 1
        _log.warning("the store%s is down, limits follow their when_down: %s", place and f" at {place}", why)
        for partition in self._on(place):
            partition.go_down()
        self._asking[place] = asyncio.create_task(self._ask_again(place))

    def _on(self, place: str) -> list[Partition]:
        """Return what lies on a server, the main partition first."""
        found = [one for one in self._partitions.values() if one.place == place]
        return sorted(found, key=lambda one: one.name != self._settings.partition)

    async def _ask_again(self, place: str) -> None:
        """Wait until a server answers again, then have all that lies on it shared again."""
        breaker = self._breakers[place]
        while not breaker.closed:
            await asyncio.sleep(breaker.pause_s() * (0.75 + random() / 2))  # noqa: S311 - only to spread replicas
            first = next(iter(self._on(place)), None)
            if first is None or await self._joined(first):
                breaker.worked()
        self.numbers.came_back += 1
        _log.warning("the store%s is back", place and f" at {place}")
        del self._asking[place]
        while breaker.closed and (down := [one for one in self._on(place) if one.mode == "down"][:_JOINED_AT_ONCE]):
            if not any(await asyncio.gather(*map(self._joined, down))):
                return

    async def _joined(self, partition: Partition) -> bool:
        """Have a partition join; whether it did. What happens to its task is its own affair."""
        joining = partition.join()
        await asyncio.wait([joining])
        return not joining.cancelled() and joining.exception() is None and joining.result()

    async def _tend(self) -> None:
        """Renew, beat, and drop what has not been used for long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_TEND_EVERY_S, self._settings.lease_s / 6))
            now_s = loop.time()
            for name, partition in tuple(self._partitions.items()):
                main = name == self._settings.partition
                if partition.touched:
                    partition.touched, partition.used_s = False, now_s
                elif not main and partition.idle and now_s - partition.used_s > _DROPPED_AFTER_S:
                    partition.stop()
                    del self._partitions[name]
                    continue
                try:
                    partition.tend(now_s, beat=main)
                except Exception:  # noqa: BLE001 - see below
                    # The outermost boundary of this task: what fails for one must not end the leases of all.
                    _log.exception("cannot tend %s", name)


def replica_name() -> str:
    """Return a name for this process that no other has or will have."""
    return secrets.token_hex(8)
