"""Is a bill durable when its exchange goes on, and what happens where it cannot be?"""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from gateway.ledger.contract import BadRows, LedgerDown
from gateway.ledger.journal import Journal
from gateway.ledger.rows import Bill, DeliveryRow, ExchangeRow, InstanceRow, OpenRow, RefusalRow
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import AT_MS, bill_of, billed, id_of, left_open
from tests.gateway.ledger.stores import Clock, Scripted, Told, until

ROOT = Path(__file__).parents[3]
Unwritable = Literal["refuse", "serve"]
both = pytest.mark.parametrize("policy", ["refuse", "serve"])


class Scene:
    """A journal over a scripted store, with clocks that are moved by hand."""

    def __init__(
        self,
        policy: Unwritable = "refuse",
        *,
        patience_s: float = 20.0,
        most_kept_rows: int = 1000,
        commit_within_s: float = 0.005,
    ) -> None:
        self.store = Scripted()
        self.now = Clock(AT_MS / 1000)
        self.monotonic = Clock()
        self.journal = Journal(
            self.store,
            instance="here",
            when_unwritable=policy,
            patience_s=patience_s,
            most_kept_rows=most_kept_rows,
            commit_within_s=commit_within_s,
            now=self.now,
            monotonic=self.monotonic,
        )

    def begin(self, number: int) -> Told:
        told = Told(bill_of(number, lost=True, output=10))
        self.journal.begin(id_of(number), told)
        return told

    async def passes(self, seconds: float) -> None:
        """Let time pass, and what is due be written."""
        self.monotonic.at_s += seconds
        self.now.at_s += seconds
        self.journal.tick()
        await until(lambda: self.journal.numbers()["tierway_ledger_waiting"][()] == 0)

    def gauge(self, name: str) -> float:
        return self.journal.numbers()[f"tierway_ledger_{name}"][()]

    def snapshots(self) -> list[OpenRow]:
        return [row for row in self.store.rows if isinstance(row, OpenRow)]

    def costs_told(self) -> list[int]:
        return [msgspec.json.decode(row.bill, type=Bill).cost_nusd for row in self.snapshots()]

    def impatient(self) -> None:
        """Let everybody have waited for too long."""
        self.journal._committer._patience_s = 0.0

    async def hold(self) -> asyncio.Task[None]:
        """Have a write on its way, and the next ones wait."""
        self.store.gate.clear()
        while self.store.entered.acquire(blocking=False):
            pass
        first = asyncio.create_task(self.journal.write(bill_of(0)))
        await until(lambda: self.store.entered.acquire(blocking=False))
        return first


