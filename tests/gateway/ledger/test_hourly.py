"""Are the sums of an hour those of its rows, whenever they come?"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import msgspec
import pytest

from gateway.ledger.contract import Reading, Store, Value
from gateway.ledger.hourly import HOUR_MS, HourlySpend, Series
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.rows import AnyRow, ExchangeRow, InstanceRow
from gateway.ledger.sqlite import SqliteStore
from policies.anomaly import DAY, HOURS, WEEK
from tests.gateway.ledger.bills import bill_of
from tests.servers.postgres import PostgresServer

HOUR = 500_000
"""A moment in 2027, in hours."""
NOW_MS = HOUR * HOUR_MS + 1_000_000


class Counted:
    """A store that notes what is asked of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked: list[tuple[int, int]] = []

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        self._store.write(rows, closed)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        with self._store.reading() as reading:
            yield _Counted(reading, self.asked)

    def close(self) -> None:
        self._store.close()


class _Counted:
    def __init__(self, reading: Reading, asked: list[tuple[int, int]]) -> None:
        self._reading, self._asked = reading, asked

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Iterator[tuple[Value, ...]]:
        first, end = values
        assert isinstance(first, int)
        assert isinstance(end, int)
        self._asked.append((first // HOUR_MS, end // HOUR_MS))
        return self._reading.rows(sql, values)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Counted]:
    kept: Store = SqliteStore(tmp_path / "ledger.db")
    if request.param == "postgres":
        server = cast("PostgresServer", request.getfixturevalue("postgres_server"))
        kept = PostgresStore(server.url, schema=f"t{uuid.uuid4().hex[:12]}", timeout_s=10)
    kept.write([InstanceRow(instance="first", heard_ms=0)])
    yield Counted(kept)
    kept.close()


def row(number: int, hour: int, *, team: str | None = "red", route: str = "auto", nusd: int = 100) -> ExchangeRow:
    return msgspec.structs.replace(
        bill_of(number).exchange,
        settled_ms=hour * HOUR_MS + number,
        team=team,
        route=route,
        input_nusd=nusd // 4,
        cached_input_nusd=nusd // 4,
        output_nusd=nusd // 4,
        gpu_nusd=nusd - 3 * (nusd // 4),
    )


def hours(spend: HourlySpend, series: Series, running: int = HOUR) -> dict[int, tuple[int, int]]:
    """Return what was spent by how many, by the number of the hour, where it was anything."""
    past = dict(spend.all())[series]
    first = running + 1 - len(past.nusd)
    pairs = zip(past.nusd, past.requests, strict=True)
    return {first + at: pair for at, pair in enumerate(pairs) if pair != (0, 0)}


def test_the_same_rows_are_summed_by_team_and_by_route(store: Counted) -> None:
    store.write(
        [
            row(1, HOUR - 3),
            row(2, HOUR - 3, route="fast", nusd=31),
            row(3, HOUR - 2, team="blue", nusd=7),
            row(4, HOUR, team=None, nusd=1_000_000_000_000),
        ]
    )
    spend = HourlySpend(store)
    assert dict(spend.all()) == {}
    assert spend.read(NOW_MS) == HOUR
    assert {series for series, _ in spend.all()} == {
        Series("team", "red"),
        Series("team", "blue"),
        Series("team", None),
        Series("route", "auto"),
        Series("route", "fast"),
    }
    assert hours(spend, Series("team", "red")) == {HOUR - 3: (131, 2)}
    assert hours(spend, Series("team", None)) == {HOUR: (10**12, 1)}
    assert hours(spend, Series("route", "auto")) == {HOUR - 3: (100, 1), HOUR - 2: (7, 1), HOUR: (10**12, 1)}


def test_all_of_eight_weeks_is_there_and_nothing_before(store: Counted) -> None:
    spend = HourlySpend(store)
    spend.read(NOW_MS)
    kept = sum(end - first for first, end in store.asked)
    assert kept >= HOURS + 7
    assert store.asked == [(a, b) for a, b in store.asked if b - a <= DAY], "a day at a time"
    assert all(before[1] == after[0] for before, after in zip(store.asked, store.asked[1:], strict=False))
    store.write([row(1, HOUR - kept), row(2, HOUR - kept + 1), row(3, HOUR - WEEK)])
    spend = HourlySpend(store)
    spend.read(NOW_MS)
    assert hours(spend, Series("team", "red")) == {HOUR - kept + 1: (100, 1), HOUR - WEEK: (100, 1)}


def test_later_only_the_running_hour_is_read_and_once_an_hour_the_last_day(store: Counted) -> None:
    spend = HourlySpend(store)
    spend.read(NOW_MS)
    store.asked.clear()
    spend.read(NOW_MS + 60_000)
    assert store.asked == [(HOUR, HOUR + 1)]
    store.asked.clear()
    spend.read(NOW_MS + HOUR_MS)
    assert store.asked[0][0] == HOUR - DAY
    assert store.asked[-1][1] == HOUR + 2


def test_rows_that_come_late_or_again_are_counted_once(store: Counted) -> None:
    spend = HourlySpend(store)
    store.write([row(1, HOUR - 2), row(2, HOUR)])
    spend.read(NOW_MS)
    store.write([row(3, HOUR - 2), row(4, HOUR)])
    spend.read(NOW_MS + 1000)
    assert hours(spend, Series("route", "auto")) == {HOUR - 2: (100, 1), HOUR: (200, 2)}
    spend.read(NOW_MS + HOUR_MS)
    assert hours(spend, Series("route", "auto"), HOUR + 1) == {HOUR - 2: (200, 2), HOUR: (200, 2)}


def test_after_a_long_pause_or_a_step_back_of_the_clock_the_sums_are_right(store: Counted) -> None:
    store.write([row(1, HOUR - 2), row(2, HOUR), row(3, HOUR + 30)])
    spend = HourlySpend(store)
    for now in (HOUR, HOUR + 30, HOUR + 3 * HOURS, HOUR + 31, HOUR):
        spend.read(now * HOUR_MS)
        fresh = HourlySpend(store)
        fresh.read(now * HOUR_MS)
        assert dict(spend.all()) == dict(fresh.all())


def test_one_that_was_stopped_begins_anew(store: Counted) -> None:
    store.write([row(1, HOUR - 2 * WEEK), row(2, HOUR)])
    spend = HourlySpend(store)
    answers = iter([False] * 10 + [True])
    spend.read(NOW_MS, lambda: next(answers))
    assert dict(spend.all()) == {}
    spend.read(NOW_MS)
    assert hours(spend, Series("team", "red")) == {HOUR - 2 * WEEK: (100, 1), HOUR: (100, 1)}
    store.write([row(3, HOUR + 2)])
    spend.read(NOW_MS + 2 * HOUR_MS, lambda: True)
    assert dict(spend.all()) == {}
    spend.read(NOW_MS + 2 * HOUR_MS)
    assert hours(spend, Series("route", "auto"), HOUR + 2).keys() == {HOUR - 2 * WEEK, HOUR, HOUR + 2}


def test_of_too_many_teams_some_are_left_out_until_others_are_gone(
    store: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    store.write([row(number, HOUR, team=f"t{number}") for number in range(8)])
    spend = HourlySpend(store, most=4)
    spend.read(NOW_MS)
    spend.read(NOW_MS)
    assert len(dict(spend.all())) == 4
    assert caplog.text.count("is not watched") == 1
    store.write([row(100, HOUR + 2 * HOURS, team="late")])
    spend.read((HOUR + 2 * HOURS) * HOUR_MS)
    assert set(dict(spend.all())) == {Series("team", "late"), Series("route", "auto")}
