"""Does one process tell of an alert, and another one where that has died? In SQLite and in PostgreSQL."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from gateway.alert_book import Alert, AlertBook
from gateway.ledger.contract import Store
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.rows import InstanceRow
from gateway.ledger.sqlite import SqliteStore
from tests.servers.postgres import PostgresServer

LEASE_MS = 30_000
NOW_MS = 1_800_000_000_000
Stores = Callable[[], Store]


@pytest.fixture(params=["sqlite", "postgres"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    """Connections to one new ledger."""
    opened: list[Store] = []
    if request.param == "postgres":
        server = cast("PostgresServer", request.getfixturevalue("postgres_server"))
        schema = f"t{uuid.uuid4().hex[:12]}"

    def another() -> Store:
        store: Store
        if request.param == "sqlite":
            store = SqliteStore(tmp_path / "ledger.db")
        else:
            store = PostgresStore(server.url, schema=schema, timeout_s=10)
        opened.append(store)
        return store

    # Somebody has brought the schema up to date before anyone asks.
    another().write([InstanceRow(instance="first", heard_ms=0)])
    yield another
    for store in opened:
        store.close()


def alert(id_: str = "budget-1", at_ms: int = NOW_MS) -> Alert:
    return Alert(id=id_, at_ms=at_ms, kind="budget.threshold", payload=f'{{"id":"{id_}"}}')


def book(store: Store, instance: str) -> AlertBook:
    return AlertBook(store, instance=instance, lease_s=LEASE_MS / 1000)


def unfinished(of: AlertBook, now_ms: int = NOW_MS) -> list[tuple[Alert, set[str]]]:
    return [(one.alert, set(one.told)) for one in of.unfinished(["hook-a", "hook-b"], NOW_MS - 10**8, now_ms)]


def test_the_first_who_finds_it_tells(stores: Stores) -> None:
    one, other = book(stores(), "one"), book(stores(), "other")
    assert one.claim(alert(), NOW_MS)
    assert not other.claim(alert(), NOW_MS + 1)
    assert not one.claim(alert(), NOW_MS + 2), "not twice either"
    assert other.claim(alert("budget-2"), NOW_MS)


def test_of_many_who_find_it_at_the_same_time_exactly_one_tells(stores: Stores) -> None:
    claimed: list[str] = []
    barrier = threading.Barrier(6)

    def race(name: str) -> None:
        with closing(book(stores(), name)) as mine:
            for number in range(5):
                barrier.wait(20)
                if mine.claim(alert(f"budget-{number}"), NOW_MS):
                    claimed.append(f"budget-{number}")

    threads = [threading.Thread(target=race, args=(f"p{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claimed) == [f"budget-{number}" for number in range(5)]


def test_after_a_restart_under_its_name_it_tells_whom_it_has_not_told(stores: Stores) -> None:
    before = book(stores(), "one")
    for id_ in ("budget-1", "budget-2"):
        before.claim(alert(id_), NOW_MS)
    before.end("budget-1", "hook-a", "taken", NOW_MS + 5)
    before.end("budget-2", "hook-a", "taken", NOW_MS + 5)
    before.end("budget-2", "hook-b", "given_up", NOW_MS + 5)
    after = book(stores(), "one")
    assert unfinished(after) == [(alert(), {"hook-a"})]
    after.end("budget-1", "hook-b", "taken", NOW_MS + 9)
    assert unfinished(after) == []


def test_what_a_dead_process_has_not_told_one_other_takes_over(stores: Stores) -> None:
    book(stores(), "dead").claim(alert(), NOW_MS)
    one, other = book(stores(), "one"), book(stores(), "other")
    assert unfinished(one, NOW_MS + LEASE_MS - 1) == [], "it may have only begun"
    later_ms = NOW_MS + LEASE_MS + 1
    assert unfinished(one, later_ms) == [(alert(), set())]
    assert unfinished(other, later_ms) == [], "another one has it now"
    assert unfinished(one, later_ms + LEASE_MS) == [(alert(), set())], "and has it until it is told"
    # The one that took it over died too.
    assert unfinished(other, later_ms + LEASE_MS + 1) == [(alert(), set())]


def test_from_one_that_lives_nothing_is_taken(stores: Stores) -> None:
    store = stores()
    book(store, "alive").claim(alert(), NOW_MS)
    store.write([InstanceRow(instance="alive", heard_ms=NOW_MS + 90_000)])
    assert unfinished(book(stores(), "other"), NOW_MS + 90_000 + LEASE_MS) == []
    assert unfinished(book(stores(), "other"), NOW_MS + 90_000 + LEASE_MS + 1) == [(alert(), set())]


def test_what_is_older_than_a_day_is_left_alone(stores: Stores) -> None:
    one = book(stores(), "one")
    one.claim(alert("old", NOW_MS - 10**8 - 1), NOW_MS)
    one.claim(alert("new", NOW_MS - 10**8), NOW_MS)
    assert [found.id for found, _ in unfinished(one)] == ["new"]


def test_without_webhooks_nothing_is_unfinished(stores: Stores) -> None:
    one = book(stores(), "one")
    one.claim(alert(), NOW_MS)
    assert one.unfinished([], 0, NOW_MS) == []
