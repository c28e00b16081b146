"""How are rows kept in a file? SQLite, durable when a write returns, for several processes of one machine.

The only module that knows sqlite3. Rules a reader must not break:

* Whoever writes holds the lock of the file `…-turn` meanwhile: SQLite alone lets those who wait sleep by chance, for
  seconds when others are busy.
* Many rows go in one statement: sqlite3 gives up the interpreter's lock at every step of one and gets it back when
  the event loop pleases.
* A file that is not ours, or damaged, is never written to.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from time import monotonic, time

from gateway.ledger.contract import BadRows, LedgerDown, Reading, Value
from gateway.ledger.rows import AnyRow
from gateway.ledger.schema import (
    FIND_VERSION,
    MAKE_VERSIONS,
    NOTE_VERSION,
    TABLES,
    Table,
    Values,
    by_table,
    migrations,
    pending,
    readable,
)

Change = tuple[str, Sequence[Value]]
"""A statement and its values."""

_SIZES = (64, 16, 4, 1)
_READ_CACHE_KIB = 64 * 1024
_WAL_BYTES = 64 * 1024 * 1024
_LOOK_EVERY_S = 1.0
# A disk that was full takes a little again at once, when the file is tidied up; that is no room to go on with.
_ROOM_BYTES = 16 * 1024 * 1024
# What is wrong with the rows, not with the file.
_BAD = (OverflowError, UnicodeError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError)

_INSERTS = {(table.name, size): table.insert_many(size) for table in TABLES for size in _SIZES}
_CLOSES = {
    size: f"DELETE FROM open_exchanges WHERE exchange_id IN ({', '.join('?' * size)})"  # noqa: S608 - placeholders
    for size in _SIZES
}
_ADVICE = {
    sqlite3.SQLITE_FULL: "its disk is full, or it may not grow any more: make room",
    sqlite3.SQLITE_IOERR: "its disk does not take or give what it should: look after the disk and its free space",
    sqlite3.SQLITE_BUSY: "another program has it locked: end what has it open, or let it finish",
    sqlite3.SQLITE_READONLY: "it may not be written: the file and its folder must be writable for this user",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: the file and its folder must be readable and writable for this user",
    sqlite3.SQLITE_PERM: "it may not be opened by this user",
    sqlite3.SQLITE_NOTADB: "it is not a file of SQLite. Nothing was changed: name another file, or move this one away",
    sqlite3.SQLITE_CORRUPT: "it is damaged or cut off. Move it away and restore it from a backup, or save what can be "
    "saved with `sqlite3 FILE .recover`",
}


class SqliteStore:
    """A `Store` in one file.

    `shared` says that other gateways write to it often; one that does now and then is waited for in any case, `busy_s`
    at most. With `most_bytes` the file never grows beyond.
    """

    def __init__(
        self,
        path: Path,
        *,
        shared: bool = True,
        busy_s: float = 2.0,
        most_bytes: int | None = None,
        now: Callable[[], float] = time,
    ) -> None:
        self.path = path
        self._shared = shared
        self._busy_s = busy_s
        self._most_bytes = most_bytes
        self._now = now
        self._known = migrations()
        self._db: sqlite3.Connection | None = None
        self._turn: int | None = None
        self._file: tuple[int, int] | None = None
        self._look_s = 0.0
        self._full = False

    def open(self) -> None:
        """Make the file where there is none, or bring it up to date. Raises `LedgerDown`, and changes nothing then.

        Its folder must be there: where a disk was not mounted, a new ledger would hide the old one.
        """
        with self._explained():
            self._connection()

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        self.change(chain(_inserts(rows), _chunked(_CLOSES, [(one,) for one in closed])))

    def change(self, changes: Iterable[Change]) -> None:
        """Do all of this in one transaction, durable on return, or nothing. Raises as `write`, from its thread."""
        with self._explained():
            if self._full:
                self._look_for_room()
            db = self._connection()
            with self._my_turn() if self._shared else nullcontext():
                self._do(db, changes)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Open a connection of its own: it sees the file as it was at the first row. Needs no `open`."""
        if not self.path.exists():
            raise LedgerDown(f"There is no ledger {self.path}.")
        with ExitStack() as stack:
            with self._explained():
                db = sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode=ro",
                    uri=True,
                    isolation_level=None,
                    timeout=self._busy_s,
                    check_same_thread=False,  # one thread at a time, but any
                )
                stack.callback(db.close)
                db.execute(f"PRAGMA cache_size = -{_READ_CACHE_KIB}")
                db.execute("BEGIN")
                readable(_version(db, self.path), self._known, str(self.path))
            yield _SqliteReading(db, self._explained)

    def size_bytes(self) -> int:
        """Return how large the file is, with what was written but not yet put in its place."""
        names = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(one.stat().st_size for one in names if one.exists())

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()
        turn, self._turn = self._turn, None
        if turn is not None:
            os.close(turn)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _do(self, db: sqlite3.Connection, changes: Iterable[Change]) -> None:
        try:
            db.execute("BEGIN IMMEDIATE")
            for sql, values in changes:
                db.execute(sql, values)
            db.execute("COMMIT")
        except _BAD:
            db.execute("ROLLBACK")
            raise
        except BaseException:
            # Closing rolls back. A connection that has met a fault is not trusted again.
            self.close()
            raise

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        turn = self._turn
        assert turn is not None  # noqa: S101 - opened with the connection
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if self._turn is not None:  # closed, it is let go
                fcntl.flock(turn, fcntl.LOCK_UN)

    # -- opening ------------------------------------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and self._still_there():
            return self._db
        self.close()
        if not self.path.parent.is_dir():
            raise LedgerDown(
                f"The ledger {self.path} cannot be opened: the folder {self.path.parent} is not there. "
                "Make it, or mount the disk it should be on."
            )
        self._turn = os.open(
            self.path.with_name(self.path.name + "-turn"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
        )
        try:
            with self._my_turn():
                self._make_file()
                self._db = self._connect()
                self._upgrade(self._db)
        except BaseException:
            self.close()
            raise
        return self._db

    def _still_there(self) -> bool:
        """Whether the file that is open is the one of that name: what is written to a deleted file is gone."""
        if (now_s := monotonic()) < self._look_s:
            return True
        try:
            stat = self.path.stat()
        except FileNotFoundError as error:
            raise LedgerDown(
                f"The ledger {self.path} was removed while it was in use. Put it back; a restart begins a new one."
            ) from error
        self._look_s = now_s + _LOOK_EVERY_S
        return (stat.st_dev, stat.st_ino) == self._file

    def _look_for_room(self) -> None:
        disk = os.statvfs(self.path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < _ROOM_BYTES:
            raise LedgerDown(
                f"The ledger {self.path}: its disk was full, and {free} bytes of it are free now: make room for "
                f"{_ROOM_BYTES} at least."
            )
        self._full = False

    def _make_file(self) -> None:
        if self.path.exists():
            return
        if self._file is not None:
            self._look_s = 0.0
            self._still_there()
        # To close a file of SQLite takes away the locks of the process, so only one that nobody knows yet is opened.
        os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _connect(self) -> sqlite3.Connection:
        # Opened at the start, used by the thread that writes; never by both.
        db = sqlite3.connect(self.path, isolation_level=None, timeout=self._busy_s, check_same_thread=False)
        try:
            _version(db, self.path)  # before anything is written
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
            if self._most_bytes is not None:
                (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
                db.execute(f"PRAGMA max_page_count = {max(1, self._most_bytes // page_bytes)}")
        except BaseException:
            db.close()
            raise
        stat = self.path.stat()
        self._file = (stat.st_dev, stat.st_ino)
        return db

    def _upgrade(self, db: sqlite3.Connection) -> None:
        todo = pending(_version(db, self.path), self._known, str(self.path))
        if not todo:
            return
        changes: list[Change] = [(MAKE_VERSIONS, ())]
        for step in todo:
            changes += [(one, ()) for one in step.statements]
            changes.append((NOTE_VERSION, (step.version, int(self._now() * 1000))))
        self._do(db, changes)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite and the system say into what an operator can act on."""
        try:
            yield
        except _BAD as error:
            raise BadRows(f"The ledger {self.path} cannot hold these rows: {error}.") from error
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            self._full = self._full or code == sqlite3.SQLITE_FULL
            advice = _ADVICE.get(code, "it could not be used")
            raise LedgerDown(f"The ledger {self.path}: {advice} ({error}).") from error


class _SqliteReading:
    """Rows as they were when it began."""

    def __init__(self, db: sqlite3.Connection, explained: Callable[[], AbstractContextManager[None]]) -> None:
        self._db = db
        self._explained = explained

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Iterator[tuple[Value, ...]]:
        with self._explained():
            yield from self._db.execute(sql, values)


def _version(db: sqlite3.Connection, path: Path) -> int | None:
    """Return the version of the schema, None of an empty file. Raises `LedgerDown` of another program's file."""
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "schema_version" in names:
        found: int | None = db.execute(FIND_VERSION).fetchone()[0]
        return found
    if names:
        raise LedgerDown(
            f"The file {path} is no ledger: it has tables of another program. Nothing was changed: name another file."
        )
    return None


def _inserts(rows: Sequence[AnyRow]) -> Iterator[Change]:
    return chain.from_iterable(_of_table(table, values) for table, values in by_table(rows))


def _of_table(table: Table, values: list[Values]) -> Iterator[Change]:
    return _chunked({size: _INSERTS[table.name, size] for size in _SIZES}, values)


def _chunked(statements: dict[int, str], values: list[Values]) -> Iterator[Change]:
    """Yield as few statements as have room for all of these, of a few sizes: each is parsed once."""
    done = 0
    for size, sql in statements.items():
        while len(values) - done >= size:
            yield sql, list(chain.from_iterable(values[done : done + size]))
            done += size
