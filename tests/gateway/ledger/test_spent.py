"""Do both databases say of every budget what its rows come to, one by one?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from gateway.admission import Admission
from gateway.ledger.contract import Store
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.rows import AdjustmentRow, AttemptRow, ClosingRow, ExchangeRow
from gateway.ledger.spent import Spending, span_of
from gateway.ledger.sqlite import SqliteStore
from gateway.limiter import MemoryLimiter
from gateway.metrics import Metrics
from policies.accounts import Budget, Rate, Rolling
from policies.limits import Calendar, Facts, Limit, Meter
from tests.gateway.ledger.many_rows import BEGIN_MS, ManyRows, paid
from tests.servers.postgres import PostgresServer

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
NOW_MS = BEGIN_MS + 20 * DAY_MS + 7 * HOUR_MS
BEFORE_MS = NOW_MS - 5 * HOUR_MS


def spend(rule: Budget | Rolling | Calendar) -> Meter:
    return Meter(measure="spend", rule=rule)


LIMITS = (
    Limit(name="all", meters=(spend(Budget(1)),)),
    Limit(
        name="day",
        scope=(("team", "each"),),
        meters=(spend(Calendar(limit=1, period="day", zone=ZoneInfo("Asia/Kolkata"))),),
    ),
    Limit(name="roll", scope=(("key", "each"), ("route", "auto")), meters=(spend(Rolling(1, DAY_MS)),)),
    Limit(name="user", scope=(("user", "each"), ("model", "auto")), meters=(spend(Rolling(1, 30 * DAY_MS)),)),
    Limit(name="default", scope=(("key", "each"),), meters=(spend(Budget(1)),), rank=1),
    Limit(name="one", scope=(("key", "key-3"),), meters=(Meter(measure="requests", rule=Rate(1, 1000, 1)),), rank=2),
    Limit(name="tier", scope=(("team", "each"), ("tier", "small")), meters=(spend(Rolling(1, 2 * DAY_MS)),)),
)
ROWS = tuple(ManyRows(3000, days=21).rows())


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: SqliteStore | PostgresStore
    if request.param == "sqlite":
        made = SqliteStore(tmp_path / "ledger.db", shared=False)
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        made = PostgresStore(server.url, schema=f"spent_{abs(hash(tmp_path))}", timeout_s=30.0)
    made.write(ROWS)
    yield made
    made.close()


def spending() -> Spending:
    return Spending(Admission(MemoryLimiter(), LIMITS, partition="deployment", metrics=Metrics()))


def facts_of(row: ExchangeRow, tier: str | None = None) -> Facts:
    return Facts(key=row.key_name, team=row.team, user=row.user_digest, route=row.route, model=row.asked, tier=tier)


def by_hand(before_ms: int) -> Counter[str]:
    """What each account has spent, row by row."""
    exchanges = {row.exchange_id: row for row in ROWS if isinstance(row, ExchangeRow)}
    tiers = {(row.exchange_id, row.number): row.tier for row in ROWS if isinstance(row, AttemptRow)}
    closed = {
        (row.backend, row.hour, row.revision) for row in ROWS if isinstance(row, ClosingRow) and row.at_ms < before_ms
    }
    sums: Counter[str] = Counter()

    def count(row: ExchangeRow, tier: str | None, nusd: int) -> None:
        for account in spending().accounts(facts_of(row, tier)):
            if account.meter.measure == "spend" and row.settled_ms >= span_of(account.meter, NOW_MS).from_ms:
                sums[account.name] += nusd

    for row in ROWS:
        if isinstance(row, ExchangeRow) and row.settled_ms < before_ms:
            count(row, None, paid(row))
        elif isinstance(row, AttemptRow) and exchanges[row.exchange_id].settled_ms < before_ms:
            count(exchanges[row.exchange_id], row.tier, paid(row))
        elif isinstance(row, AdjustmentRow) and (row.backend, row.hour, row.revision) in closed:
            for tier in (None, tiers[row.exchange_id, row.number]):
                count(exchanges[row.exchange_id], tier, row.change_nusd)
    return +sums


def test_sums_are_those_of_the_rows(store: Store) -> None:
    sums: Counter[str] = Counter()
    with store.reading() as reading:
        for amount in spending().totals(reading, now_ms=NOW_MS, before_ms=BEFORE_MS):
            sums[amount.account.name] += amount.nusd
            span = span_of(amount.account.meter, NOW_MS)
            assert amount.at_ms >= span.from_ms
            assert not span.slot_ms or amount.at_ms % span.slot_ms == 0
    expected = by_hand(BEFORE_MS)
    assert +sums == expected
    assert {name.partition("/")[0] for name in expected} == {one.name for one in LIMITS if one.name != "one"}


def test_totals_and_what_came_after_them_are_all_there_is(store: Store) -> None:
    sums: Counter[str] = Counter()
    with store.reading() as reading:
        for amount in spending().totals(reading, now_ms=NOW_MS, before_ms=BEFORE_MS):
            sums[amount.account.name] += amount.nusd
        told = [*spending().bills(reading, now_ms=NOW_MS, from_ms=BEFORE_MS)]
        for closing in spending().closings(reading, from_ms=BEFORE_MS, now_ms=NOW_MS + 10 * DAY_MS):
            told += spending().changes(reading, closing, now_ms=NOW_MS)
    starts = {
        account.name: span_of(account.meter, NOW_MS).from_ms
        for row in ROWS
        if isinstance(row, ExchangeRow)
        for tier in (None, "small")
        for account in spending().accounts(facts_of(row, tier))
        if account.meter.measure == "spend"
    }
    for _, bill in told:
        times_ms = bill.times_ms or (bill.at_ms,) * len(bill.entries)
        for entry, at_ms in zip(bill.entries, times_ms, strict=True):
            if at_ms + 60_000 > starts[entry.account]:
                sums[entry.account] += entry.taken
    assert len({bill.id for _, bill in told}) == len(told)
    assert +sums == by_hand(1 << 52)
