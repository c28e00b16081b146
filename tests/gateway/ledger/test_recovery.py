"""Is what dead processes left open billed once, and what living ones have open left alone?"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import msgspec
import pytest

from gateway.ledger.alive import Alive, Heartbeats, HeldFiles
from gateway.ledger.contract import LedgerDown
from gateway.ledger.journal import Journal
from gateway.ledger.recovery import Recovery
from gateway.ledger.rows import AnyRow, Bill, InstanceRow
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import bill_of, billed, id_of, left_open, open_row, rows_of
from tests.gateway.ledger.stores import Clock

ROOT = Path(__file__).parents[3]
LOST = ("lost", 40)


class Dead:
    """Says that certain processes are dead."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def open(self) -> None:
        pass

    def dead(self, heard: Mapping[str, int | None]) -> frozenset[str]:
        return self.names & frozenset(heard)

    def close(self) -> None:
        pass


class Replica:
    """A process with a ledger, without the process."""

    def __init__(self, path: Path, name: str, alive: Alive | None = None) -> None:
        self.store = SqliteStore(path)
        self.lost: list[Bill] = []
        self.journal = Journal(self.store, instance=name)
        self.recovery = Recovery(
            self.journal,
            self.store,
            Dead("dead") if alive is None else alive,
            lease_s=1000.0,
            on_lost=self.lost.append,
        )

    async def __aenter__(self) -> Self:
        await self.journal.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.journal.close()
        await self.recovery.close()


