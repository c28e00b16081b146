"""How are rows kept in PostgreSQL, and how long may that take? As long as the operator says, whatever it is that fails.

A connection that did not answer in time is given up, and its session in the server is ended before another one writes:
it may have been told to write what it would write late.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import cache
from time import monotonic, time
from typing import cast, get_type_hints

import msgspec

from gateway.ledger import schema as tables
from gateway.ledger.cleaning import clean_text, cleaned
from gateway.ledger.contract import BadRows, LedgerDown, Reading, Value
from gateway.ledger.postgres_line import Address, Fault, Link, Session, Snapshot, placed, quoted
from gateway.ledger.rows import AnyRow, OpenRow

_Statement = tuple[bytes, tuple[object, ...]]

_MIGRATE_S = 3600.0
# What the server says of a row and not of itself: data, integrity, and program limits (an index entry too long).
_OF_THE_ROWS = ("21", "22", "23", "54")


class PostgresStore:
    """A `Store` in the schema `schema` of the database at `dsn`, made and brought up to date at the first connection.

    PostgreSQL 14 or newer; a pooler in between has to keep sessions apart.

    `timeout_s` is how long one `write` may take, connecting included; a query of a report may take `report_timeout_s`.
    Raises ValueError where the address cannot be read.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "tierway",
        timeout_s: float = 1.0,
        report_timeout_s: float = 60.0,
    ) -> None:
        self._address = Address(dsn)
        self._schema = schema
        self._timeout_s = timeout_s
        self._report_timeout_s = report_timeout_s
        self._migrations = tables.migrations()
        self._link: Link | None = None
        self._dialing: Future[Link] | None = None
        self._given_up: Session | None = None

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        until_s = monotonic() + self._timeout_s
        statements = _statements(rows, closed)
        used_before = self._link is not None
        try:
            self._transact(statements, until_s)
        except BadRows:
            raise
        except LedgerDown:
            # One that was used before may have been broken since, by a restart of the server or a failover.
            if not used_before or monotonic() >= until_s:
                raise
            self._transact(statements, until_s)

    def change(self, changes: Iterable[tuple[str, Sequence[Value]]]) -> None:
        """Do all of this in one transaction, or nothing; it may take as long as a report. Raises as `write`."""
        # The server gives up what takes longer than a `write`, unless it is told otherwise.
        longer = b"SELECT set_config(name, %s, true) FROM unnest(%s::text[]) AS told (name)"
        limits = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
        statements: list[_Statement] = [(longer, (f"{self._report_timeout_s * 1000:.0f}", limits))]
        statements += [(placed(sql), tuple(values)) for sql, values in changes]
        self._transact(statements, monotonic() + self._report_timeout_s)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        link = self._open(writes=False)
        with closing(link):
            yield Snapshot(link, self._address, self._report_timeout_s)

    @contextmanager
    def leading(self, name: str) -> Iterator[bool]:
        """Be the only one who does `name` on this database for as long as the block runs; False: another one is.

        A leader whose connection breaks may not know it, and another one begins seconds later: what it does must bear
        to be done twice. Raises `LedgerDown`.
        """
        link = self._open(writes=False)
        with closing(link):
            try:
                # The lock of a transaction, not of a session: it holds behind a pooler too.
                link.execute("BEGIN")
                link.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
                got = link.execute("SELECT pg_try_advisory_xact_lock(%s)", (self._lock(name),)).fetchone()
            except Fault as error:
                raise self._address.fault(error) from None
            yield got == (1,)

    def close(self) -> None:
        self._hang_up()
        if self._dialing is not None:
            self._dialing.add_done_callback(_close_what_came)
            self._dialing = None

    def _transact(self, statements: Sequence[_Statement], until_s: float) -> None:
        link = self._connected(until_s)
        link.until_s = until_s
        try:
            if len(statements) == 1:
                link.execute(*statements[0])
            else:
                with link.transaction():
                    for text, values in statements:
                        link.execute(text, values)
        except Fault as error:
            if error.sqlstate is None or not error.sqlstate.startswith(_OF_THE_ROWS):
                self._hang_up()
                raise self._address.fault(error) from None
            refused = BadRows(f"{self._address.name} refuses rows: {self._address.words(error)}")
        else:
            return
        # Rows that a newer program's tables refuse are not bad.
        self._check_version(link)
        raise refused

    def _connected(self, until_s: float) -> Link:
        """Return a connection, if one is to be had until then.

        It is made in a thread of its own, because the look-up of a name knows no time limit, and because connecting
        may take longer than one write may: it goes on, and the next write has it.
        """
        if self._link is not None and not self._link.closed:
            return self._link
        dialing = self._dialing
        if dialing is None or (dialing.done() and dialing.exception() is not None):
            dialing = self._dialing = Future()
            threading.Thread(target=self._dial, args=(dialing,), name="ledger-dial", daemon=True).start()
        try:
            self._link = dialing.result(max(0.0, until_s - monotonic()))
        except TimeoutError:
            raise LedgerDown(
                f"{self._address.name} does not answer: connecting takes longer than the time for it"
            ) from None
        self._dialing = self._given_up = None
        return self._link

    def _dial(self, dialing: Future[Link]) -> None:
        try:
            dialing.set_result(self._open(writes=True))
        except BaseException as fault:  # noqa: BLE001 - it is raised where somebody waits for the connection
            dialing.set_exception(fault)

    def _open(self, *, writes: bool) -> Link:
        """Return a new connection that is ready for use. Raises `LedgerDown`."""
        link: Link | None = None
        try:
            link = self._address.connect()
            self._prepare(link, writes=writes)
        except BaseException as fault:
            if link is not None:
                link.close()
            if isinstance(fault, Fault):
                raise self._address.fault(fault) from None
            raise
        return link

    def _prepare(self, link: Link, *, writes: bool) -> None:
        link.prepare(self._schema, self._timeout_s if writes else self._report_timeout_s)
        found = self._version(link)
        if not writes:
            tables.readable(found, self._migrations, self._address.name)
            return
        # Who asks for more than `on`, a standby that has applied it, keeps it.
        link.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') <> 'remote_apply'"
        )
        link.note_session()
        if self._given_up is not None:
            link.end(self._given_up)
        if tables.pending(found, self._migrations, self._address.name):
            self._migrate(link)

    def _check_version(self, link: Link) -> None:
        try:
            tables.readable(self._version(link), self._migrations, self._address.name)
        except Fault as error:
            self._hang_up()
            raise self._address.fault(error) from None

    def _version(self, link: Link) -> int | None:
        there = link.execute("SELECT to_regclass('schema_version') IS NOT NULL").fetchone()
        if there != (1,):
            return None
        row = link.execute(tables.FIND_VERSION).fetchone()
        return None if row is None else cast("int | None", row[0])

    def _migrate(self, link: Link) -> None:
        """Bring the schema up to date. Of several replicas that try one does, and the others find it done."""
        link.until_s = monotonic() + _MIGRATE_S
        with link.transaction():
            link.execute("SELECT set_config(name, '0', true) FROM unnest(ARRAY['statement_timeout', 'lock_timeout',"
                         " 'idle_in_transaction_session_timeout']) AS told (name)")  # fmt: skip
            link.execute("SELECT pg_advisory_xact_lock(%s)", (self._lock("migrations"),))
            # Asked first: `IF NOT EXISTS` wants the right to make one even where it is there.
            if link.execute("SELECT to_regnamespace(current_setting('search_path'))").fetchone() == (None,):
                link.execute(f"CREATE SCHEMA {quoted(self._schema)}".encode())
            link.execute(tables.MAKE_VERSIONS)
            for migration in tables.pending(self._version(link), self._migrations, self._address.name):
                for statement in migration.statements:
                    link.execute(statement.encode())
                link.execute(placed(tables.NOTE_VERSION), (migration.version, int(time() * 1000)))

    def _lock(self, name: str) -> int:
        """Return the number of the advisory lock `name`. They are counted by database, and ours by schema."""
        text = f"tierway\0{self._schema}\0{name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)

    def _hang_up(self) -> None:
        if self._link is not None:
            self._given_up = self._link.session
            self._link.close()
            self._link = None


