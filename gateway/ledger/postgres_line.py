"""How is one connection to PostgreSQL made, and how long may it wait? Until one moment, whatever it waits for.

So a server that is frozen, or behind a firewall that drops packets, holds nobody up for longer. What is said to the
operator never has a password in it. This module alone knows psycopg.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import TypeVar

import msgspec
import psycopg
from psycopg.abc import Buffer, ConnParam, PQGen
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from gateway.ledger.contract import LedgerDown, Value

Fault = psycopg.Error
"""Whatever psycopg raises."""

_T = TypeVar("_T")
_Values = tuple[Value, ...]

_CONNECT_S = 10
_PREPARE_S = 10.0
_LONGEST_MESSAGE = 300
_SECRETS = ("password", "sslpassword", "passfile", "sslkey")
# A connection whose other end has gone without a word is found out, by either end, in about so many seconds.
_SILENT_S = 10
_OURS: dict[str, ConnParam] = {
    "application_name": "tierway",
    "connect_timeout": _CONNECT_S,
    "target_session_attrs": "read-write",
    "tcp_user_timeout": _SILENT_S * 1000,
    "keepalives": 1,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
_SESSION = {
    "tcp_keepalives_idle": "4",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": str(_SILENT_S * 1000),
    "client_min_messages": "error",
}


class Session(msgspec.Struct, frozen=True):
    """A connection as the server knows it. The process id alone may be another's later."""

    pid: int
    started: str


class Link(psycopg.Connection[_Values]):
    """A connection that waits until `until_s` (monotonic) for whatever it waits for."""

    until_s = 0.0
    session: Session

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        left_s = max(0.0, self.until_s - monotonic())
        try:
            return super().wait(gen, interval, left_s if timeout is None else min(left_s, timeout))
        except psycopg.OperationalError as fault:
            if fault.sqlstate is None and monotonic() >= self.until_s:
                raise psycopg.errors.ConnectionTimeout("it does not answer in the time for it") from None
            raise

    def prepare(self, schema: str, limit_s: float) -> None:
        """Make it ready for use: the server gives a statement up, and a transaction that stands still, as we do."""
        self.adapters.register_loader("numeric", _NumberLoader)
        self.adapters.register_loader("bool", _TruthLoader)
        self.until_s = monotonic() + _PREPARE_S
        settings = {
            **_SESSION,
            "search_path": quoted(schema),
            "statement_timeout": f"{limit_s * 1000:.0f}",
            "lock_timeout": f"{limit_s * 1000:.0f}",
            "idle_in_transaction_session_timeout": f"{max(1.0, limit_s) * 1000:.0f}",
        }
        self.execute(
            "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS told (name, value)",
            (list(settings), list(settings.values())),
        )

    def note_session(self) -> None:
        """Ask the server how it knows this connection."""
        ask = "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        ((pid, started),) = self.execute(ask).fetchall()
        self.session = Session(int(pid or 0), str(started))

    def end(self, session: Session) -> None:
        """End another connection of the same role, if it is still there, and wait a while until it is gone."""
        self.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid = %s AND backend_start::text = %s",
            (session.pid, session.started),
        )


class _NumberLoader(Loader):
    """A sum of BIGINTs is NUMERIC here; SQLite gives an integer, and where it divides a float."""

    def load(self, data: Buffer) -> int | float:
        text = bytes(data)
        return int(text) if text.lstrip(b"-").isdigit() else float(text)


class _TruthLoader(Loader):
    """A comparison is 0 or 1 in SQLite."""

    def load(self, data: Buffer) -> int:
        return int(bytes(data) == b"t")


class Address:
    """Where a database is, and how it is spoken of. Raises ValueError, without the address, where it cannot be read."""

    def __init__(self, dsn: str) -> None:
        told: dict[str, ConnParam] = {}
        with suppress(psycopg.Error):  # not even as what was met before the other error
            told = {**conninfo_to_dict(dsn)}
        # A password with a `:`, `@` or `/` in it may be read as a part of another thing, and would be shown as such.
        ports = str(told.get("port") or "5432").split(",")
        names = (str(told.get(name, "")) for name in ("host", "dbname"))
        if not told or not all(port.isdigit() for port in ports) or any("@" in name for name in names):
            raise ValueError(
                "the address of the ledger's database cannot be read: it is postgresql://user:password@host:port/name, "
                "and signs in a password are written like %40"
            )
        self._conninfo = make_conninfo("", **{**_OURS, **told, "client_encoding": "utf8"})
        self._secrets = tuple(str(told[name]) for name in _SECRETS if told.get(name))
        host, port = told.get("host") or "its default host", told.get("port") or 5432
        self.name = f"PostgreSQL {told.get('dbname') or 'default'} at {host}:{port}"

    def connect(self) -> Link:
        """Return a new connection. Raises psycopg's errors."""
        return Link.connect(self._conninfo, autocommit=True)

    def words(self, error: psycopg.Error) -> str:
        """Return what the database says, for the operator."""
        # What it says beyond its first sentence may have the values of a row in it.
        words = error.diag.message_primary or " ".join(str(error).split()) or type(error).__name__
        for secret in self._secrets:
            words = words.replace(secret, "***")
        return words[:_LONGEST_MESSAGE]

    def fault(self, error: psycopg.Error) -> LedgerDown:
        """Return what to raise when the database has failed like this."""
        return LedgerDown(f"{self.name}: {self.words(error)}")


class Snapshot:
    """A `Reading`: everything it reads is of the moment of its first query. A query may take `limit_s`."""

    def __init__(self, link: Link, address: Address, limit_s: float) -> None:
        link.autocommit = False
        link.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        link.read_only = True
        self._link = link
        self._address = address
        self._limit_s = limit_s
        self._chunk = 1000 if psycopg.capabilities.has_stream_chunked() else 1
        self._unread: _Answer | None = None

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Iterator[_Values]:
        if self._unread is not None:
            # A connection gives one answer at a time: what is left of the one before is taken in.
            self._unread.take_in()
        stream = self._link.cursor().stream(placed(sql), tuple(values), size=self._chunk)
        self._unread = _Answer(stream, self._next)
        return self._unread

    def _next(self, stream: Iterator[_Values]) -> _Values | None:
        self._link.until_s = monotonic() + self._limit_s
        try:
            return next(stream, None)
        except psycopg.Error as error:
            raise self._address.fault(error) from None


class _Answer(Iterator[_Values]):
    """The rows of one query, which come as they are asked for."""

    def __init__(self, stream: Iterator[_Values], take: Callable[[Iterator[_Values]], _Values | None]) -> None:
        self._stream = stream
        self._take = take
        self._taken: deque[_Values] = deque()

    def __next__(self) -> _Values:
        row = self._taken.popleft() if self._taken else self._take(self._stream)
        if row is None:
            raise StopIteration
        return row

    def take_in(self) -> None:
        """Take what is left of it, so that the connection is free for another query."""
        while (row := self._take(self._stream)) is not None:
            self._taken.append(row)


def quoted(name: str) -> str:
    """Return a name as it stands in a statement."""
    return '"' + name.replace('"', '""') + '"'


def placed(sql: str) -> bytes:
    """Return a query of both databases' dialect, which has a `?` for each value, as psycopg wants it."""
    return re.sub(
        r"'[^']*'|\"[^\"]*\"|\?",
        lambda found: "%s" if found[0] == "?" else found[0],
        sql.replace("%", "%%"),
    ).encode()
