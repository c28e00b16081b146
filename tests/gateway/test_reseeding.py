"""Do budgets equal the ledger to the nano-dollar, whatever becomes of the store that counts them?

Against a real Redis that is killed under load, and starts again empty or from an old copy, with eight replicas that all
seed it from one ledger.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from time import time
from zoneinfo import ZoneInfo

import msgspec
import pytest

from gateway.admission import Admission, PartitionBy, Request, Reservation
from gateway.errors import Refusal
from gateway.ledger.contract import Store
from gateway.ledger.rows import AdjustmentRow, Bill, ClosingRow, InstanceRow
from gateway.ledger.spent import Spending
from gateway.ledger.sqlite import SqliteStore
from gateway.limiter import Item, Limiter, MemoryLimiter
from gateway.metrics import Metrics
from gateway.partition import Settings as Shared
from gateway.redis_store import RedisStore
from gateway.reseeding import Reseeder, Settings
from gateway.shared_limiter import SharedLimiter, replica_name
from policies.access import Caller
from policies.accounts import Budget, Entry, Rolling
from policies.limits import Amounts, Calendar, Facts, Limit, Meter, Need, Use
from tests.gateway.ledger.bills import bill_of, rows_of
from tests.gateway.limiting import place_of, until
from tests.servers.redis import RedisServer, kill, running_redis, say
from tests.servers.relay import relay_to

DAY_MS = 86_400_000
LARGE = 10**15
UTC = ZoneInfo("UTC")

DAY = Meter(measure="spend", rule=Calendar(limit=LARGE, period="day", zone=UTC), span=":day")
ROLLING = Meter(measure="spend", rule=Rolling(LARGE, DAY_MS), span=":rolling-day")
TOTAL = Meter(measure="spend", rule=Budget(LARGE), span=":total")
MONTH = Meter(
    measure="spend", rule=Calendar(limit=LARGE, period="month", zone=ZoneInfo("Europe/Berlin")), span=":month"
)
LIMITS = (
    Limit(name="key-day", scope=(("key", "each"),), meters=(DAY,)),
    Limit(name="team-rolling", scope=(("team", "each"),), meters=(ROLLING,)),
    Limit(name="all", meters=(TOTAL,), when_down="open"),
    Limit(name="users", scope=(("user", "each"),), meters=(MONTH,)),
    Limit(name="tier-day", scope=(("team", "each"), ("tier", "large")), meters=(DAY,)),
)
WITHIN_TEAMS = tuple(one for one in LIMITS if one.name in ("team-rolling", "tier-day"))
QUICK = Settings(every_s=0.02, spread_s=0.1, retry_s=0.05, passes_s=(0.3, 0.6), dead_s=0.5, dead_every_s=0.1)

_numbers = itertools.count(int(time()) % 1_000_000)


def now_ms() -> int:
    return int(time() * 1000)


class Books:
    """What a test writes into a ledger, and what budgets should come to by it."""

    def __init__(self, folder: Path) -> None:
        self.store = SqliteStore(folder / "ledger.db", shared=False)
        self.store.open()
        self._writer = ThreadPoolExecutor(1)

    def bill(self, facts: Facts, costs: Mapping[str, int] | tuple[tuple[str, int], ...], settled_ms: int) -> Bill:
        """Make the bill of an exchange whose attempts cost so much on their tiers."""
        number = next(_numbers)
        parts = tuple(costs.items()) if isinstance(costs, Mapping) else costs
        made = bill_of(number, attempts=len(parts))
        attempts = tuple(
            msgspec.structs.replace(attempt, tier=tier, output_nusd=nusd)
            for attempt, (tier, nusd) in zip(made.attempts, parts, strict=True)
        )
        exchange = msgspec.structs.replace(
            made.exchange,
            at_ms=settled_ms,
            settled_ms=settled_ms,
            key_name=facts.key,
            team=facts.team,
            user_digest=facts.user,
            route=facts.route,
            asked=facts.model,
            output_nusd=sum(nusd for _, nusd in parts),
        )
        return msgspec.structs.replace(made, exchange=exchange, attempts=attempts)

    def write(self, *bills: Bill) -> None:
        self.store.write([row for bill in bills for row in rows_of(bill)])

    async def write_soon(self, bill: Bill) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, self.write, bill)


def facts_of(rng: random.Random) -> Facts:
    return Facts(
        key=f"key{rng.randrange(5)}",
        team=rng.choice(("red", "blue", None)),
        user=rng.choice(("u1", "u2", None)),
        route="auto",
        model="auto",
    )


class Replica:
    """A limiter, its admission and its reseeder. `stop` is a death: nothing more is said by it."""

    def __init__(self, limiter: Limiter, books: Books, *, partition: PartitionBy, limits: tuple[Limit, ...]) -> None:
        self.limiter = limiter
        self.admission = Admission(limiter, limits, partition=partition, metrics=Metrics())
        self.reseeder = Reseeder(limiter, self.admission, books.store, now_ms=now_ms, settings=QUICK)
        self._books = books
        self.dead = False

    async def exchange(self, rng: random.Random, *, settle: bool = True, hold_s: float = 0.0) -> Bill | None:
        """Play one exchange: two attempts, a bill that is written, and a settlement."""
        facts = facts_of(rng)
        costs = (("small", rng.randrange(1000)), ("large", rng.randrange(5000)))
        settled_ms = now_ms()
        bill = self._books.bill(facts, costs, settled_ms)
        id_ = bill.exchange.exchange_id + rng.choice(("", "", "/counted"))
        reservation = await self._admitted(id_, facts, 3000)
        if reservation is None:
            return None
        for attempt in bill.attempts:
            tier_facts = msgspec.structs.replace(facts, tier=attempt.tier)
            entered = await self._admitted(f"{bill.exchange.exchange_id}/{attempt.number}", tier_facts, 3000)
            await asyncio.sleep(rng.random() * 0.01)
            if entered is not None:
                entered.settle(_use(attempt.output_nusd))
        await asyncio.sleep(hold_s)
        settled_ms = now_ms()
        bill = msgspec.structs.replace(bill, exchange=msgspec.structs.replace(bill.exchange, settled_ms=settled_ms))
        await self._books.write_soon(bill)
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.02)
        if settle and not self.dead:
            reservation.settle(_use(bill.exchange.output_nusd), settled_ms)
        return bill

    async def _admitted(self, id_: str, facts: Facts, most: int) -> Reservation | None:
        need = Need(estimate=Amounts(spend_nusd=most))
        caller = Caller(key=facts.key, team=facts.team)
        try:
            return await self.admission.admit(
                Request(id=id_, caller=caller, facts=facts, need=need, so_far=lambda: _use(0))
            )
        except Refusal:
            return None


def _use(nusd: int) -> Use:
    amounts = Amounts(spend_nusd=nusd)
    return Use(shown=amounts, of_all=amounts)


@asynccontextmanager
async def replica(
    server: RedisServer,
    books: Books,
    *,
    partition: PartitionBy = "deployment",
    limits: tuple[Limit, ...] = LIMITS,
    port: int | None = None,
) -> AsyncIterator[Replica]:
    place = place_of(server, timeout_s=0.2)
    store = RedisStore(place if port is None else msgspec.structs.replace(place, addresses=(("127.0.0.1", port),)))
    shared = Shared(replica=replica_name(), lease_s=1.0, beat_every_s=0.05, alive_for_s=5.0, ledger=True)
    limiter = SharedLimiter(store, shared)
    await limiter.open()
    one = Replica(limiter, books, partition=partition, limits=limits)
    await one.reseeder.at_start()
    one.reseeder.start()
    try:
        yield one
    finally:
        await one.reseeder.close()
        await limiter.close()
        await store.close()


async def differences(one: Replica, store: Store) -> list[str]:
    """What budgets that ought to equal the ledger have too much or too little."""
    expected: dict[str, int] = defaultdict(int)
    accounts = {}
    with store.reading() as reading:
        for amount in Spending(one.admission).totals(reading, now_ms=now_ms(), before_ms=1 << 52):
            expected[amount.account.name] += amount.nusd
            accounts[amount.account.name] = (amount.partition, amount.account)
    found = []
    for name, (partition, account) in accounts.items():
        (standing,) = await one.limiter.look(partition, (Item(account.entry(Need.nothing(), now_ms()), "open"),))
        if (standing.used, standing.reserved) != (expected[name], 0):
            found.append(f"{name}: {standing}, the ledger has {expected[name]}")
    return found


async def equal(one: Replica, store: Store) -> None:
    async def so() -> bool:
        return not await differences(one, store)

    try:
        await until(so, 8)
    except TimeoutError:
        raise AssertionError(await differences(one, store)) from None


class Machine:
    """A server that can be killed and started again on the same port, in the same folder."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.server = stack.enter_context(running_redis(folder=folder))

    def restart(self) -> None:
        self._stack.enter_context(running_redis(self.server.port, password=self.server.password, folder=self._folder))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(stack, tmp_path)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    books = Books(tmp_path)
    yield books
    books.store.close()


