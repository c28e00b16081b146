"""Does what is old go, whole and by itself, and can it be had as files before?"""

from __future__ import annotations

import asyncio
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pyarrow import parquet

from gateway.ledger.postgres import PostgresStore
from gateway.ledger.pruning import Pruner
from gateway.ledger.retention import DAY_MS, Format, export, prune
from gateway.ledger.rows import AdjustmentRow, AnyRow, Bill, ClosingRow, DeliveryRow, RefusalRow
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import AT_MS, bill_of, contents, rows_of
from tests.gateway.limiting import until
from tests.servers.postgres import PostgresServer

START_MS = AT_MS - AT_MS % DAY_MS
NOW_MS = START_MS + 30 * DAY_MS
TABLES = ("exchanges", "attempts", "deliveries", "decision_inputs", "adjustments", "closings", "refusals", "prices")

AnyStore = SqliteStore | PostgresStore


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyStore]:
    store: AnyStore
    if request.param == "sqlite":
        store = SqliteStore(tmp_path / "ledger.db", shared=False)
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        store = PostgresStore(server.url, schema=f"old_{abs(hash(tmp_path))}", timeout_s=20.0)
    for day in range(30):
        store.write([row for number in (0, 1) for row in rows_on(day, number)])
    yield store
    store.close()


def on(day: int, number: int) -> Bill:
    bill = bill_of(100 * day + number, attempts=2, inputs=True)
    at_ms = START_MS + day * DAY_MS + number * (DAY_MS - 1)
    exchange = msgspec.structs.replace(bill.exchange, at_ms=at_ms, settled_ms=at_ms, error="=1+1")
    inputs = None if bill.inputs is None else msgspec.structs.replace(bill.inputs, at_ms=at_ms)
    return msgspec.structs.replace(bill, exchange=exchange, inputs=inputs)


def rows_on(day: int, number: int) -> list[AnyRow]:
    bill = on(day, number)
    id_, hour = bill.exchange.exchange_id, (START_MS + day * DAY_MS) // 3_600_000
    return [
        *rows_of(bill),
        DeliveryRow(exchange_id=id_, delivered=1, total_us=5),
        RefusalRow(hour=hour, instance="here", key_name="", code=f"c{number}", requests=3),
        ClosingRow(
            backend=f"gpu{number}",
            hour=hour,
            revision=1,
            tier="small",
            at_ms=0,
            hour_nusd=0,
            shares_nusd=0,
            idle_nusd=0,
            outside_nusd=0,
            busy_ms=0,
            attempts=0,
            price_version="",
            instance="here",
        ),
        AdjustmentRow(
            exchange_id=id_,
            number=1,
            hour=hour,
            revision=1,
            backend=f"gpu{number}",
            share_nusd=0,
            change_nusd=0,
            at_ms=0,
            key_name="",
            team=None,
            route="",
            tier="",
            shown=0,
        ),
    ]


def sizes(store: AnyStore) -> dict[str, int]:
    return {name: len(rows) for name, rows in contents(store, TABLES).items()}


def test_what_is_old_goes_with_all_that_belongs_to_it(store: AnyStore) -> None:
    gone = prune(store, before_ms=START_MS + 10 * DAY_MS, inputs_before_ms=START_MS + 25 * DAY_MS, now_ms=NOW_MS)
    assert gone == {"exchanges": 20, "decision_inputs": 50}
    assert sizes(store) == {
        "exchanges": 40,
        "attempts": 80,
        "deliveries": 40,
        "decision_inputs": 10,
        "adjustments": 40,
        "closings": 40,
        "refusals": 40,
        "prices": 1,
    }
    with store.reading() as reading:
        ((first_ms,),) = reading.rows("SELECT MIN(settled_ms) FROM exchanges")
    assert first_ms == START_MS + 10 * DAY_MS
    again = prune(store, before_ms=START_MS + 10 * DAY_MS, inputs_before_ms=START_MS + 25 * DAY_MS, now_ms=NOW_MS)
    assert again == {"exchanges": 0, "decision_inputs": 0}


def test_nothing_is_deleted_that_was_not_asked_for(store: AnyStore) -> None:
    before = sizes(store)
    assert prune(store, before_ms=None, inputs_before_ms=None, now_ms=NOW_MS) == {"exchanges": 0, "decision_inputs": 0}
    assert sizes(store) == before
    prune(store, before_ms=NOW_MS + DAY_MS, inputs_before_ms=None, now_ms=NOW_MS)
    # Of the last eight days everything is there.
    assert sizes(store)["exchanges"] == 16


def test_it_ends_when_it_is_told_to(store: AnyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ledger.retention._AT_ONCE", 7)
    gone = prune(store, before_ms=NOW_MS, inputs_before_ms=None, now_ms=NOW_MS, pause=lambda: False)
    assert gone["exchanges"] == 7
    assert sizes(store)["attempts"] == 106


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_every_day_is_a_file(store: AnyStore, tmp_path: Path, form: Format) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    with store.reading() as reading:
        files = list(export(reading, folder, before_ms=START_MS + 3 * DAY_MS, form=form))
    assert sorted(one.path.name for one in files) == sorted(
        [f"prices.{form}"]
        + [
            f"{table}-2025-10-{day:02}.{form}"
            for table in ("exchanges", "attempts", "deliveries", "adjustments", "closings", "refusals")
            for day in (9, 10, 11)
        ]
    )
    assert {one.path.name for one in files} == {one.name for one in folder.iterdir()}
    rows = read(folder / f"exchanges-2025-10-10.{form}", form)
    assert [row["exchange_id"] for row in rows] == [on(1, number).exchange.exchange_id for number in (0, 1)]
    assert [int(row["settled_ms"]) for row in rows] == [on(1, number).exchange.settled_ms for number in (0, 1)]
    assert float(rows[0]["confidence"]) == 0.875
    assert rows[0]["error"] == ("'=1+1" if form == "csv" else "=1+1")
    assert len(read(folder / f"attempts-2025-10-09.{form}", form)) == 4


def test_inputs_of_decisions_are_written_only_if_asked_for(store: AnyStore, tmp_path: Path) -> None:
    with store.reading() as reading:
        files = list(export(reading, tmp_path, before_ms=NOW_MS, form="jsonl", inputs=True, from_ms=NOW_MS - DAY_MS))
    (inputs,) = [one for one in files if one.path.name.startswith("decision_inputs")]
    assert [row["features"] for row in read(inputs.path, "jsonl")] == ["01ff00"] * 2


def read(path: Path, form: Format) -> list[dict[str, str]]:
    if form == "parquet":
        rows: list[dict[str, str]] = parquet.read_table(path).to_pylist()
        return rows
    with path.open(encoding="utf-8", newline="") as lines:
        return [json.loads(line) for line in lines] if form == "jsonl" else list(csv.DictReader(lines))


def test_a_gateway_deletes_what_its_configuration_does_not_keep(store: AnyStore) -> None:
    ago_s = time.time() - START_MS / 1000
    days_s = 86_400.0
    # In the middle of a day, of which the first row goes and the last one stays.

    async def scene() -> None:
        pruner = Pruner(store, keep_s=ago_s - 10.5 * days_s, inputs_s=ago_s - 20.5 * days_s)
        pruning = asyncio.ensure_future(pruner.keep_pruning())
        await until(lambda: sizes(store)["decision_inputs"] == 19 and sizes(store)["refusals"] == 38)
        pruning.cancel()
        (ended,) = await asyncio.gather(pruning, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError)

    asyncio.run(scene())
    assert sizes(store)["exchanges"] == 39
