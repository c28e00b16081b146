"""How do batches wait in a file? In the order they came, each as one compressed record, next to what nobody will take.

It is a file of `SqliteStore` with two tables more. One process owns it, as long as it lives: it holds the lock of the
file `…-owner`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from time import time
from typing import get_args

import msgspec

from gateway.ledger.cleaning import clean_text, cleaned
from gateway.ledger.contract import LedgerDown
from gateway.ledger.rows import AnyRow
from gateway.ledger.sqlite import Change, SqliteStore

_log = logging.getLogger("tierway.ledger")

_TABLES: tuple[Change, ...] = (
    ("CREATE TABLE IF NOT EXISTS spooled (id INTEGER PRIMARY KEY AUTOINCREMENT, size INTEGER, batch BLOB)", ()),
    ("CREATE TABLE IF NOT EXISTS set_aside (id INTEGER PRIMARY KEY, at_ms INTEGER, size INTEGER, why TEXT, what)", ()),
)
_SET_ASIDE = "INSERT INTO set_aside (at_ms, size, why, what) VALUES (?, ?, ?, ?)"
_MOVE_ASIDE = "INSERT INTO set_aside (at_ms, size, why, what) SELECT ?, size, ?, batch FROM spooled WHERE id = ?"
_FORGET_ONE = "DELETE FROM spooled WHERE id = ?"
_COUNT = (
    "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM spooled UNION ALL SELECT 0, COALESCE(SUM(size), 0) FROM set_aside"
)
_DECODERS: dict[str, msgspec.msgpack.Decoder[AnyRow]] = {
    row.TABLE: msgspec.msgpack.Decoder(row) for row in get_args(AnyRow)
}
_UNFIT = (OverflowError, UnicodeError, ValueError)


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What was to be written at once: rows, and the ids of exchanges that are open no more. Ids go up."""

    id: int
    rows: tuple[AnyRow, ...]
    closed: tuple[str, ...]


_Record = tuple[dict[str, list[msgspec.Raw]], tuple[str, ...]]
"""Rows by table, and ids that are closed: how a batch lies in the file."""


class SpoolFile:
    """Batches in a file. `rows` are those that wait, `set_aside_rows` those that were refused; made by `claim`."""

    def __init__(self, store: SqliteStore, owner: int) -> None:
        self.path = store.path
        self._store = store
        self._owner: int | None = owner
        self._turn = threading.Lock()
        self.batches = self.rows = self.set_aside_rows = 0
        store.change(_TABLES)
        self._count()

    def put(self, rows: Sequence[AnyRow], closed: Sequence[str]) -> None:
        """Append a batch, durable on return. Raises `LedgerDown`: the file is full, or its disk."""
        unfit: list[tuple[list[AnyRow], str]] = []
        try:
            record = _packed(rows, closed)
        except _UNFIT:
            rows, unfit = _fit(rows)
            record = _packed(rows, [clean_text(one) for one in closed])
        with self._turn:
            self._store.change([("INSERT INTO spooled (size, batch) VALUES (?, ?)", (len(rows), record))])
            self.batches += 1
            self.rows += len(rows)
        for part, why in unfit:
            self.set_aside(part, why)

    def oldest(self, most_rows: int) -> list[Batch]:
        """Return the batches that came first: as many as have so many rows together, one at least if there is any."""
        found: list[Batch] = []
        broken: list[tuple[int, str]] = []
        with self._store.reading() as reading:
            for number, record in reading.rows("SELECT id, batch FROM spooled ORDER BY id"):
                try:
                    found.append(_unpacked(int(number or 0), record))
                except (zlib.error, msgspec.MsgspecError, KeyError, TypeError) as fault:
                    broken.append((int(number or 0), str(fault)))
                if sum(len(batch.rows) for batch in found) >= most_rows:
                    break
        for number, why in broken:
            self._set_aside_record(number, f"it cannot be read by this program: {why}")
        return found

    def forget(self, batches: Sequence[Batch]) -> None:
        """Delete what `oldest` has returned."""
        if not batches:
            return
        with self._turn:
            self._store.change([("DELETE FROM spooled WHERE id <= ?", (batches[-1].id,))])
            self.batches -= len(batches)
            self.rows -= sum(len(batch.rows) for batch in batches)

    def set_aside(self, rows: Sequence[AnyRow], why: str) -> None:
        """Keep rows that no database will take, as JSON, with the reason; durable on return. Raises `LedgerDown`."""
        # Of the standard library, which writes numbers of any size and halves of surrogate pairs.
        what = json.dumps([{"table": row.TABLE, **msgspec.to_builtins(row)} for row in rows])
        with self._turn:
            self._store.change([(_SET_ASIDE, (int(time() * 1000), len(rows), clean_text(why), what.encode()))])
            self.set_aside_rows += len(rows)
        _log.error("%d rows of the ledger were set aside in %s: %s", len(rows), self.path, why)

    def _count(self) -> None:
        with self._store.reading() as reading:
            (self.batches, self.rows), (_, self.set_aside_rows) = (
                (int(number or 0), int(size or 0)) for number, size in reading.rows(_COUNT)
            )

    def close(self) -> None:
        """Close the file and let others have it."""
        self._store.close()
        owner, self._owner = self._owner, None
        if owner is not None:
            os.close(owner)

    def _set_aside_record(self, number: int, why: str) -> None:
        with self._turn:
            self._store.change([(_MOVE_ASIDE, (int(time() * 1000), why, number)), (_FORGET_ONE, (number,))])
            self._count()
        _log.error("a batch of the ledger was set aside in %s: %s", self.path, why)