@pytest.mark.parametrize(("partition", "old_copy"), [("deployment", False), ("deployment", True), ("team", False)])
def test_eight_replicas_seed_a_store_that_was_restarted_under_load_and_spend_is_exact(
    machine: Machine, books: Books, *, old_copy: bool, partition: PartitionBy
) -> None:
    limits = LIMITS if partition == "deployment" else WITHIN_TEAMS

    async def scene() -> None:
        rng = random.Random(1)
        stopped = False
        done = 0

        async def client(one: Replica, seed: int) -> None:
            nonlocal done
            mine = random.Random(seed)
            while not stopped:
                done += await one.exchange(mine) is not None
                await asyncio.sleep(mine.random() * 0.1)

        # What was spent before anybody was here: long before, today, and yesterday.
        books.write(
            *(
                books.bill(facts_of(rng), (("small", 500), ("large", 700)), now_ms() - ago_ms)
                for ago_ms in (0, 1000, 3_600_000, 20 * 3_600_000, 30 * 3_600_000, 40 * DAY_MS)
            )
        )
        async with AsyncExitStack() as stack:
            replicas = [
                await stack.enter_async_context(replica(machine.server, books, partition=partition, limits=limits))
                for _ in range(8)
            ]
            clients = [asyncio.ensure_future(client(one, seed)) for seed, one in enumerate(replicas * 2)]
            await until(lambda: done > 50)
            if old_copy:
                await asyncio.to_thread(say, machine.server, "SAVE")
                # A copy that is less than two seconds old is taken for good.
                await asyncio.sleep(2.5)
            kill(machine.server)
            await until(lambda: any(one.limiter.state == "down" for one in replicas))
            at_loss = done
            await until(lambda: done > at_loss + 30)
            machine.restart()
            await until(lambda: all(one.limiter.state == "shared" for one in replicas))
            at_return = done
            await until(lambda: done > at_return + 60)
            assert sum(one.reseeder.seeded for one in replicas) > 0
            stopped = True
            await asyncio.gather(*clients)
            await equal(replicas[0], books.store)
            # The ledger is read again, and nothing comes twice.
            await asyncio.sleep(1.0)
            assert await differences(replicas[0], books.store) == []
            assert not [
                one for one in replicas if isinstance(one.limiter, SharedLimiter) and one.limiter.numbers.dropped
            ]

    asyncio.run(scene())


