"""Is everything found that can be wrong with a ledger, in both databases, and nothing else?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.ledger.contract import Store
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.rows import (
    AdjustmentRow,
    AnyRow,
    Bill,
    ClosingRow,
    DeliveryRow,
    InstanceRow,
)
from gateway.ledger.sqlite import SqliteStore
from gateway.ledger.verify import Finding, verify
from policies.cost import Cost, Price, cost_of
from tests.gateway.ledger.bills import AT_MS, PRICE, bill_of, open_row, rows_of
from tests.gateway.ledger.many_rows import fill
from tests.servers.postgres import PostgresServer

NOW_MS = AT_MS + 3_600_000
replace = msgspec.structs.replace


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        sqlite = SqliteStore(tmp_path / "ledger.db", shared=False)
        sqlite.open()
        yield sqlite
        sqlite.close()
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    schema = f"verify_{abs(hash(tmp_path))}"
    postgres = PostgresStore(server.url, schema=schema, timeout_s=20.0)
    postgres.write([])
    yield postgres
    postgres.close()


def test_what_came_to_nothing_has_no_attempts(store: Store) -> None:
    bill = bill_of(1, attempts=0)
    exchange = replace(bill.exchange, outcome="exhausted", served=None)
    assert wrong(store, [exchange]) == {}


def rated(bill: Bill) -> Bill:
    """The bill at what its tokens cost."""
    price = Price(input_nusd=PRICE.input_nusd, cached_input_nusd=PRICE.cached_input_nusd, output_nusd=PRICE.output_nusd)
    attempts = tuple(replace(one, **_money(cost_of(price, one))) for one in bill.attempts)
    cost = [cost_of(price, one) for one in bill.attempts]
    total = Cost(input_nusd=sum(one.input_nusd for one in cost), output_nusd=sum(one.output_nusd for one in cost))
    wasted = total.total_nusd - (cost[-1].total_nusd if cost else 0)
    exchange = replace(bill.exchange, **_money(total), wasted_nusd=wasted)
    return replace(bill, exchange=exchange, attempts=attempts)


def _money(cost: Cost) -> dict[str, int]:
    return {name: getattr(cost, name) for name in ("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd")}


def wrong(store: Store, rows: list[AnyRow]) -> dict[str, Finding]:
    store.write(rows)
    with store.reading() as reading:
        return {one.check: one for one in verify(reading, now_ms=NOW_MS, lease_ms=30_000) if one.wrong}


GOOD: list[AnyRow] = [
    row for number in range(5) for row in rows_of(rated(bill_of(number, attempts=1 + number % 3, inputs=True)))
]


def test_a_ledger_in_order_has_nothing_wrong(store: Store) -> None:
    assert (
        wrong(store, [*GOOD, DeliveryRow(exchange_id=bill_of(1).exchange.exchange_id, delivered=1, total_us=5)]) == {}
    )
    with store.reading() as reading:
        looked_at = {one.check: one.looked_at for one in verify(reading, now_ms=NOW_MS, lease_ms=30_000)}
    assert looked_at["every exchange has its attempts, and is their sum"] == 5
    assert looked_at["every cost is that of its tokens at their price"] == 9


SUMS = "every exchange has its attempts, and is their sum"
RATING = "every cost is that of its tokens at their price"


@pytest.mark.parametrize(
    ("spoil", "check", "said"),
    [
        ({"drop": 1}, SUMS, "1 attempts, numbered 2 to 2"),
        ({"drop": 2}, SUMS, "2 calls, and attempts of 1"),
        ({"drop": 1, "drop2": 2}, SUMS, "2 calls, and attempts of 0"),
        ({"exchange": {"output_nusd": 7}}, SUMS, "output_nusd is 7, that of its attempts 2100"),
        ({"exchange": {"prompt_tokens": 23}}, SUMS, "prompt_tokens is 23, that of its attempts 24"),
        ({"exchange": {"wasted_nusd": 1}}, SUMS, "wasted_nusd is 1"),
        ({"attempt": {"input_nusd": 601}}, RATING, "input_nusd 601"),
        ({"attempt": {"price_version": "unknown"}}, RATING, "its price unknown is not known"),
    ],
)
def test_what_does_not_add_up_is_named(store: Store, spoil: dict[str, object], check: str, said: str) -> None:
    bill = rated(bill_of(7, attempts=2))
    exchange = replace(bill.exchange, **spoil.get("exchange", {}))  # type: ignore[arg-type]
    attempts = [
        replace(one, **spoil.get("attempt", {})) if one.number == 1 else one  # type: ignore[arg-type]
        for one in bill.attempts
        if one.number not in (spoil.get("drop"), spoil.get("drop2"))
    ]
    found = wrong(store, [*GOOD, *bill.prices, exchange, *attempts])
    assert check in found
    assert found[check].wrong == 1
    assert said in found[check].examples[0]
    assert bill.exchange.exchange_id in found[check].examples[0]


def test_orphans_are_named(store: Store) -> None:
    bill = rated(bill_of(8, attempts=2, inputs=True))
    assert bill.inputs is not None
    delivery = DeliveryRow(exchange_id=bill.exchange.exchange_id, delivered=1, total_us=5)
    found = wrong(store, [*GOOD, *bill.attempts, bill.inputs, delivery])
    assert {one.check: one.wrong for one in found.values()} == {
        "every attempt belongs to an exchange": 2,
        "every delivery belongs to an exchange": 1,
        "every input of a decision belongs to an exchange": 1,
    }


def test_what_a_dead_process_left_open_is_named(store: Store) -> None:
    living = InstanceRow(instance="living", heard_ms=NOW_MS)
    rows: list[AnyRow] = [open_row(1), open_row(2, instance="living"), open_row(3, seen_ms=NOW_MS), living]
    found = wrong(store, [*rows])
    assert [one.wrong for one in found.values()] == [1]
    assert "of dead, last heard of 1 h 0 min ago" in next(iter(found.values())).examples[0]


def closing(**changes: object) -> ClosingRow:
    row = ClosingRow(
        backend="gpu",
        hour=5,
        revision=1,
        tier="small",
        at_ms=AT_MS,
        hour_nusd=100,
        shares_nusd=60,
        idle_nusd=30,
        outside_nusd=10,
        busy_ms=0,
        attempts=1,
        price_version="",
        instance="here",
        provisional_nusd=50,
    )
    return replace(row, **changes)


def adjustment(number: int = 1, **changes: object) -> AdjustmentRow:
    row = AdjustmentRow(
        exchange_id=bill_of(number).exchange.exchange_id,
        number=1,
        hour=5,
        revision=1,
        backend="gpu",
        share_nusd=60,
        change_nusd=10,
        at_ms=AT_MS,
        key_name="key-1",
        team=None,
        route="auto",
        tier="small",
        shown=1,
    )
    return replace(row, **changes)


def test_closed_hours_are_checked(store: Store) -> None:
    assert wrong(store, [*GOOD, closing(), adjustment()]) == {}
    found = wrong(
        store,
        [
            closing(hour=6, shares_nusd=61),
            adjustment(hour=7),
            adjustment(99),
            closing(backend="new", hour=5, at_ms=NOW_MS),
            adjustment(backend="new", hour=8, exchange_id="x"),
        ],
    )
    assert {one.check: one.wrong for one in found.values()} == {
        "every closed hour is shared out to the nano-dollar": 1,
        # Hour 5 has one adjustment too many; hour 6 has none at all. What was just closed is still being written.
        "what a closed hour changed is all there": 2,
        "every adjustment belongs to an attempt and a closed hour": 3,
    }


def test_only_a_few_are_shown_of_many(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db", shared=False)
    fill(store, 2000)
    store.change([("UPDATE attempts SET completion_tokens = completion_tokens + 1000", ())])
    with store.reading() as reading:
        findings = {one.check: one for one in verify(reading, now_ms=NOW_MS, lease_ms=30_000)}
    store.close()
    assert {name for name, one in findings.items() if one.wrong} == {RATING, SUMS}
    assert findings[RATING].wrong > 2000
    assert len(findings[RATING].examples) == 10
