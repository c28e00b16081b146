"""What becomes of old rows? They are written to files where somebody wants them, and then deleted, a few at a time.

Rows of one exchange go together, so nothing is left without what it belongs to. Any process may do it, at the same time
as others: what is gone already is gone. Prices stay, because they are few and say what old files were rated by.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, get_type_hints

import msgspec

from gateway.ledger.contract import Reading, Value
from gateway.ledger.report_forms import safe, write_parquet
from gateway.ledger.rows import (
    AdjustmentRow,
    AnyRow,
    AttemptRow,
    ClosingRow,
    DecisionInputRow,
    DeliveryRow,
    ExchangeRow,
    PriceRow,
    RefusalRow,
)

DAY_MS = 86_400_000
LEAST_KEPT_MS = 8 * DAY_MS
"""Hours of GPUs are looked after for a week (`gateway/ledger/closing.py`): what they were made from must be there."""

_AT_ONCE = 250
_ROWS_IN_FILE = 100_000
_OF_EXCHANGES = ("attempts", "deliveries", "decision_inputs", "adjustments", "exchanges")
_OTHERS = {
    "refusals": ("hour", 3_600_000),
    "server_meters": ("hour", 3_600_000),
    "closings": ("hour", 3_600_000),
    "instances": ("heard_ms", 1),
    "alerts": ("at_ms", 1),
    "alert_endings": ("at_ms", 1),
}

Format = Literal["csv", "jsonl", "parquet"]


class Keeper(Protocol):
    """A store that rows can be deleted from. Blocks; used by one thread, and by nobody else."""

    def reading(self) -> AbstractContextManager[Reading]:
        """Open a connection of its own to read through; raises `LedgerDown`."""
        ...

    def change(self, changes: Sequence[tuple[str, Sequence[Value]]]) -> None:
        """Do all of this in one transaction, or nothing. Raises `LedgerDown`."""
        ...


def prune(
    keeper: Keeper,
    *,
    before_ms: int | None,
    inputs_before_ms: int | None,
    now_ms: int,
    pause: Callable[[], bool] = lambda: True,
) -> dict[str, int]:
    """Delete what was settled before a time, and inputs of decisions made before another one; None: nothing of it.

    Returns how many exchanges and inputs were deleted. After each few `pause` is called: False, and it ends. Nothing of
    the last eight days is deleted but inputs. Raises `LedgerDown`; what was deleted then is deleted.
    """
    gone = {"exchanges": 0, "decision_inputs": 0}
    if inputs_before_ms is not None:
        query = f"SELECT exchange_id FROM decision_inputs WHERE at_ms < {inputs_before_ms} LIMIT {_AT_ONCE}"  # noqa: S608
        for ids in _lots(keeper, query):
            keeper.change([_delete("decision_inputs", ids)])
            gone["decision_inputs"] += len(ids)
            if not pause():
                return gone
    if before_ms is not None:
        before_ms = min(before_ms, now_ms - LEAST_KEPT_MS)
        query = f"SELECT exchange_id FROM exchanges WHERE settled_ms < {before_ms} ORDER BY settled_ms LIMIT {_AT_ONCE}"  # noqa: S608
        for ids in _lots(keeper, query):
            keeper.change([_delete(table, ids) for table in _OF_EXCHANGES])
            gone["exchanges"] += len(ids)
            if not pause():
                return gone
        keeper.change(
            [
                (f"DELETE FROM {table} WHERE {column} < ?", (before_ms // unit_ms,))  # noqa: S608 - names of ours
                for table, (column, unit_ms) in _OTHERS.items()
            ]
        )
    return gone


def _lots(keeper: Keeper, query: str) -> Iterator[list[str]]:
    while True:
        with keeper.reading() as reading:
            ids = [str(id_) for (id_,) in reading.rows(query)]
        if not ids:
            return
        yield ids


def _delete(table: str, ids: Sequence[str]) -> tuple[str, Sequence[Value]]:
    places = ", ".join("?" * len(ids))
    return f"DELETE FROM {table} WHERE exchange_id IN ({places})", ids  # noqa: S608 - a name of ours


# -- files ------------------------------------------------------------------------------------------------------------

_EXPORTED: Mapping[type[AnyRow], str] = {
    ExchangeRow: "exchanges r WHERE r.settled_ms >= {0} AND r.settled_ms < {1}",
    AttemptRow: "attempts r JOIN exchanges e ON e.exchange_id = r.exchange_id "
    "WHERE e.settled_ms >= {0} AND e.settled_ms < {1}",
    DeliveryRow: "deliveries r JOIN exchanges e ON e.exchange_id = r.exchange_id "
    "WHERE e.settled_ms >= {0} AND e.settled_ms < {1}",
    DecisionInputRow: "decision_inputs r JOIN exchanges e ON e.exchange_id = r.exchange_id "
    "WHERE e.settled_ms >= {0} AND e.settled_ms < {1}",
    AdjustmentRow: "adjustments r JOIN exchanges e ON e.exchange_id = r.exchange_id "
    "WHERE e.settled_ms >= {0} AND e.settled_ms < {1}",
    ClosingRow: "closings r WHERE r.hour >= {0} / 3600000 AND r.hour < {1} / 3600000",
    RefusalRow: "refusals r WHERE r.hour >= {0} / 3600000 AND r.hour < {1} / 3600000",
}


class Exported(msgspec.Struct, frozen=True):
    """A file that was written."""

    path: Path
    rows: int


def export(
    reading: Reading, folder: Path, *, before_ms: int, form: Format, inputs: bool = False, from_ms: int | None = None
) -> Iterator[Exported]:
    """Write what was settled before a time (a midnight of UTC), and yield each file: one for each table and day.

    A file is there whole or not at all. Inputs of decisions are personal data, and written only if asked for. Raises
    `LedgerDown`, `OSError`, and `NoParquet`.
    """
    if from_ms is None:
        (first,) = next(iter(reading.rows("SELECT MIN(settled_ms) FROM exchanges")))
        from_ms = before_ms if not isinstance(first, int) else first
    yield from _export_table(reading, folder / "prices", PriceRow, "prices r", form)
    for day_ms in range(from_ms - from_ms % DAY_MS, before_ms, DAY_MS):
        until_ms = min(day_ms + DAY_MS, before_ms)
        for kind, source in _EXPORTED.items():
            if kind is not DecisionInputRow or inputs:
                name = f"{kind.TABLE}-{_day(day_ms)}"
                yield from _export_table(reading, folder / name, kind, source.format(day_ms, until_ms), form)


def _day(at_ms: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)).date().isoformat()


def _export_table(reading: Reading, path: Path, kind: type[AnyRow], source: str, form: Format) -> Iterator[Exported]:
    columns = kind.__struct_fields__
    said = ", ".join(f"r.{column}" for column in columns)
    rows = reading.rows(f"SELECT {said} FROM {source} ORDER BY {', '.join(f'r.{one}' for one in kind.KEY)}")  # noqa: S608
    for number in range(1_000_000):
        some = list(islice(rows, _ROWS_IN_FILE))
        if not some:
            return
        part = f"-{number}" if number else ""
        whole = path.with_name(f"{path.name}{part}.{form}")
        beside = whole.with_name(f".{whole.name}.part")
        beside.write_bytes(_WRITERS[form](_kinds(kind), some))
        beside.replace(whole)
        yield Exported(whole, len(some))


def _kinds(kind: type[AnyRow]) -> dict[str, str]:
    """Return what each column holds, the same in every file: whole numbers, other numbers, or text."""
    hints = get_type_hints(kind)
    return {
        name: "count"
        if hints[name] in (int, int | None)
        else "quantity"
        if hints[name] in (float, float | None)
        else "text"
        for name in kind.__struct_fields__
    }


def _as_csv(columns: Iterable[str], rows: Iterable[Sequence[Value]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([safe(one) if isinstance(one, str) else _plain(one) for one in row])
    return out.getvalue().encode()


def _as_jsonl(columns: Iterable[str], rows: Iterable[Sequence[Value]]) -> bytes:
    lines = (json.dumps(dict(zip(columns, map(_plain, row), strict=True)), ensure_ascii=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def _as_parquet(kinds: Mapping[str, str], rows: Iterable[Sequence[Value]]) -> bytes:
    out = io.BytesIO()
    write_parquet(kinds, [dict(zip(kinds, map(_cell, row), strict=True)) for row in rows], out)
    return out.getvalue()


def _plain(value: Value) -> str | int | float | None:
    return value.hex() if isinstance(value, bytes) else value


def _cell(value: Value) -> str | int | None:
    plain = _plain(value)
    return f"{plain:.18f}" if isinstance(plain, float) else plain


_WRITERS: Mapping[Format, Callable[[Mapping[str, str], Iterable[Sequence[Value]]], bytes]] = {
    "csv": _as_csv,
    "jsonl": _as_jsonl,
    "parquet": _as_parquet,
}
