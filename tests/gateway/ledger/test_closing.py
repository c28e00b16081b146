"""Does every hour of a server come to its price in the ledger, once, whoever closes it and whatever comes late?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest

from gateway.ledger.closing import Closer, ClosingSettings
from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.rows import AdjustmentRow, AnyRow, AttemptRow, ClosingRow, MeterRow, PriceRow
from gateway.ledger.server_hours import hour_rows
from gateway.ledger.sqlite import SqliteStore
from gateway.pricing import HourPrice
from policies.gpu import HOUR_MS
from tests.gateway.ledger.bills import bill_of
from tests.servers.postgres import PostgresServer

HOUR = 490_000
FROM_MS = HOUR * HOUR_MS
USD = 10**9
DEAD_MS = 10 * 60_000


def price_of(backend: str = "gpu-a", hour_nusd: int = 2 * USD, at_ms: int = FROM_MS) -> HourPrice:
    row = PriceRow(
        version=f"{backend}@{hour_nusd}",
        at_ms=at_ms,
        tier="large",
        backend=backend,
        kind="gpu",
        input_nusd=0,
        cached_input_nusd=0,
        output_nusd=0,
        hour_nusd=hour_nusd,
    )
    return HourPrice(tier="large", backend=backend, hour_nusd=hour_nusd, row=row)


def bill(number: int, from_s: float, until_s: float, *, gpu: int = 1000, **fields: Any) -> list[AnyRow]:
    """The rows of an exchange with one attempt; its times are seconds after the begin of the hour."""
    made = bill_of(number, output=0)
    started_ms = FROM_MS + round(1000 * from_s)
    exchange = msgspec.structs.replace(made.exchange, at_ms=started_ms, gpu_nusd=gpu, estimated=0)
    attempt = msgspec.structs.replace(
        made.attempts[0],
        backend="gpu-a",
        tier="large",
        started_ms=started_ms,
        ended_ms=FROM_MS + round(1000 * until_s),
        first_token_us=None,
        gpu_nusd=gpu,
        **{"prompt_tokens": 100, "completion_tokens": 10} | fields,
    )
    if attempt.estimated:
        exchange = msgspec.structs.replace(exchange, estimated=1)
    return [exchange, attempt]


def meter(from_s: int, until_s: int, *, watcher: str = "one", prompt: int = 0, completion: int = 0) -> MeterRow:
    return MeterRow(
        backend="gpu-a",
        hour=HOUR,
        instance=watcher,
        from_ms=FROM_MS + 1000 * from_s,
        until_ms=FROM_MS + 1000 * until_s,
        prompt_tokens=prompt,
        completion_tokens=completion,
        busy_ms=0,
        ready_ms=1000 * (until_s - from_s),
        restarts=0,
    )


class Books:
    """A ledger and those who close its hours; `now_s` counts from the begin of the hour."""

    def __init__(self, *stores: Store) -> None:
        self.stores = stores
        self.now_s = 0.0
        self.prices: dict[str, HourPrice] = {"gpu-a": price_of()}
        self.told: list[AdjustmentRow] = []

    def hours_of(self, _hour: int) -> Mapping[str, HourPrice]:
        return self.prices

    def closer(self, store: int = 0, **fields: Any) -> Closer:
        return Closer(
            self.stores[store],
            self.hours_of,
            instance=f"replica-{store}",
            settings=ClosingSettings(**{"grace_s": 60.0, "look_back_s": 24 * 3600.0} | fields),
            on_closed=self.told.extend,
            now_ms=lambda: FROM_MS + round(1000 * self.now_s),
            pause=lambda _s: None,
        )

    def look(self, closer: Closer, now_s: float) -> None:
        self.now_s = now_s

        async def once() -> None:
            await closer.look()
            await asyncio.sleep(0)

        asyncio.run(once())

    def write(self, *rows: AnyRow) -> None:
        self.stores[0].write(rows)

    def read(self, sql: str) -> list[tuple[Any, ...]]:
        with self.stores[0].reading() as reading:
            return list(reading.rows(sql))

    def closings(self, columns: str = "revision, shares_nusd, idle_nusd, outside_nusd") -> list[tuple[Any, ...]]:
        return self.read(f"SELECT {columns} FROM closings WHERE backend = 'gpu-a' AND hour = {HOUR} ORDER BY revision")

    def costs(self) -> dict[str, int]:
        """What each exchange costs, with all that was adjusted."""
        return dict(
            self.read(
                "SELECT a.exchange_id, a.gpu_nusd + COALESCE((SELECT SUM(change_nusd) FROM adjustments j "
                "WHERE j.exchange_id = a.exchange_id AND j.number = a.number), 0) FROM attempts a"
            )
        )

    def check(self) -> None:
        """Every hour is its price, and every attempt costs what its shares are."""
        for shares, idle, outside, hour_nusd in self.read(
            "SELECT shares_nusd, idle_nusd, outside_nusd, hour_nusd FROM closings"
        ):
            assert shares + idle + outside == hour_nusd
        (total,) = self.read(
            "SELECT SUM(c.shares_nusd) FROM closings c "
            "WHERE c.revision = (SELECT MAX(d.revision) FROM closings d WHERE d.backend = c.backend AND d.hour = c.hour)"
        )
        assert sum(self.costs().values()) == total[0]


@pytest.fixture(params=["sqlite", "postgres"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    if request.param == "sqlite":
        yield from _books(*(SqliteStore(tmp_path / "ledger.db") for _ in range(2)))
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        schema = f"closing_{abs(hash(tmp_path.name)) % 10**8}"
        yield from _books(*(PostgresStore(server.url, schema=schema, timeout_s=20.0) for _ in range(2)))


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Books]:
    """One of SQLite alone, where the database makes no difference."""
    yield from _books(*(SqliteStore(tmp_path / "ledger.db") for _ in range(2)))


def _books(*stores: Store) -> Iterator[Books]:
    for store in stores:
        store.write([])
    try:
        yield Books(*stores)
    finally:
        for store in stores:
            store.close()


def test_an_hour_is_closed_once_it_is_over_and_everyone_pays_a_share(books: Books) -> None:
    large = {"prompt_tokens": 1300, "cached_prompt_tokens": 1000, "completion_tokens": 30}
    books.write(price_of().row, *bill(1, 0, 36), *bill(2, 0, 36, **large))
    closer = books.closer()
    books.look(closer, 3659)
    assert books.closings() == []
    books.look(closer, 3660)
    # 36 s of 3,600 are a hundredth of two dollars, of which one did a quarter of the work.
    assert books.closings() == [(1, 20_000_000, 1_980_000_000, 0)]
    assert sorted(books.costs().values()) == [5_000_000, 15_000_000]
    assert [(row.share_nusd, row.change_nusd) for row in books.told] == [
        (5_000_000, 4_999_000),
        (15_000_000, 14_999_000),
    ]
    assert {(row.key_name, row.team, row.route, row.tier, row.shown) for row in books.told} == {
        ("key-1", "red", "auto", "large", 1)
    }
    books.check()
    books.look(closer, 3720)
    assert len(books.told) == 2, "what was told is not told again"


def test_what_was_not_ours_is_read_from_meters_and_watchers_count_once(books: Books) -> None:
    rows = [
        meter(at, at + 60, watcher=watcher, prompt=2 if at else 100) for at in range(0, 3600, 60) for watcher in "ab"
    ]
    books.write(price_of().row, *bill(1, 0, 60, prompt_tokens=100, completion_tokens=0), *rows)
    books.look(books.closer(), 3700)
    ((_, shares, idle, outside),) = books.closings()
    assert idle == 2 * USD * 3540 // 3600
    assert outside == round((2 * USD - idle) * 118 / 218)
    assert shares == 2 * USD - idle - outside


def test_an_attempt_across_hours_pays_in_each(books: Books) -> None:
    books.write(price_of().row, *bill(1, 3590, 3610, gpu=1001))
    books.look(books.closer(), 7300)
    assert books.read("SELECT hour, share_nusd, change_nusd FROM adjustments ORDER BY hour") == [
        (HOUR, 5_555_556, 5_555_556 - 500),
        (HOUR + 1, 5_555_556, 5_555_556 - 501),
    ]
    books.check()


def test_rows_that_come_late_lead_to_another_revision_with_the_right_totals(books: Books) -> None:
    books.write(price_of().row, *bill(1, 0, 36))
    closer = books.closer()
    books.look(closer, 3700)
    books.write(*bill(2, 0, 36))
    books.look(closer, 3710)
    assert len(books.closings()) == 1, "not yet looked at again"
    books.look(closer, 3760)
    assert books.closings() == [(1, 20_000_000, 1_980_000_000, 0), (2, 20_000_000, 1_980_000_000, 0)]
    assert sorted(books.costs().values()) == [10_000_000, 10_000_000]
    books.check()
    books.look(closer, 7100)
    assert len(books.closings()) == 2


def test_a_true_row_in_the_place_of_an_estimated_one_is_a_late_row(books: Books) -> None:
    books.write(price_of().row, *bill(1, 0, 36), *bill(2, 0, 36, gpu=5, estimated=1))
    closer = books.closer()
    books.look(closer, 3700)
    books.write(*bill(2, 0, 36, gpu=5, completion_tokens=30))
    books.look(closer, 3790)
    assert len(books.closings()) == 2
    assert sorted(books.costs().values()) == [6_666_667, 13_333_333]
    books.check()


def test_a_revision_tells_only_what_changed(one: Books) -> None:
    closer = one.closer()
    one.write(price_of().row, *bill(1, 0, 36))
    one.look(closer, 3700)
    one.write(*bill(2, 0, 36))
    one.look(closer, 3800)
    one.told.clear()
    one.write(*bill(3, 0, 36, gpu=7, prompt_tokens=0, completion_tokens=0))
    one.look(closer, 3900)
    assert [(row.revision, row.share_nusd, row.change_nusd) for row in one.told] == [(3, 0, -7)]
    one.check()


def test_every_hour_has_its_turn_to_be_looked_at(one: Books) -> None:
    one.write(price_of().row, *bill(1, 0, 36))
    one.look(one.closer(), 15 * 3600 + 60)
    assert one.read("SELECT COUNT(*) FROM closings") == [(15,)]
    one.write(*bill(2, 0, 36))
    again = one.closer()
    one.look(again, 15 * 3600 + 120)
    assert len(one.closings()) == 1, "the newest come first"
    one.look(again, 15 * 3600 + 120)
    assert len(one.closings()) == 2
    one.check()


def test_of_two_leaders_one_closes(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read the hour before either wrote."""
    books.write(price_of().row, *bill(1, 0, 36))
    first, second = books.closer(0), books.closer(1)
    read = hour_rows
    late = bill(2, 0, 36)

    def then_the_other_closes(*asked: Any) -> Any:
        rows = read(*asked)
        monkeypatch.setattr("gateway.ledger.closing.hour_rows", read)
        books.write(*late)
        books.look(second, 3700)
        return rows

    with monkeypatch.context():
        monkeypatch.setattr("gateway.ledger.closing.hour_rows", then_the_other_closes)
        books.now_s = 3700
        first._look(books.told.extend)
    assert books.closings("instance, attempts") == [("replica-1", 2)]
    assert len(books.told) == 2
    books.check()


