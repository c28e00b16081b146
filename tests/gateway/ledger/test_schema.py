"""Are rows and tables the same thing, and is it all one in which order rows are written, and how often?"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ledger.contract import LedgerDown
from gateway.ledger.rows import AnyRow, DeliveryRow, InstanceRow, MeterRow, RefusalRow
from gateway.ledger.schema import TABLES, Migration, by_table, migrations, pending, readable, split
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import AT_MS, PRICE, bill_of, billed, contents, id_of, open_row, rows_of


def test_every_row_has_its_table_and_every_field_its_column() -> None:
    tables = {}
    for statement in (one for step in migrations() for one in step.statements):
        made = re.match(r"CREATE TABLE (\w+) \((.*)\)$", statement, re.DOTALL)
        if made is not None:
            lines = [line.split() for line in made[2].splitlines() if " GENERATED " not in line]
            tables[made[1]] = tuple(line[0] for line in lines if line and line[0] != "PRIMARY")
    assert tables == {table.name: table.columns for table in TABLES}
    assert sorted(tables) == sorted(row.TABLE for row in get_args(AnyRow))


def test_the_key_comes_first_and_is_the_primary_key() -> None:
    text = "\n".join(one for step in migrations() for one in step.statements)
    for table in TABLES:
        assert table.columns[: len(table.key)] == table.key
        made = re.search(rf"CREATE TABLE {table.name} \((.*?)\n\)", text, re.DOTALL)
        assert made is not None
        one = re.search(r"(\w+) TEXT PRIMARY KEY", made[1])
        many = re.search(r"PRIMARY KEY \(([^)]*)\)", made[1])
        found = (one[1],) if one else tuple(many[1].split(", ")) if many else ()
        assert found == table.key


def test_a_migration_is_split_into_its_statements() -> None:
    assert split("-- All; of it.\nCREATE a (\n  b TEXT -- c; d\n);\n\nCREATE e;\n") == (
        "CREATE a (\n  b TEXT \n)",
        "CREATE e",
    )


def test_migrations_are_numbered_without_a_gap() -> None:
    assert [one.version for one in migrations()] == list(range(1, len(migrations()) + 1))


def test_a_newer_ledger_is_refused_and_an_older_one_brought_up() -> None:
    known = tuple(Migration(version=one, statements=(f"step {one}",)) for one in (1, 2, 3))
    assert pending(None, known, "here") == known
    assert pending(2, known, "here") == known[2:]
    assert pending(3, known, "here") == ()
    with pytest.raises(LedgerDown, match=r"here has version 4 .* up to 3"):
        pending(4, known, "here")
    with pytest.raises(LedgerDown, match=r"has version 2 .* reads version 3"):
        readable(2, known, "here")
    with pytest.raises(LedgerDown, match="no schema yet"):
        readable(None, known, "here")
    readable(3, known, "here")


def test_rows_are_told_apart_by_table_and_keep_their_order() -> None:
    bill = bill_of(1, attempts=2, inputs=True)
    found = {table.name: values for table, values in by_table(reversed(rows_of(bill)))}
    assert list(found) == ["prices", "exchanges", "attempts", "decision_inputs"]
    assert [one[:2] for one in found["attempts"]] == [(id_of(1), 2), (id_of(1), 1)]


# -- any order, any repetition ----------------------------------------------------------------------------------------

_TABLES = [table.name for table in TABLES]


def _meter(until: int) -> MeterRow:
    return MeterRow(
        backend="small-0",
        hour=488_888,
        instance="here",
        from_ms=AT_MS,
        until_ms=AT_MS + until,
        prompt_tokens=3 * until,
        completion_tokens=until,
        busy_ms=until,
        ready_ms=until,
        restarts=0,
    )


def _refusal(requests: int) -> RefusalRow:
    return RefusalRow(hour=488_888, instance="here", key_name="", code="invalid_api_key", requests=requests)


_some = st.integers(1, 3)
_row: st.SearchStrategy[list[AnyRow]] = st.one_of(
    st.builds(
        lambda number, lost: rows_of(bill_of(number, lost=lost, output=10 if lost else 90, attempts=2 - lost)),
        _some,
        st.booleans(),
    ),
    st.builds(lambda number: [DeliveryRow(exchange_id=id_of(number), delivered=1, total_us=5)], _some),
    st.builds(lambda number, later: [open_row(number, seen_ms=AT_MS + later, output=later)], _some, _some),
    st.builds(lambda requests: [_refusal(requests)], _some),
    st.builds(lambda heard: [InstanceRow(instance="here", heard_ms=heard)], _some),
    st.builds(lambda until: [_meter(until)], _some),
    st.just([PRICE]),
)


@settings(max_examples=50)
@given(batches=st.lists(_row, max_size=12), data=st.data())
def test_in_any_order_and_any_number_of_times_rows_come_to_the_same(
    batches: list[list[AnyRow]], data: st.DataObject
) -> None:
    again = data.draw(
        st.permutations(batches + data.draw(st.lists(st.sampled_from(batches)) if batches else st.just([])))
    )
    in_one_go = [row for batch in batches for row in batch]
    assert _contents([in_one_go]) == _contents(again)


def _contents(batches: list[list[AnyRow]]) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(":memory:")) as db:
        for step in migrations():
            for statement in step.statements:
                db.execute(statement)
        for batch in batches:
            for table, values in by_table(batch):
                db.executemany(table.insert, values)
        return {name: sorted(db.execute(f"SELECT * FROM {name}"), key=repr) for name in _TABLES}


def test_an_estimated_row_gives_way_to_the_true_one_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db")
    true, lost = bill_of(1, output=90), bill_of(1, lost=True, output=10)
    store.write(rows_of(lost))
    store.write(rows_of(bill_of(1, lost=True, output=20)))
    assert billed(store) == {id_of(1): ("lost", 10)}
    store.write(rows_of(true))
    before = contents(store, _TABLES)
    store.write(rows_of(lost))
    changed = msgspec.structs.replace(true.exchange, outcome="broken")
    store.write([changed])
    assert contents(store, _TABLES) == before
    assert before["exchanges"][0][17] == "answered"
    store.close()


def test_of_two_who_claim_an_open_exchange_at_once_the_first_has_it(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db")
    store.write([open_row(1, instance="dead", seen_ms=AT_MS)])
    store.write([open_row(1, instance="first", seen_ms=AT_MS + 1)])
    store.write([open_row(1, instance="second", seen_ms=AT_MS + 1)])
    assert [row[1] for row in contents(store, ["open_exchanges"])["open_exchanges"]] == ["first"]
    store.close()
