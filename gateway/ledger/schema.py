"""Which tables keep the rows, and with which words are rows put there? One text for SQLite and PostgreSQL.

Rules a reader must not break:

* A migration is never edited once it was released; what changes is the next number.
* No `;` and no `--` stands within a text value of a migration: it is split at them.
* Rows may be written again, and in another order than they were made: each statement leaves the same table whatever
  the order and however often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import resources

import msgspec

from gateway.ledger.contract import LedgerDown, Value
from gateway.ledger.rows import (
    AdjustmentRow,
    AlertEndingRow,
    AlertRow,
    AnyRow,
    AttemptRow,
    ClosingRow,
    DecisionInputRow,
    DeliveryRow,
    ExchangeRow,
    InstanceRow,
    MeterRow,
    OpenRow,
    PriceRow,
    RefusalRow,
    Row,
)

Values = tuple[Value, ...]

# In this order within every transaction, so that replicas that write the same rows do not wait for each other in a
# ring.
_ROWS: tuple[type[AnyRow], ...] = (
    InstanceRow,
    PriceRow,
    ExchangeRow,
    AttemptRow,
    DecisionInputRow,
    OpenRow,
    DeliveryRow,
    RefusalRow,
    MeterRow,
    ClosingRow,
    AdjustmentRow,
    AlertRow,
    AlertEndingRow,
)

# Rows that are replaced tell something that only grows. By it the later one is known, in whatever order they come.
_GROWS = {"instances": "heard_ms", "open_exchanges": "seen_ms", "refusals": "requests", "server_meters": "until_ms"}

MAKE_VERSIONS = (
    "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL PRIMARY KEY, at_ms BIGINT NOT NULL)"
)
FIND_VERSION = "SELECT MAX(version) FROM schema_version"
NOTE_VERSION = "INSERT INTO schema_version (version, at_ms) VALUES (?, ?)"
CLOSE = "DELETE FROM open_exchanges WHERE exchange_id = ?"
"""After the rows of the same transaction: an open exchange may be written and closed by one."""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table and the statement that puts a row there. The first columns are those of the key."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    insert: str

    def insert_many(self, rows: int) -> str:
        """Return the statement that puts so many rows there, their values one after the other."""
        places = f"({', '.join('?' * len(self.columns))})"
        return self.insert.replace(f"VALUES {places}", f"VALUES {', '.join([places] * rows)}", 1)


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """What leads from the schema before to this one."""

    version: int
    statements: tuple[str, ...]


def _on_conflict(row: type[Row]) -> str:
    key, name = ", ".join(row.KEY), row.TABLE
    if row.WHEN_THERE == "ignore":
        return f"ON CONFLICT ({key}) DO NOTHING"
    changes = ", ".join(f"{one} = excluded.{one}" for one in row.__struct_fields__ if one not in row.KEY)
    if row.WHEN_THERE == "replace":
        later = f"excluded.{_GROWS[name]} > {name}.{_GROWS[name]}"
    else:
        later = f"{name}.estimated = 1 AND excluded.estimated = 0"
    return f"ON CONFLICT ({key}) DO UPDATE SET {changes} WHERE {later}"


def _table(row: type[Row]) -> Table:
    columns = row.__struct_fields__
    places = ", ".join("?" * len(columns))
    return Table(
        name=row.TABLE,
        key=row.KEY,
        columns=columns,
        insert=f"INSERT INTO {row.TABLE} ({', '.join(columns)}) VALUES ({places}) {_on_conflict(row)}",  # noqa: S608 - names of ours
    )


TABLES: tuple[Table, ...] = tuple(_table(row) for row in _ROWS)
"""All tables, in the order in which a transaction writes them."""

_PLACES = {row: place for place, row in enumerate(_ROWS)}
_as_tuple: Callable[[AnyRow], Values] = msgspec.structs.astuple


def by_table(rows: Iterable[AnyRow]) -> Iterator[tuple[Table, list[Values]]]:
    """Yield the tables that these rows go to, in the order to write them, each with the values of its rows.

    Rows of a table stay in the order they came in; the same key may come more than once.
    """
    values: list[list[Values]] = [[] for _ in _ROWS]
    for row in rows:
        values[_PLACES[type(row)]].append(_as_tuple(row))
    return ((table, some) for table, some in zip(TABLES, values, strict=True) if some)


def split(script: str) -> tuple[str, ...]:
    """Return the statements of a migration, without its comments."""
    bare = re.sub(r"--[^\n]*", "", script)
    return tuple(one for part in bare.split(";") if (one := part.strip()))


def migrations() -> tuple[Migration, ...]:
    """Return all migrations this program knows, the oldest first."""
    folder = resources.files("gateway.ledger") / "migrations"
    scripts = sorted((one for one in folder.iterdir() if one.name.endswith(".sql")), key=lambda one: one.name)
    return tuple(
        Migration(version=int(one.name.partition("_")[0]), statements=split(one.read_text(encoding="utf-8")))
        for one in scripts
    )


def pending(found: int | None, known: tuple[Migration, ...], where: str) -> tuple[Migration, ...]:
    """Return what is to be done to a ledger whose version was `found` (None: it is empty), in one transaction.

    Each of it is followed by `NOTE_VERSION`. Raises `LedgerDown` where the ledger is newer than this program.
    """
    newest = known[-1].version
    if found is not None and found > newest:
        raise LedgerDown(
            f"The ledger {where} has version {found} of its schema, and this program knows versions up to {newest}. "
            "Nothing was changed: run the newer program again, or point this one to another ledger."
        )
    return tuple(one for one in known if found is None or one.version > found)


def readable(found: int | None, known: tuple[Migration, ...], where: str) -> None:
    """Raise `LedgerDown` unless a ledger whose version was `found` can be read as it is."""
    waiting = pending(found, known, where)
    if waiting:
        has = "no schema yet" if found is None else f"version {found} of its schema"
        raise LedgerDown(
            f"The ledger {where} has {has}, and this program reads version {known[-1].version}. "
            "A gateway of this version brings it up to date when it starts."
        )