class Dying:
    """A store that fails at the write with this number."""

    def __init__(self, store: Store, dies_at: int) -> None:
        self._store, self._left = store, dies_at

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        self._left -= 1
        if self._left == 0:
            raise LedgerDown("gone")
        self._store.write(rows, closed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_a_leader_that_dies_over_an_hour_leaves_it_to_the_next(
    one: Books, dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ledger.closing._ROWS_AT_ONCE", 2)
    one.write(price_of().row, *(row for number in range(5) for row in bill(number, 0, 36)))
    one.stores = (Dying(one.stores[0], dies_at), one.stores[1])
    with pytest.raises(LedgerDown):
        one.look(one.closer(0), 3700)
    other = one.closer(1)
    one.look(other, 3710)
    if dies_at == 1:
        one.check()
        return
    assert len(one.closings()) == 1, "the first one may still be writing"
    assert sum(one.costs().values()) < 20_000_000
    one.look(other, 3700 + DEAD_MS // 1000 + 60)
    assert len(one.closings()) == 2
    one.check()
    assert len(one.told) == 5, "each adjustment was told once, by whoever wrote it"


def test_the_hours_of_a_server_count_from_when_it_was_first_known(one: Books) -> None:
    closer = one.closer()
    one.look(closer, 60)
    assert one.read("SELECT backend, at_ms, hour_nusd FROM prices") == [("gpu-a", FROM_MS + 60_000, 2 * USD)]
    one.look(closer, 4 * 3600 + 61)
    assert one.read("SELECT hour, idle_nusd FROM closings ORDER BY hour") == [(HOUR + n, 2 * USD) for n in range(4)]
    one.look(closer, 9 * 24 * 3600)
    hours = [hour for (hour,) in one.read("SELECT hour FROM closings ORDER BY hour")]
    assert hours[4:] == list(range(HOUR + 8 * 24, HOUR + 9 * 24 - 1)), "what is older than a look back goes is left"


def test_a_server_that_is_gone_is_closed_up_to_its_last_attempt(one: Books) -> None:
    one.write(price_of().row, *bill(1, 0, 36), *bill(2, 3700, 3736))
    one.prices = {}
    one.look(one.closer(), 5 * 3600)
    assert one.read("SELECT hour FROM closings ORDER BY hour") == [(HOUR,), (HOUR + 1,)]
    one.check()


def test_idle_time_is_loaded_on_requests_where_that_is_wanted(one: Books) -> None:
    one.write(price_of().row, *bill(1, 0, 36))
    one.look(one.closer(idle_on_requests=True), 3700)
    assert one.closings() == [(1, 2 * USD, 0, 0)]
    one.check()


def streamed(numbers: range) -> list[AnyRow]:
    """One a minute: 100 tokens read in 100 ms, 101 written in 20 s, alone. A token takes 200 times as long."""
    rows = []
    for number in numbers:
        for row in bill(number, 60 * number, 60 * number + 20 + 0.1 * number, prompt_tokens=100 * number):
            if isinstance(row, AttemptRow):
                row = msgspec.structs.replace(row, completion_tokens=101, first_token_us=100_000 * number)  # noqa: PLW2901
            rows.append(row)
    return rows


def test_work_is_weighed_as_measured_and_the_same_in_later_revisions(one: Books) -> None:
    closer = one.closer()
    one.write(price_of().row, *streamed(range(1, 50)))
    one.look(closer, 3700)
    one.write(*bill(99, 0, 36))
    one.look(closer, 3800)
    one.look(closer, 7300)
    assert one.read("SELECT hour, revision, decode_weight FROM closings ORDER BY hour, revision") == [
        (HOUR, 1, 200_000),
        (HOUR, 2, 200_000),
        (HOUR + 1, 1, 200_000),
    ]
    one.check()


def test_who_does_not_lead_closes_nothing(one: Books) -> None:
    @contextmanager
    def nobody() -> Iterator[bool]:
        yield False

    one.write(price_of().row, *bill(1, 0, 36))
    follower = one.closer()
    follower._leading = nobody
    one.look(follower, 3700)
    assert one.closings() == []


def test_a_closing_says_what_it_was_made_of(one: Books) -> None:
    one.write(price_of().row, *bill(1, 0, 36), meter(0, 60, prompt=700))
    one.look(one.closer(), 3700)
    with one.stores[0].reading() as reading:
        (row,) = reading.rows(f"SELECT {', '.join(ClosingRow.__struct_fields__)} FROM closings")
    found = msgspec.convert(dict(zip(ClosingRow.__struct_fields__, row, strict=True)), ClosingRow)
    assert (found.tier, found.price_version, found.attempts, found.busy_ms) == ("large", "gpu-a@2000000000", 1, 36_000)
    assert (found.provisional_nusd, found.instance, found.made_from) == (1000, "replica-0", "1/1000/0/1/700/0/0")


def test_a_leader_that_is_stopped_writes_nothing_behind_our_back(one: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ledger.closing._ROWS_AT_ONCE", 1)
    one.write(price_of().row, *(row for number in range(5) for row in bill(number, 0, 36)))
    closer = one.closer()
    one.now_s = 3700

    async def play() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(closer.look())
        stopped = Event()

        def stop() -> None:
            task.cancel()
            loop.call_soon(stopped.set)  # after the task has heard of it

        def pause(_s: float) -> None:
            loop.call_soon_threadsafe(stop)
            assert stopped.wait(10)

        closer._pause = pause
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())
    assert one.read("SELECT COUNT(*) FROM adjustments") == [(1,)]
    one.look(one.closer(1), 3700 + DEAD_MS // 1000 + 60)
    one.check()


def test_it_goes_on_when_the_ledger_is_back(one: Books, caplog: pytest.LogCaptureFixture) -> None:
    one.write(price_of().row, *bill(1, 0, 36))
    one.stores = (Dying(one.stores[0], 1),)
    closer = one.closer(every_s=0.0)
    one.now_s = 3700

    async def play() -> None:
        task = asyncio.create_task(closer.keep_closing())
        async with asyncio.timeout(10):
            while not one.told:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(play())
    assert "cannot be closed now: gone" in caplog.text
    one.check()


def test_with_postgresql_one_replica_leads_at_a_time(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [PostgresStore(postgres_server.url, schema="closing_led", timeout_s=20.0) for _ in range(2)]
    with contextmanager(_books)(*stores) as books:
        books.write(price_of().row, *bill(1, 0, 36))
        first, second = books.closer(0), books.closer(1)
        first._leading = lambda: stores[0].leading("closing")
        second._leading = lambda: stores[1].leading("closing")
        read, seen = hour_rows, []

        def while_the_other_looks(*asked: Any) -> Any:
            second._look(books.told.extend)
            seen.append(len(books.closings()))
            return read(*asked)

        monkeypatch.setattr("gateway.ledger.closing.hour_rows", while_the_other_looks)
        books.look(first, 3700)
        assert seen == [0], "the second one did not even look"
        assert len(books.closings()) == 1
        second._look(books.told.extend)
        books.check()