def play(path: Path, acts: Callable[[Replica], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Replica(path, "here") as replica:
            await acts(replica)

    asyncio.run(run())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def store(path: Path) -> SqliteStore:
    one = SqliteStore(path)
    one.open()
    return one


def test_what_the_dead_left_open_is_billed_and_what_the_living_have_is_not(store: SqliteStore, path: Path) -> None:
    store.write([open_row(1), open_row(2), open_row(3, instance="living"), open_row(4, instance="here")])

    async def acts(here: Replica) -> None:
        await here.recovery.open()
        assert billed(store) == {id_of(1): LOST, id_of(2): LOST}
        assert left_open(store) == {id_of(3), id_of(4)}
        assert {bill.exchange.exchange_id for bill in here.lost} == {id_of(1), id_of(2)}
        assert await here.recovery.once() == 0

    play(path, acts)
    with store.reading() as reading:
        assert list(reading.rows("SELECT COUNT(*), MIN(estimated) FROM attempts")) == [(2, 1)]


def test_an_open_row_of_what_was_billed_is_only_removed(store: SqliteStore, path: Path) -> None:
    store.write([*rows_of(bill_of(1)), open_row(1), *rows_of(bill_of(2, lost=True, output=30)), open_row(2)])

    async def acts(here: Replica) -> None:
        assert await here.recovery.once() == 0
        assert billed(store) == {id_of(1): ("answered", 90), id_of(2): ("lost", 30)}
        assert (left_open(store), here.lost) == (set(), [])

    play(path, acts)


def test_of_many_who_find_it_one_bills_it(store: SqliteStore, path: Path) -> None:
    store.write([open_row(number) for number in range(300)])

    async def run() -> None:
        async with AsyncExitStack() as stack:
            replicas = [await stack.enter_async_context(Replica(path, f"replica-{one}")) for one in range(4)]
            await asyncio.gather(*(one.recovery.once() for one in replicas))
            await asyncio.gather(*(one.recovery.once() for one in replicas))
            lost = [bill.exchange.exchange_id for one in replicas for bill in one.lost]
            assert sorted(lost) == [id_of(number) for number in range(300)]

    asyncio.run(run())
    assert billed(store) == dict.fromkeys(map(id_of, range(300)), LOST)
    assert left_open(store) == set()


def test_one_that_was_taken_for_dead_bills_it_truly_in_the_end(store: SqliteStore, path: Path) -> None:
    async def run() -> None:
        async with Replica(path, "dead", Dead()) as paused, Replica(path, "here") as here:
            paused.journal.begin(id_of(1), lambda: bill_of(1, lost=True, output=40))
            store.write([open_row(1)])
            assert await here.recovery.once() == 1
            assert billed(store) == {id_of(1): LOST}
            await paused.journal.write(bill_of(1, attempts=2))
            assert billed(store) == {id_of(1): ("answered", 180)}
            assert await here.recovery.once() == 0

    asyncio.run(run())
    assert left_open(store) == set()


def test_who_dies_while_it_closes_for_others_is_closed_for(store: SqliteStore, path: Path) -> None:
    store.write([open_row(1)])

    async def run() -> None:
        async with Replica(path, "first") as first, Replica(path, "second", Dead("first")) as second:
            (found,) = first.recovery._find()
            await first.recovery._claim(found)
            assert await second.recovery.once() == 1
            assert (await first.recovery.once(), first.lost) == (0, [])

    asyncio.run(run())
    assert billed(store) == {id_of(1): LOST}


def test_what_failed_half_way_is_finished_the_next_time(store: SqliteStore, path: Path) -> None:
    store.write([open_row(1)])

    async def acts(here: Replica) -> None:
        (found,) = here.recovery._find()
        await here.recovery._claim(found)
        assert await here.recovery.once() == 1
        assert len(here.lost) == 1

    play(path, acts)
    assert billed(store) == {id_of(1): LOST}


def test_a_bill_that_cannot_be_read_stays_and_is_told_once(
    store: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.write([msgspec.structs.replace(open_row(1), bill='{"exchange":'), open_row(2)])

    async def acts(here: Replica) -> None:
        assert await here.recovery.once() == 1
        assert await here.recovery.once() == 0
        assert left_open(store) == {id_of(1)}

    play(path, acts)
    assert sum("cannot be read" in one.message for one in caplog.records) == 1


class Detour(SqliteStore):
    """A file that is written to later, as a database behind a spool."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waiting: list[tuple[Sequence[AnyRow], Sequence[str]]] = []

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        self.waiting.append((rows, closed))

    def bring_over(self, store: SqliteStore) -> None:
        waiting, self.waiting = self.waiting, []
        for rows, closed in waiting:
            store.write(rows, closed)


def test_a_claim_that_waits_in_a_spool_is_finished_when_it_has_arrived(store: SqliteStore, path: Path) -> None:
    store.write([open_row(1)])

    async def run() -> None:
        spooled, lost = Detour(path), list[Bill]()
        journal = Journal(spooled, instance="here")
        recovery = Recovery(
            journal, store, Dead("dead"), lease_s=1000.0, on_lost=lost.append, ready=lambda: not spooled.waiting
        )
        await journal.open()
        spooled.bring_over(store)
        assert await recovery.once() == 0
        assert await recovery.once() == 0
        spooled.bring_over(store)
        assert left_open(store) == {id_of(1)}
        assert await recovery.once() == 1
        await journal.close()
        spooled.bring_over(store)
        assert len(lost) == 1

    asyncio.run(run())
    assert billed(store) == {id_of(1): LOST}
    assert left_open(store) == set()


# -- who is dead ------------------------------------------------------------------------------------------------------


def test_a_process_lives_as_long_as_something_new_is_heard_of_it() -> None:
    clock = Clock()
    alive = Heartbeats(30.0, now=clock)
    assert alive.dead({"a": 5, "b": 7, "c": None}) == frozenset()
    clock.at_s += 20
    assert alive.dead({"a": 5, "b": 3, "c": None}) == frozenset()
    clock.at_s += 20
    # Whatever its own clock says: that of b has gone back.
    assert alive.dead({"a": 5, "b": 3, "c": None, "d": 1}) == {"a", "c"}
    clock.at_s += 10
    assert alive.dead({"b": 3, "d": 1}) == {"b"}


def test_heartbeats_keep_a_process_alive(store: SqliteStore, path: Path) -> None:
    clock = Clock()
    store.write([open_row(1, instance="other"), InstanceRow(instance="other", heard_ms=1)])

    async def run() -> None:
        async with Replica(path, "here", Heartbeats(30.0, now=clock)) as here:
            for heard_ms in (2, 3, 4, 5):
                assert await here.recovery.once() == 0
                clock.at_s += 15
                store.write([InstanceRow(instance="other", heard_ms=heard_ms)])
            for _ in range(2):
                assert await here.recovery.once() == 0
                clock.at_s += 15
            assert await here.recovery.once() == 1

    asyncio.run(run())


def test_who_could_not_look_for_long_gives_everyone_a_lease_again() -> None:
    clock = Clock()
    alive = Heartbeats(30.0, now=clock)
    assert alive.dead({"other": 1}) == frozenset()
    # The database was away: nobody could be heard, and nobody is dead for that.
    clock.at_s += 300
    assert alive.dead({"other": 1}) == frozenset()
    clock.at_s += 15
    assert alive.dead({"other": 1}) == frozenset()
    clock.at_s += 15
    assert alive.dead({"other": 1}) == {"other"}


def test_a_lock_shows_who_lives(path: Path) -> None:
    a, b = HeldFiles(path, "a"), HeldFiles(path, "b")
    a.open()
    b.open()
    assert b.dead({"a": 1, "b": 1, "never": None}) == {"never"}
    a.close()
    assert b.dead({"a": 1}) == {"a"}
    b.close()
    assert list(path.parent.iterdir()) == []


def test_two_processes_cannot_have_one_name(path: Path) -> None:
    one = HeldFiles(path, "a")
    one.open()
    with pytest.raises(LedgerDown, match="same name"):
        HeldFiles(path, "a").open()
    assert HeldFiles(path, "b").dead({"a": 1}) == frozenset()
    one.close()


_DYING = """
    import asyncio, sys
    from pathlib import Path
    from gateway.ledger.alive import HeldFiles
    from gateway.ledger.journal import Journal
    from gateway.ledger.sqlite import SqliteStore
    from tests.gateway.ledger.bills import bill_of, id_of, left_open
    async def main():
        path = Path(sys.argv[1])
        HeldFiles.open(alive := HeldFiles(path, "dying"))
        store = SqliteStore(path)
        journal = Journal(store, instance="dying")
        await journal.open()
        for number in range(8):
            journal.begin(id_of(number), lambda number=number: bill_of(number, lost=True, output=40))
        while len(left_open(store)) < 8:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(journal.write(bill_of(number)) for number in range(3)))
        print("ready", flush=True)
        await asyncio.sleep(60)
    asyncio.run(main())
"""


def test_what_a_killed_process_had_open_is_billed_at_the_next_start(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_DYING), path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"

        async def while_it_lives() -> None:
            async with Replica(path, "here", HeldFiles(path, "here")) as here:
                await here.recovery.open()
                assert here.lost == []

        asyncio.run(while_it_lives())
        one.send_signal(signal.SIGKILL)

    async def after() -> None:
        async with Replica(path, "next", HeldFiles(path, "next")) as here:
            await here.recovery.open()
            assert len(here.lost) == 5

    asyncio.run(after())
    store = SqliteStore(path)
    assert billed(store) == {id_of(n): ("answered", 90) if n < 3 else LOST for n in range(8)}
    assert left_open(store) == set()
    assert not list(path.parent.glob("*-alive-*"))