def _close_what_came(dialing: Future[Link]) -> None:
    if dialing.exception() is None:
        dialing.result().close()


def _statements(rows: Sequence[AnyRow], closed: Sequence[str]) -> list[_Statement]:
    """Return the statements that write these rows, to be run in this order. Raises `BadRows`.

    It is one, and a transaction by itself, unless a key comes more than once: a statement writes a row once at most.
    """
    gone = frozenset(closed)
    rounds: list[dict[str, dict[object, AnyRow]]] = [{}]
    for row in rows:
        if isinstance(row, OpenRow) and row.exchange_id in gone:
            continue
        key = _key(type(row))(row)
        there = (one.setdefault(row.TABLE, {}) for one in rounds)
        free = next((table for table in there if key not in table), None)
        if free is None and row.WHEN_THERE == "ignore":
            continue
        if free is None:
            rounds.append({row.TABLE: {key: row}})
        else:
            free[key] = row
    statements = [_statement(one) for one in rounds[:-1]]
    return [*statements, _statement(rounds[-1], closed)]


def _statement(rows: dict[str, dict[object, AnyRow]], closed: Sequence[str] = ()) -> _Statement:
    """Return one statement that writes rows of several tables, given as one JSON array a table.

    That takes a fifth of the CPU, on our side, of statements with a value for each column, and half of their time.
    """
    names = tuple(table.name for table in tables.TABLES if table.name in rows)
    # Sorted, so that replicas that write the same rows do not wait for each other in a ring.
    values = tuple(_encoded([one[1] for one in sorted(rows[name].items())]) for name in names)
    return _insert(names), (*values, [clean_text(one) for one in closed])