FACTS = Facts(key="alice", team="red", user="u1", route="auto", model="auto")


def test_a_single_process_knows_after_a_restart_what_it_has_spent(books: Books) -> None:
    async def scene() -> None:
        for ago_ms in (0, 3_600_000, 30 * 3_600_000, 40 * DAY_MS):
            books.write(books.bill(FACTS, (("small", 500), ("large", 700)), now_ms() - ago_ms))
        lost = books.bill(FACTS, (("small", 50), ("large", 70)), now_ms())
        books.write(lost)
        one = Replica(MemoryLimiter(), books, partition="deployment", limits=LIMITS)
        one.reseeder.on_lost(lost)
        await one.reseeder.at_start()
        one.reseeder.start()
        assert await differences(one, books.store) == []
        (total,) = await one.limiter.look("deployment", (_total(),))
        assert total.used == 4920
        # What is found out later counts once.
        later = books.bill(FACTS, (("small", 1), ("large", 2)), now_ms())
        books.write(later)
        for _ in range(2):
            one.reseeder.on_lost(later)
        await equal(one, books.store)
        await one.reseeder.close()

    asyncio.run(scene())


def _total() -> Item:
    return Item(Entry("all/spend:total/", Budget(LARGE)), "open")


def test_without_its_ledger_a_store_stays_unseeded_until_it_is_back(machine: Machine, books: Books) -> None:
    async def scene() -> None:
        books.write(books.bill(FACTS, (("small", 500), ("large", 700)), now_ms()))
        away = books.store.path.rename(books.store.path.with_name("away"))
        async with replica(machine.server, books) as one:
            await until(lambda: one.reseeder.failed > 1)
            assert one.limiter.state == "unseeded"
            away.rename(books.store.path)
            await until(lambda: one.limiter.state == "shared")
            assert await differences(one, books.store) == []

    asyncio.run(scene())


def test_all_replicas_and_the_store_may_be_gone_at_the_same_time(machine: Machine, books: Books) -> None:
    async def scene() -> None:
        rng = random.Random(2)
        async with replica(machine.server, books) as one:
            for _ in range(5):
                await one.exchange(rng)
            await equal(one, books.store)
        await asyncio.to_thread(say, machine.server, "FLUSHALL")
        async with replica(machine.server, books) as one:
            assert one.limiter.state == "shared"
            assert await differences(one, books.store) == []

    asyncio.run(scene())