def play(scene: Scene, acts: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        await scene.journal.open()
        try:
            await acts(scene)
        finally:
            scene.store.gate.set()
            scene.store.down = False
            await scene.journal.close()
        assert scene.store.closed

    asyncio.run(run())


# -- while the store is well ------------------------------------------------------------------------------------------


def test_who_comes_while_a_commit_is_on_its_way_shares_the_next() -> None:
    async def acts(scene: Scene) -> None:
        first = await scene.hold()
        others = [asyncio.create_task(scene.journal.write(bill_of(number))) for number in range(1, 50)]
        await asyncio.sleep(0)
        assert not any(one.done() for one in (first, *others))
        before = len(scene.store.batches)
        scene.store.gate.set()
        await asyncio.gather(first, *others)
        assert len(scene.store.batches) == before + 2
        assert Counter(scene.store.billed) == Counter(id_of(number) for number in range(50))

    play(Scene(), acts)


def test_nobody_waits_for_company_that_will_not_come() -> None:
    async def acts(scene: Scene) -> None:
        for number in range(20):
            scene.begin(number)
            await scene.journal.write(bill_of(number))
        assert len(scene.store.billed) == 20

    play(Scene(commit_within_s=3600.0), acts)


def test_where_company_is_likely_it_is_waited_for_a_little() -> None:
    async def acts(scene: Scene) -> None:
        scene.journal._committer._interval_s = 0.0001
        for number in range(3):
            scene.begin(number)
        before = len(scene.store.batches)
        first = asyncio.create_task(scene.journal.write(bill_of(0)))
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.gather(first, scene.journal.write(bill_of(1)))
        assert len(scene.store.batches) == before + 1

    play(Scene(commit_within_s=0.05), acts)


def test_a_price_is_written_once() -> None:
    async def acts(scene: Scene) -> None:
        for number in range(3):
            await scene.journal.write(bill_of(number, inputs=True))
        assert [len(rows) for rows, _ in scene.store.batches[1:]] == [4, 3, 3]

    play(Scene(), acts)


def test_a_write_that_nobody_waits_for_any_more_is_done() -> None:
    async def acts(scene: Scene) -> None:
        first = await scene.hold()
        second = asyncio.create_task(scene.journal.write(bill_of(1)))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        scene.store.gate.set()
        await until(lambda: len(scene.store.billed) == 2)

    play(Scene(), acts)


def test_how_an_answer_was_delivered_is_written_later() -> None:
    async def acts(scene: Scene) -> None:
        await scene.passes(0)
        scene.journal.deliver(DeliveryRow(exchange_id=id_of(1), delivered=1, total_us=7))
        scene.journal.deliver(DeliveryRow(exchange_id=id_of(2), delivered=0, total_us=7))
        assert scene.gauge("waiting") == 2
        await scene.passes(1.1)
        assert [len(rows) for rows, _ in scene.store.batches if isinstance(rows[0], DeliveryRow)] == [2]

    play(Scene(), acts)


def test_refusals_are_counted_by_hour() -> None:
    async def acts(scene: Scene) -> None:
        await scene.passes(0)
        for key, code in [("", "invalid_api_key")] * 3 + [("k", "rate_limit_exceeded")]:
            scene.journal.refuse(key, code)
        await scene.passes(11)
        scene.journal.refuse("", "invalid_api_key")
        scene.now.at_s += 3600
        scene.journal.refuse("", "invalid_api_key")
        scene.now.at_s -= 3600
        await scene.passes(11)

        hour = AT_MS // 3_600_000
        told = [
            (row.hour - hour, row.key_name, row.requests) for row in scene.store.rows if isinstance(row, RefusalRow)
        ]
        assert told == [(0, "", 3), (0, "k", 1), (0, "", 4), (1, "", 1)]

    play(Scene(), acts)


def test_each_heartbeat_is_new_even_where_the_clock_goes_back() -> None:
    async def acts(scene: Scene) -> None:
        for _ in range(3):
            scene.now.at_s -= 500
            await scene.passes(8)
        heard = [row.heard_ms for row in scene.store.rows if isinstance(row, InstanceRow)]
        assert len(heard) == 4
        assert heard == sorted(set(heard))

    play(Scene(), acts)


# -- exchanges under way ----------------------------------------------------------------------------------------------


def test_an_exchange_that_ends_soon_leaves_no_trace() -> None:
    async def acts(scene: Scene) -> None:
        told = scene.begin(1)
        scene.begin(2)
        scene.begin(3)
        await scene.passes(0.01)
        await scene.journal.write(bill_of(1))
        scene.journal.write_later(bill_of(2))
        scene.journal.forget(id_of(3))
        await scene.passes(1)
        assert (told.asked, scene.snapshots(), scene.store.closings) == (0, [], [])

    play(Scene(), acts)


def test_many_exchanges_under_way_are_told_of_less_often() -> None:
    async def acts(scene: Scene) -> None:
        all_told = [scene.begin(number) for number in range(1, 401)]
        for _ in range(5):
            await scene.passes(0.1)
        asked = sum(told.asked for told in all_told)
        assert asked == 400
        await scene.passes(0.3)
        assert sum(told.asked for told in all_told) == 400

    play(Scene(), acts)


def test_an_exchange_under_way_is_told_of_when_it_has_something_new_to_tell() -> None:
    async def acts(scene: Scene) -> None:
        told = scene.begin(1)
        await scene.passes(0.1)
        assert scene.costs_told() == [10]
        told.bill = bill_of(1, lost=True, output=25)
        await scene.passes(0.1)
        assert scene.costs_told() == [10]
        scene.now.at_s -= 100
        await scene.passes(0.2)
        await scene.passes(0.3)
        assert scene.costs_told() == [10, 25]
        assert told.asked == 3
        stamps = [row.seen_ms for row in scene.snapshots()]
        assert stamps == sorted(set(stamps))
        await scene.journal.write(bill_of(1))
        assert scene.store.batches[-1][1] == [id_of(1)]
        await scene.passes(2)
        assert told.asked == 3

    play(Scene(), acts)


def test_while_its_bill_is_written_an_exchange_is_told_of_no_more() -> None:
    async def acts(scene: Scene) -> None:
        told = scene.begin(1)
        await scene.passes(0.1)
        first = await scene.hold()
        second = asyncio.create_task(scene.journal.write(bill_of(1)))
        await asyncio.sleep(0)
        scene.monotonic.at_s += 2
        scene.journal.tick()
        scene.store.gate.set()
        await asyncio.gather(first, second)
        assert told.asked == 1

    play(Scene(), acts)


@pytest.mark.parametrize("way", ["later", "forget"])
def test_however_it_ends_its_open_row_goes(way: str) -> None:
    async def acts(scene: Scene) -> None:
        scene.begin(1)
        await scene.passes(0.1)
        if way == "later":
            scene.journal.write_later(bill_of(1))
        else:
            scene.journal.forget(id_of(1))
        await scene.passes(0)
        assert scene.store.closings == [id_of(1)]
        assert scene.store.billed == ([id_of(1)] if way == "later" else [])

    play(Scene(), acts)


def test_an_exchange_that_cannot_tell_is_no_trouble_to_others(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Bill:
        raise RuntimeError("no idea")

    async def acts(scene: Scene) -> None:
        scene.journal.begin(id_of(1), fails)
        scene.begin(2)
        await scene.passes(0.1)
        assert [row.exchange_id for row in scene.snapshots()] == [id_of(2)]

    scene = Scene()
    play(scene, acts)
    assert scene.store.billed == [id_of(2)]
    assert id_of(1) in caplog.text


def test_many_exchanges_take_turns() -> None:
    async def acts(scene: Scene) -> None:
        for number in range(250):
            scene.begin(number)
        for told in (100, 200, 250, 250):
            await scene.passes(0.06)
            assert len(scene.snapshots()) == told

    play(Scene(), acts)


# -- while it is not --------------------------------------------------------------------------------------------------


def test_refuse_tells_who_waits_and_takes_no_more_until_it_is_well(caplog: pytest.LogCaptureFixture) -> None:
    async def acts(scene: Scene) -> None:
        assert scene.journal.accepting
        scene.begin(1)
        await scene.passes(0.1)
        scene.store.down = True
        for number in (1, 2):
            with pytest.raises(LedgerDown, match="disk is full"):
                await scene.journal.write(bill_of(number))
        assert not scene.journal.accepting
        assert scene.gauge("unwritable") == 1
        scene.journal.write_later(bill_of(1, output=50))
        scene.store.down = False
        await until(lambda: scene.journal.accepting)
        await until(lambda: scene.store.billed == [id_of(1)])
        assert scene.store.closings == [id_of(1)]
        assert scene.gauge("unwritable") == 0

    play(Scene(), acts)
    assert [one.levelname for one in caplog.records] == ["ERROR", "WARNING"]


def test_refuse_finds_out_by_itself_that_it_is_well_again() -> None:
    async def acts(scene: Scene) -> None:
        scene.store.down = True
        with pytest.raises(LedgerDown):
            await scene.journal.write(bill_of(1))
        tries = scene.store.tries
        await until(lambda: scene.store.tries > tries + 1)
        assert not scene.journal.accepting
        scene.store.down = False
        await until(lambda: scene.journal.accepting)
        assert scene.store.billed == []

    play(Scene(), acts)


def test_serve_keeps_rows_and_writes_them_when_it_can(caplog: pytest.LogCaptureFixture) -> None:
    async def acts(scene: Scene) -> None:
        scene.begin(1)
        await scene.passes(0.1)
        scene.store.down = True
        for number in (1, 2, 3):
            await scene.journal.write(bill_of(number))
        assert scene.journal.accepting
        assert (scene.gauge("unwritable"), scene.gauge("waiting")) == (1, 10)
        with pytest.raises(LedgerDown):
            await scene.journal.append([InstanceRow(instance="x", heard_ms=1)])
        scene.store.down = False
        await until(lambda: scene.gauge("unwritable") == scene.gauge("waiting") == 0)
        assert Counter(scene.store.billed) == Counter(id_of(number) for number in (1, 2, 3))
        assert scene.store.closings == [id_of(1)]
        assert scene.gauge("dropped_total") == 0

    play(Scene("serve"), acts)
    assert [one.levelname for one in caplog.records] == ["ERROR", "WARNING"]


def test_what_is_kept_is_bounded_and_the_oldest_are_dropped_aloud(caplog: pytest.LogCaptureFixture) -> None:
    async def acts(scene: Scene) -> None:
        scene.store.down = True
        for number in range(12):
            await scene.journal.write(bill_of(number))
        assert scene.gauge("dropped_total") == 6
        committer = scene.journal._committer
        for tries in (scene.store.tries, scene.store.tries + 1):
            await until(partial(lambda before: scene.store.tries > before and not committer._batch, tries))
            kept = [row.exchange_id for one in committer._kept for row in one.rows if isinstance(row, ExchangeRow)]
            assert kept == [id_of(number) for number in range(2, 12)]
        for number in range(12, 15):
            await scene.journal.write(bill_of(number))
        scene.store.down = False
        await until(lambda: len(scene.store.billed) >= 10)
        assert set(scene.store.billed) == {id_of(number) for number in range(5, 15)}
        assert scene.gauge("dropped_total") == 15

    play(Scene("serve", most_kept_rows=30), acts)
    assert sum("oldest are lost" in one.message for one in caplog.records) == 1


def test_an_open_exchange_is_told_again_after_a_failure() -> None:
    async def acts(scene: Scene) -> None:
        scene.begin(1)
        scene.store.down = True
        scene.monotonic.at_s += 0.1
        scene.journal.tick()
        await until(lambda: not scene.journal.accepting)
        scene.store.down = False
        await until(lambda: scene.journal.accepting)
        await scene.passes(1.1)
        assert [row.exchange_id for row in scene.snapshots()] == [id_of(1)]

    play(Scene(), acts)


def test_refuse_waits_for_a_store_that_hangs_only_so_long() -> None:
    async def acts(scene: Scene) -> None:
        first = await scene.hold()
        with pytest.raises(LedgerDown, match="did not answer"):
            await scene.journal.write(bill_of(1))
        with pytest.raises(LedgerDown, match="did not answer"):
            await first
        assert not scene.journal.accepting
        assert scene.journal._ticking is not None
        scene.journal._ticking.cancel()
        with pytest.raises(LedgerDown, match="did not answer"):
            await asyncio.wait_for(scene.journal.write(bill_of(2)), 10)
        scene.journal.write_later(bill_of(3))
        assert scene.store.tries == 2
        scene.store.gate.set()
        await until(lambda: len(scene.store.billed) == 2)
        # The one that was on its way came through, those that were told no did not.
        assert scene.store.billed == [id_of(0), id_of(3)]
        assert scene.journal.accepting

    play(Scene(patience_s=0.01), acts)


def test_who_gave_up_waiting_for_a_store_that_hangs_is_written_all_the_same() -> None:
    async def acts(scene: Scene) -> None:
        first = await scene.hold()
        second = asyncio.create_task(scene.journal.write(bill_of(1)))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        scene.impatient()
        with pytest.raises(LedgerDown):
            await first
        scene.store.gate.set()
        await until(lambda: len(scene.store.billed) == 2)

    play(Scene(), acts)


def test_serve_waits_for_a_store_that_hangs_only_so_long_and_loses_nothing() -> None:
    async def acts(scene: Scene) -> None:
        first = await scene.hold()
        scene.impatient()
        assert not scene.journal._committer.down
        await scene.journal.write(bill_of(1))
        await first
        await scene.journal.write(bill_of(2))
        assert scene.gauge("unwritable") == 1
        scene.store.gate.set()
        await until(lambda: scene.gauge("waiting") == 0)
        assert Counter(scene.store.billed) == Counter(id_of(number) for number in range(3))

    play(Scene("serve"), acts)


@both
def test_who_cannot_be_written_spoils_nobody_elses_rows(policy: Unwritable, caplog: pytest.LogCaptureFixture) -> None:
    async def acts(scene: Scene) -> None:
        scene.store.spoils = id_of(2)
        first = await scene.hold()
        others = [asyncio.create_task(scene.journal.write(bill_of(number))) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        scene.store.gate.set()
        got = await asyncio.gather(first, *others, return_exceptions=True)
        assert [isinstance(one, BadRows) for one in got] == [False, False, policy == "refuse", False]
        assert scene.journal.accepting
        assert Counter(scene.store.billed) == Counter(id_of(number) for number in (0, 1, 3))
        assert scene.gauge("dropped_total") == 3

    play(Scene(policy), acts)
    assert id_of(2) in caplog.text


# -- the end ----------------------------------------------------------------------------------------------------------


def test_at_the_end_everything_is_written_and_nothing_stays_open() -> None:
    async def acts(scene: Scene) -> None:
        scene.begin(1)
        scene.begin(2)
        await scene.passes(0.1)
        scene.begin(3)
        scene.journal.write_later(bill_of(1))
        scene.journal.deliver(DeliveryRow(exchange_id=id_of(1), delivered=1, total_us=7))
        scene.journal.refuse("", "invalid_api_key")

    scene = Scene()
    play(scene, acts)
    assert Counter(scene.store.billed) == Counter(id_of(number) for number in (1, 2, 3))
    assert set(scene.store.closings) == {id_of(1), id_of(2)}
    assert {type(row) for row in scene.store.rows} >= {DeliveryRow, RefusalRow}


def test_the_end_does_not_wait_for_a_store_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene("serve")

    async def run() -> None:
        await scene.journal.open()
        first = await scene.hold()
        await scene.journal.close(0.01)
        assert "3 rows unwritten" in caplog.text
        scene.store.gate.set()
        await first
        await until(lambda: scene.store.closed)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())


# -- over a file ------------------------------------------------------------------------------------------------------

_SERVING = """
    import asyncio, sys
    from pathlib import Path
    from gateway.ledger.journal import Journal
    from gateway.ledger.sqlite import SqliteStore
    from tests.gateway.ledger.bills import bill_of, id_of
    async def client(journal, numbers):
        for number in numbers:
            journal.begin(id_of(number), lambda number=number: bill_of(number, lost=True))
            await asyncio.sleep(0)
            await journal.write(bill_of(number))
            print(number, flush=True)
    async def main():
        journal = Journal(SqliteStore(Path(sys.argv[1])), instance="here" + sys.argv[2])
        await journal.open()
        numbers = iter(range(int(sys.argv[2]), int(sys.argv[2]) + 100_000))
        await asyncio.gather(*(client(journal, numbers) for _ in range(16)))
    asyncio.run(main())
"""


def test_what_was_written_before_a_kill_is_there_exactly_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    told: set[str] = set()
    for cycle in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_SERVING), path, str(cycle * 100_000)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as one:
            assert one.stdout is not None
            lines = [one.stdout.readline() for _ in range(100 + 50 * cycle)]
            one.send_signal(signal.SIGKILL)
            lines += one.stdout.readlines()
        told |= {id_of(int(line)) for line in lines if line.endswith("\n")}
    store = SqliteStore(path)
    found = billed(store)
    assert told <= set(found)
    assert len(told) >= 450
    assert set(found.values()) == {("answered", 90)}
    assert not left_open(store) & set(found)
    with store.reading() as reading:
        assert list(reading.rows("SELECT COUNT(*) FROM attempts")) == [(len(found),)]