def _encoded(rows: list[AnyRow]) -> str:
    try:
        text = msgspec.json.encode(rows)
    except UnicodeEncodeError:
        text = b"\\u0000"
    try:
        if b"\\u0000" in text:
            text = msgspec.json.encode([cleaned(row) for row in rows])
    except (OverflowError, ValueError) as fault:
        raise BadRows(f"rows cannot be written down: {fault}") from None
    return text.decode()


@cache
def _insert(names: tuple[str, ...]) -> bytes:
    """Return the statement that writes rows of these tables and forgets open exchanges."""
    parts = []
    for table in tables.TABLES:
        if table.name in names:
            columns = ", ".join(
                # Bytes come as base64, which as a text for BYTEA stands for itself.
                f"decode(encode({column}, 'escape'), 'base64')" if column in _bytes(table.name) else column
                for column in table.columns
            )
            places = ", ".join("?" * len(table.columns))
            rows = f"SELECT {columns} FROM json_populate_recordset(NULL::{table.name}, %s::json)"  # noqa: S608 - names of ours
            parts.append(f"into_{table.name} AS ({table.insert.replace(f'VALUES ({places})', rows)})")
    close = "DELETE FROM open_exchanges WHERE exchange_id = ANY(%s::text[])"
    return (f"WITH {', '.join(parts)} {close}" if parts else close).encode()


@cache
def _bytes(name: str) -> frozenset[str]:
    (row,) = (row for row in AnyRow.__args__ if name == row.TABLE)
    return frozenset(column for column, kind in get_type_hints(row).items() if kind is bytes)


@cache
def _key(row: type[AnyRow]) -> Callable[[AnyRow], object]:
    return operator.attrgetter(*row.KEY)