def test_who_dies_between_its_bill_and_its_settlement_is_settled_by_others(machine: Machine, books: Books) -> None:
    async def scene() -> None:
        rng = random.Random(3)
        async with replica(machine.server, books) as one, replica(machine.server, books) as other:
            since_ms = now_ms()
            bill = await one.exchange(rng, settle=False)
            assert bill is not None
            await one.reseeder.close()
            for partition in one.limiter._partitions.values():  # type: ignore[attr-defined]
                partition.stop()
                partition._held.clear()
            # Its lease runs out at what was renewed last: nothing.
            await until(lambda: _is_off(other, books.store))
            books.store.write([InstanceRow(instance=bill.exchange.instance, heard_ms=since_ms)])
            await equal(other, books.store)

    async def _is_off(one: Replica, store: Store) -> bool:
        found = await differences(one, store)
        return bool(found) and "reserved=0" in found[0]

    asyncio.run(scene())


def test_an_exchange_that_is_billed_as_lost_counts_once(machine: Machine, books: Books) -> None:
    async def scene() -> None:
        rng = random.Random(4)
        async with replica(machine.server, books) as one:
            lost = books.bill(FACTS, (("small", 500), ("large", 700)), now_ms())
            books.write(lost)
            for _ in range(2):
                one.reseeder.on_lost(lost)
            await one.exchange(rng)
            await equal(one, books.store)

    asyncio.run(scene())


def test_what_a_closed_hour_changes_counts_where_its_bill_did(machine: Machine, books: Books) -> None:
    async def scene() -> None:
        hour = now_ms() // 3_600_000 - 1
        bills = [
            books.bill(FACTS, (("small", 500), ("large", 700)), now_ms() - ago_ms)
            for ago_ms in (0, 5 * 60_000, 30 * 3_600_000)
        ]
        books.write(*bills)
        async with replica(machine.server, books) as one:
            assert await differences(one, books.store) == []
            changes = tuple(
                AdjustmentRow(
                    exchange_id=bill.exchange.exchange_id,
                    number=number,
                    hour=hour,
                    revision=1,
                    backend="gpu",
                    share_nusd=0,
                    change_nusd=change,
                    at_ms=bill.exchange.at_ms,
                    key_name="alice",
                    team="red",
                    route="auto",
                    tier="large",
                    shown=1,
                )
                for bill, number, change in zip(bills * 2, (1, 1, 1, 2, 2, 2), (-100, 40, -3, 9, -500, 70), strict=True)
            )
            closing = ClosingRow(
                backend="gpu",
                hour=hour,
                revision=1,
                tier="large",
                at_ms=now_ms(),
                hour_nusd=0,
                shares_nusd=0,
                idle_nusd=0,
                outside_nusd=0,
                busy_ms=0,
                attempts=6,
                price_version="",
                instance="here",
                provisional_nusd=484,
                decode_weight=1,
                made_from="",
            )
            books.store.write([closing])
            for lot in (changes[:2], changes[2:]):
                books.store.write(lot)
                one.reseeder.on_closed(lot)
                await asyncio.sleep(0.1)
            one.reseeder.on_closed(changes)
            await equal(one, books.store)
            (total,) = await one.limiter.look("deployment", (_total(),))
            assert total.used == 3 * 1200 - 100 + 40 - 3 + 9 - 500 + 70
            # And a store that has lost it all is told the same.
            await asyncio.to_thread(say, machine.server, "FLUSHALL")
            await until(lambda: one.reseeder.seeded > 1)
            assert await differences(one, books.store) == []

    asyncio.run(scene())


def test_who_comes_back_late_tells_nothing_twice(machine: Machine, books: Books) -> None:
    """One replica is cut off when the store loses its data, and what it did meanwhile is in the ledger already."""

    async def scene() -> None:
        rng = random.Random(5)
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(replica(machine.server, books))
            late = await stack.enter_async_context(replica(machine.server, books, port=relay.port))
            begun = [asyncio.ensure_future(late.exchange(rng, hold_s=0.5)) for _ in range(20)]
            await asyncio.sleep(0.2)
            relay.delay_s = 30.0
            # Reserved before, settled while nobody hears of it; and reserved and settled without the store.
            await asyncio.gather(*begun)
            await until(lambda: late.limiter.state == "down")
            assert [await late.exchange(rng) for _ in range(20)].count(None) < 20
            await asyncio.to_thread(say, machine.server, "FLUSHALL")
            await until(lambda: one.reseeder.seeded > 1 and one.limiter.state == "shared")
            assert await differences(one, books.store) == []
            relay.delay_s = 0.0
            await until(lambda: late.limiter.state == "shared")
            await asyncio.sleep(0.2)
            assert await differences(late, books.store) == []

    with relay_to(machine.server.port) as relay:
        asyncio.run(scene())
