"""On what ground are the proofs of the ledger played? A gateway with a ledger that can be killed, on disks that can lose.

The ledger is a file of SQLite or a PostgreSQL. With `cuts` every kill is a power cut: what was written there and not
synced is lost. Processes are started by the thread that calls, whose end they are bound to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, Literal

import msgspec
import psycopg

from gateway.ledger.contract import Store
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.sqlite import SqliteStore
from gateway.ledger.verify import verify
from tests.prove.ledger_upstream import PRICES, TIERS, Troubled
from tests.prove.ledger_users import Crowd, secret
from tests.prove.limits_upstream import Metered, metered
from tests.running import OPERATOR, Gateway, alive, descendants, key_line, wait_until
from tests.servers.postgres import Cluster, open_folder
from tests.servers.unsynced import Disk, Lost, library

StoreKind = Literal["sqlite", "postgres"]
KEYS = ["ann", "ben", "cleo"]
_POSTGRES = ("max_connections=60", "shared_buffers=32MB")
_SMALL_CLUSTER = ("--wal-segsize=1",)
"""Segments of one megabyte, so that an image of them is cheap."""
LEASE_S = 2.0


class Rows(msgspec.Struct, kw_only=True):
    """What the ledger has, each row by the names of its columns, of deliveries whether they were made.

    `open` is how many exchanges it has as open, `waiting` how many rows the spool still holds.
    """

    exchanges: list[dict[str, Any]]
    attempts: dict[str, list[dict[str, Any]]]
    delivered: dict[str, int]
    open: int
    waiting: int


class Site:
    """All that stands. `cluster` is None where the ledger is a file."""

    def __init__(
        self,
        stack: ExitStack,
        kind: StoreKind,
        *,
        cuts: bool = False,
        workers: int = 1,
        tells: bool = True,
        change: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.kind = kind
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="tierway-pg-", dir=open_folder()))
        self.folder = Path(name)
        self.folder.chmod(0o755)
        self._options = () if workers == 1 else ("--workers", str(workers))
        self.upstream: Metered = stack.enter_context(metered(*TIERS.values(), tells=tells, kind=Troubled))
        self.kept = self._made("kept")
        self.cluster: Cluster | None = None
        self.data_disk: Disk | None = None
        self.kept_disk: Disk | None = None
        shim = library(self.folder) if cuts else None
        if kind == "postgres":
            self.cluster = Cluster(self._made("server"), *_POSTGRES, made_with=_SMALL_CLUSTER)
            stack.callback(self.cluster.stop)
            if shim is not None:
                self.data_disk = Disk(self.cluster.data, self._made("images-of-server"), shim)
                self.cluster.environment = self.data_disk.environment
            self.cluster.start()
        if shim is not None:
            self.kept_disk = Disk(self.kept, self._made("images-of-kept"), shim)
        self.config = config_of(self.upstream.port, self._ledger())
        change(self.config)
        self._gateway: Gateway | None = None
        stack.callback(self._stop_whatever_runs)

    @property
    def gateway(self) -> Gateway:
        """The gateway that runs."""
        if self._gateway is None:
            raise LookupError("no gateway runs")
        return self._gateway

    def start_gateway(self) -> Gateway:
        """Start a gateway, and wait until it knows its backends."""
        environment: dict[str, str] = {}
        if self.cluster is not None:
            environment["LEDGER_DSN"] = self.cluster.server.url
        if self.kept_disk is not None:
            environment |= self.kept_disk.environment
        self._gateway = Gateway(self.config, self.folder, *self._options, environment=environment)
        assert self._gateway.all_up(20), self._gateway.states()
        return self._gateway

    def kill_gateway(self) -> None:
        """End all processes of the gateway at once, and return when they are gone."""
        gateway, self._gateway = self.gateway, None
        everyone = [gateway.pid, *descendants(gateway.pid)]
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        gateway.process.wait()
        assert wait_until(lambda: not any(map(alive, everyone)), 10), "a process of the gateway outlives SIGKILL"
        sound(gateway)

    def kill_worker(self, random: Random) -> None:
        """End one of the workers at once, and return when it is gone."""
        pids = [pid for pid in descendants(self.gateway.pid) if b"gateway.serve" in _command(pid)]
        pid = random.choice(pids)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid), 10), "a worker outlives SIGKILL"

    def stop_gateway(self) -> None:
        """Ask the gateway to end, and see that it does."""
        gateway, self._gateway = self.gateway, None
        gateway.process.signal(signal.SIGTERM)
        code = gateway.process.wait(30)
        sound(gateway)
        assert code in (0, -signal.SIGTERM), f"it ended with {code}: {gateway.process.said()[-2000:]}"

    def cut(self, random: Random, *, kept: bool, data: bool) -> list[Lost]:
        """Lose what the killed gateway (`kept`) or PostgreSQL (`data`) did not sync, but for what `random` keeps."""
        disks = (self.kept_disk if kept else None, self.data_disk if data else None)
        return [disk.cut(random) for disk in disks if disk is not None]

    @property
    def postgres(self) -> Cluster:
        """The PostgreSQL that there is."""
        if self.cluster is None:
            raise LookupError("the ledger is a file")
        return self.cluster

    def rows(self) -> Rows:
        """Read all that the ledger has."""
        if self.cluster is None:
            return _rows_of_file(self.kept / "ledger.db")
        waiting = _waiting(self.kept)
        with psycopg.connect(self.cluster.server.url, options="-c search_path=tierway") as connection:
            return _rows(lambda sql: _all(connection.execute(sql)), waiting)

    def in_order(self) -> None:
        """Raise AssertionError where the gateway's own look through the ledger finds anything."""
        kept: Store = SqliteStore(self.kept / "ledger.db")
        if self.cluster is not None:
            kept = PostgresStore(self.cluster.server.url)
        with kept.reading() as reading:
            findings = list(verify(reading, now_ms=int(time.time() * 1000), lease_ms=int(LEASE_S * 1000)))
        wrong = [one for one in findings if one.wrong]
        assert not wrong, wrong

    def at_rest(self, limit_s: float = 30.0) -> bool:
        """Wait until nothing is open any more in the ledger, and nothing waits in the spool."""

        def rests() -> bool:
            rows = self.rows()
            return rows.open == 0 and rows.waiting == 0

        return wait_until(rests, limit_s, 0.2)

    def waiting(self) -> int:
        """Count the rows that wait in the spool."""
        return _waiting(self.kept)

    def _made(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def _ledger(self) -> dict[str, Any]:
        if self.cluster is None:
            store: dict[str, Any] = {"kind": "sqlite", "path": str(self.kept / "ledger.db")}
        else:
            store = {"kind": "postgres", "dsn": {"from": "env", "name": "LEDGER_DSN"}}
            store |= {"spool": str(self.kept / "spool.db"), "timeout": "300ms"}
        return {"store": store, "lease": f"{LEASE_S:g}s"}

    def _stop_whatever_runs(self) -> None:
        if self._gateway is not None:
            self._gateway.process.stop()


@contextmanager
def running_site(kind: StoreKind, *crowds: Crowd, **more: Any) -> Iterator[Site]:
    """Start everything, with users in front of it who leave before it does. `more` is what `Site` takes."""
    with ExitStack() as stack:
        site = Site(stack, kind, **more)
        go_to(site.start_gateway().port, crowds)
        for crowd in crowds:
            stack.enter_context(crowd)
        yield site


def go_to(port: int | None, crowds: Iterable[Crowd]) -> None:
    """Have all users ask there from now on."""
    for crowd in crowds:
        crowd.port = port


def config_of(port: int, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a gateway with two tiers and a ledger."""
    patient = {"connect": "2s", "first_token": "20s", "between_tokens": "20s", "total": "40s"}
    url = f"http://127.0.0.1:{port}"
    return {
        "server": {"shutdown_grace": "5s"},
        "backends": {
            f"{tier}-1": {"kind": "vllm", "url": url, "model": model, "timeouts": patient}
            for tier, model in TIERS.items()
        },
        "tiers": [
            {"name": tier, "backends": [f"{tier}-1"], "price": PRICES[model], "max_output_tokens": 500}
            for tier, model in TIERS.items()
        ],
        "routes": {"auto": {"steps": [{"tier": "small", "doubt_below": 0.5}, {"tier": "large"}]}},
        "keys": [*(key_line(key, secret(key)) for key in KEYS), key_line("operator", OPERATOR, admin=True)],
        "ledger": dict(ledger),
        # A line for each of thousands of requests tells nobody anything.
        "telemetry": {"log": {"level": "warning"}},
    }


def sound(gateway: Gateway) -> None:
    """Raise AssertionError if the gateway or one of its workers has stumbled."""
    said = gateway.process.said()
    assert "Traceback" not in said, said[max(0, said.index("Traceback") - 500) :][:3000]
    assert "unsynced:" not in said, said[-2000:]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# -- reading ---------------------------------------------------------------------------------------------------------


def _rows(ask: Callable[[str], list[dict[str, Any]]], waiting: int) -> Rows:
    attempts: dict[str, list[dict[str, Any]]] = {}
    for row in ask("SELECT * FROM attempts ORDER BY exchange_id, number"):
        attempts.setdefault(row["exchange_id"], []).append(row)
    (opened,) = ask("SELECT count(*) AS rows FROM open_exchanges")
    return Rows(
        exchanges=ask("SELECT * FROM exchanges"),
        attempts=attempts,
        delivered={row["exchange_id"]: row["delivered"] for row in ask("SELECT * FROM deliveries")},
        open=opened["rows"],
        waiting=waiting,
    )


def _all(cursor: psycopg.Cursor[Any]) -> list[dict[str, Any]]:
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _rows_of_file(path: Path) -> Rows:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
        database.row_factory = sqlite3.Row
        return _rows(lambda sql: [dict(row) for row in database.execute(sql)], 0)


def _waiting(folder: Path) -> int:
    """Count the rows that wait in files of a spool."""
    found = 0
    for path in folder.glob("spool*.db"):
        for _ in range(20):
            try:
                with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
                    (refused,) = database.execute("SELECT count(*) FROM set_aside").fetchone()
                    assert not refused, f"{refused} rows were set aside"
                    found += database.execute("SELECT coalesce(sum(size), 0) FROM spooled").fetchone()[0]
                    break
            except sqlite3.OperationalError:
                time.sleep(0.05)  # it is being made
    return found