def claim(path: Path, most_bytes: int) -> SpoolFile | None:
    """Open the file and own it, made if it is not there; None where another process owns it. Raises `LedgerDown`."""
    try:
        owner = os.open(path.with_name(path.name + "-owner"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LedgerDown(f"The spool {path} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return SpoolFile(SqliteStore(path, most_bytes=most_bytes), owner)
    except BlockingIOError:
        os.close(owner)
        return None
    except BaseException:
        os.close(owner)
        raise


def claim_any(path: Path, most_bytes: int) -> SpoolFile:
    """Own the first file that nobody owns: `path`, else `path` with `-1`, `-2`, … in its name. Raises `LedgerDown`."""
    for number in count():
        file = claim(_numbered(path, number), most_bytes)
        if file is not None:
            return file
    raise AssertionError


def claim_left(path: Path, most_bytes: int) -> Iterator[SpoolFile]:
    """Own, one after the other, the files of this name that nobody owns. Whoever gets one closes it."""
    name = re.compile(rf"{re.escape(path.stem)}(-[0-9]+)?{re.escape(path.suffix)}")
    for one in sorted(path.parent.iterdir()):
        if name.fullmatch(one.name):
            try:
                file = claim(one, most_bytes)
            except LedgerDown as fault:
                _log.warning("a spool that was left behind cannot be used: %s", fault)
            else:
                if file is not None:
                    yield file


def parts_of(rows: Sequence[AnyRow]) -> list[list[AnyRow]]:
    """Return what may be taken or refused by itself: all rows of one exchange, or one of any others."""
    parts: dict[object, list[AnyRow]] = {}
    for number, row in enumerate(rows):
        parts.setdefault(getattr(row, "exchange_id", number), []).append(row)
    return list(parts.values())


def _fit(rows: Sequence[AnyRow]) -> tuple[list[AnyRow], list[tuple[list[AnyRow], str]]]:
    """Return the rows that can be written down, cleaned, and the parts that cannot, each with the reason."""
    fit: list[AnyRow] = []
    unfit: list[tuple[list[AnyRow], str]] = []
    for part in parts_of([cleaned(row) for row in rows]):
        try:
            _packed(part, ())
        except _UNFIT as fault:
            unfit.append((part, str(fault)))
        else:
            fit.extend(part)
    return fit, unfit


def _packed(rows: Sequence[AnyRow], closed: Sequence[str]) -> bytes:
    tables: dict[str, list[AnyRow]] = {}
    for row in rows:
        tables.setdefault(row.TABLE, []).append(row)
    return zlib.compress(msgspec.msgpack.encode((tables, closed)), 1)


def _unpacked(number: int, record: object) -> Batch:
    assert isinstance(record, bytes)  # noqa: S101 - the column's type
    tables, closed = msgspec.msgpack.decode(zlib.decompress(record), type=_Record)
    rows = tuple(_DECODERS[table].decode(row) for table, some in tables.items() for row in some)
    return Batch(id=number, rows=rows, closed=closed)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path
