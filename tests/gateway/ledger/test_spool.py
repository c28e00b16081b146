"""Does the database have every acknowledged row once, after any outage? And does nobody wait for it meanwhile?"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from gateway.ledger.contract import BadRows, LedgerDown, Reading
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.rows import AnyRow, InstanceRow, RefusalRow
from gateway.ledger.spool import SpooledStore
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import bill_of, billed, contents, id_of, left_open, open_row, rows_of
from tests.servers.fixtures import cannot_run
from tests.servers.postgres import Cluster, PostgresServer, frozen, made_cluster
from tests.servers.process import ServerMissingError
from tests.servers.redis import free_port, wait_for

MANY_BYTES = 1 << 30
ROOT = Path(__file__).parents[3]
SCHEMAS = itertools.count()
TABLES = ("exchanges", "attempts", "decision_inputs", "open_exchanges", "instances", "refusals", "prices")


class Moody:
    """A real store that can be down, or fail after it has done what it was asked to."""

    def __init__(self, path: Path) -> None:
        self.real = SqliteStore(path)
        self.down = False
        self.fail_after = 0
        self.calls = 0
        self.rows: list[int] = []

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        self.calls += 1
        if self.down:
            raise LedgerDown("it is down")
        self.real.write(rows, closed)
        self.rows.append(len(rows))
        if self.fail_after:
            self.fail_after -= 1
            raise LedgerDown("it did not answer")

    def reading(self) -> AbstractContextManager[Reading]:
        return self.real.reading()

    def close(self) -> None:
        self.real.close()


@pytest.fixture
def primary(tmp_path: Path) -> Moody:
    moody = Moody(tmp_path / "primary.db")
    moody.real.open()
    return moody


@contextlib.contextmanager
def spooled(
    primary: Moody | PostgresStore, path: Path, most_bytes: int = MANY_BYTES, look_around_s: float = 60.0
) -> Iterator[SpooledStore]:
    store = SpooledStore(primary, path, most_bytes=most_bytes, look_around_s=look_around_s)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(primary: Moody, tmp_path: Path) -> Iterator[SpooledStore]:
    with spooled(primary, tmp_path / "spool.db") as made:
        yield made


def drained(store: SpooledStore) -> None:
    wait_for(lambda: store._straight)
    assert store.spooled_rows == 0


def test_what_the_primary_takes_goes_there_alone(store: SpooledStore, primary: Moody) -> None:
    store.write(rows_of(bill_of(1)))
    assert set(billed(primary)) == {id_of(1)}
    assert (store.spooled_rows, store.primary_up) == (0, True)


def test_an_outage_is_absorbed(store: SpooledStore, primary: Moody) -> None:
    primary.down = True
    for n in range(50):
        store.write(rows_of(bill_of(n, inputs=True)))
    assert (store.spooled_rows, store.primary_up) == (200, False)
    primary.down = False
    drained(store)
    assert len(billed(primary)) == 50
    assert store.primary_up
    store.write(rows_of(bill_of(50)))
    assert len(billed(primary)) == 51


def test_who_writes_meets_a_primary_that_is_away_once(store: SpooledStore, primary: Moody) -> None:
    names: list[str] = []
    real = primary.write

    def write(rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        names.append(threading.current_thread().name)
        real(rows, closed)

    primary.write = write  # type: ignore[method-assign]
    primary.down = True
    for n in range(20):
        store.write(rows_of(bill_of(n)))
    assert names.count(threading.current_thread().name) == 1


def test_batches_keep_their_order_while_the_spool_is_drained(store: SpooledStore, primary: Moody) -> None:
    """What is opened in an outage and closed after it stays closed."""
    primary.down = True
    store.write([open_row(1, instance="here"), open_row(2, instance="here")])
    primary.down = False
    store.write(rows_of(bill_of(1)), closed=[id_of(1)])
    drained(store)
    assert left_open(primary) == {id_of(2)}


def test_what_comes_while_the_last_is_brought_over_is_brought_over_too(store: SpooledStore, primary: Moody) -> None:
    real = primary.write
    late: list[threading.Thread] = []

    def write(rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        real(rows, closed)
        if not rows and not late and not store.spooled_rows:  # it is only asked whether it is there
            late.append(threading.Thread(target=store.write, args=(rows_of(bill_of(2)),)))
            late[0].start()
            late[0].join()

    primary.down = True
    store.write(rows_of(bill_of(1)))
    primary.write = write  # type: ignore[method-assign]
    primary.down = False
    drained(store)
    assert late
    assert set(billed(primary)) == {id_of(1), id_of(2)}


def test_an_exchange_that_is_open_in_the_primary_is_closed_through_the_spool(
    store: SpooledStore, primary: Moody
) -> None:
    store.write([open_row(1), open_row(2)])
    primary.down = True
    store.write(rows_of(bill_of(1)), closed=[id_of(1)])
    store.write([], closed=[id_of(2)])
    assert left_open(primary) == {id_of(1), id_of(2)}
    primary.down = False
    drained(store)
    assert left_open(primary) == set()


def test_the_next_start_brings_over_what_was_left(primary: Moody, tmp_path: Path) -> None:
    with spooled(primary, tmp_path / "spool.db") as store:
        primary.down = True
        store.write([*rows_of(bill_of(1)), open_row(2)])
        store.write(rows_of(bill_of(3)), closed=[id_of(3)])
    assert billed(primary) == {}
    primary.down = False
    with spooled(primary, tmp_path / "spool.db") as store:
        drained(store)
        assert set(billed(primary)) == {id_of(1), id_of(3)}
        assert left_open(primary) == {id_of(2)}


def test_a_store_that_ends_brings_over_what_it_can(primary: Moody, tmp_path: Path) -> None:
    with spooled(primary, tmp_path / "spool.db") as store:
        primary.down = True
        for n in range(100):
            store.write(rows_of(bill_of(n)))
        primary.down = False
    assert len(billed(primary)) == 100


def test_each_process_has_a_file_and_what_one_left_another_brings_over(primary: Moody, tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(spooled(primary, path, look_around_s=0.01))
        primary.down = True
        with spooled(primary, path) as second, spooled(primary, path) as third:
            second.write(rows_of(bill_of(1)))
            third.write(rows_of(bill_of(2)))
        names = {one.name for one in tmp_path.glob("spool*.db")}
        assert names == {"spool.db", "spool-1.db", "spool-2.db"}
        primary.down = False
        wait_for(lambda: set(billed(primary)) == {id_of(1), id_of(2)})
        first.write(rows_of(bill_of(3)))
    assert len(billed(primary)) == 3
    with spooled(primary, path) as again:
        assert again.spooled_rows == 0


def test_a_full_spool_says_so_and_goes_on_when_it_is_drained(primary: Moody, tmp_path: Path) -> None:
    with spooled(primary, tmp_path / "spool.db", most_bytes=600_000) as store:
        primary.down = True
        acknowledged = 0

        def write() -> None:
            noise = f"{acknowledged:x}" + "".join(chr(0x4E00 + hash((acknowledged, m)) % 20000) for m in range(1000))
            store.write([msgspec.structs.replace(bill_of(acknowledged).exchange, asked=noise)])

        with contextlib.suppress(LedgerDown):
            while True:
                write()
                acknowledged += 1
        with pytest.raises(LedgerDown, match="may not grow"):
            write()
        assert acknowledged > 10
        primary.down = False
        drained(store)
        assert len(billed(primary)) == acknowledged
        primary.down = True
        store.write(rows_of(bill_of(10_000_000)))
        primary.down = False
        drained(store)
        assert len(billed(primary)) == acknowledged + 1


def test_bad_rows_are_set_aside_and_the_others_written(
    store: SpooledStore, primary: Moody, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = bill_of(7, attempts=3)
    attempts = (bad.attempts[0], msgspec.structs.replace(bad.attempts[1], output_nusd=10**30), bad.attempts[2])
    rows = [row for n in range(16) if n != 7 for row in rows_of(bill_of(n))]
    late = RefusalRow(hour=1, instance="here", key_name="", code="x", requests=2**63)
    store.write([open_row(7), open_row(8)])
    with caplog.at_level(logging.ERROR):
        store.write([*rows[:20], bad.exchange, *attempts, late, *rows[20:]], closed=[id_of(7)])
    assert set(billed(primary)) == {id_of(n) for n in range(16) if n != 7}
    assert left_open(primary) == {id_of(8)}
    assert store.set_aside_rows == 5
    assert store.primary_up
    assert len(caplog.records) == 2
    store.close()
    with SqliteStore(tmp_path / "spool.db").reading() as reading:
        whats = [
            json.loads(what if isinstance(what, bytes) else "")
            for (what,) in reading.rows("SELECT what FROM set_aside ORDER BY id")
        ]
    assert [[row["table"] for row in what] for what in whats] == [["exchanges", *["attempts"] * 3], ["refusals"]]
    assert whats[0][2]["output_nusd"] == 10**30


def test_bad_rows_do_not_stop_the_spool(store: SpooledStore, primary: Moody) -> None:
    primary.down = True
    store.write(rows_of(bill_of(1)))
    store.write([msgspec.structs.replace(bill_of(2).exchange, output_nusd=2**63)])  # the database's to refuse
    store.write([msgspec.structs.replace(bill_of(3).exchange, output_nusd=2**70), *rows_of(bill_of(4))])  # nobody's
    store.write([msgspec.structs.replace(bill_of(5).exchange, user_name="a\ud800b")], closed=["\udc00"])
    primary.down = False
    drained(store)
    assert set(billed(primary)) == {id_of(1), id_of(4), id_of(5)}
    assert store.set_aside_rows == 2


def test_a_batch_that_cannot_be_read_is_set_aside(primary: Moody, tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with spooled(primary, path) as store:
        primary.down = True
        for n in range(3):
            store.write(rows_of(bill_of(n)))
    with contextlib.closing(SqliteStore(path)) as file:
        file.change([("UPDATE spooled SET batch = ? WHERE id = 2", (b"rot",))])
    primary.down = False
    with spooled(primary, path) as store:
        drained(store)
        assert set(billed(primary)) == {id_of(0), id_of(2)}
        assert store.set_aside_rows == 3


def test_a_file_that_is_no_spool_is_not_touched(primary: Moody, tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"the diary of somebody" * 100)
    with pytest.raises(LedgerDown, match="not a file of SQLite"):
        SpooledStore(primary, path, most_bytes=MANY_BYTES)
    assert path.read_bytes().startswith(b"the diary")
    with pytest.raises(LedgerDown):
        SpooledStore(primary, tmp_path / "no" / "folder.db", most_bytes=MANY_BYTES)


def test_a_large_batch_goes_over_in_smaller_and_smaller_pieces(store: SpooledStore, primary: Moody) -> None:
    """A primary that takes ten rows in its time and no more gets all of them, and those of one exchange together."""
    real = primary.write

    def slow(rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        if len(rows) > 10:
            raise LedgerDown("it takes too long")
        real(rows, closed)

    primary.write = slow  # type: ignore[method-assign]
    store.write([open_row(0)])
    store.write([row for n in range(100) for row in rows_of(bill_of(n, attempts=2))], closed=[id_of(0)])
    drained(store)
    assert len(billed(primary)) == 100
    assert left_open(primary) == set()
    primary.write = real  # type: ignore[method-assign]


def test_signs_of_life_are_not_brought_over_one_by_one(store: SpooledStore, primary: Moody) -> None:
    primary.down = True
    for n in range(100):
        store.write([InstanceRow(instance="here", heard_ms=n), open_row(1, seen_ms=n)])
    primary.down = False
    primary.rows.clear()
    drained(store)
    assert sum(primary.rows) <= 10
    assert contents(primary, ["instances"]) == {"instances": [("here", 99)]}


def test_the_last_sign_of_life_is_brought_over_first(primary: Moody, tmp_path: Path) -> None:
    """Else another replica, that sees the primary first, would bill what this one holds open."""
    with spooled(primary, tmp_path / "spool.db") as store:
        primary.down = True
        for n in range(5):
            store.write([*rows_of(bill_of(n)), InstanceRow(instance="here", heard_ms=n)])
        seen: list[AnyRow] = []
        real = primary.write

        def write(rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
            real(rows, closed)
            seen.extend(rows)

        primary.write = write  # type: ignore[method-assign]
        primary.down = False
        drained(store)
    assert seen[0] == InstanceRow(instance="here", heard_ms=4)
    assert len(billed(primary)) == 5


Step = tuple[str, list[AnyRow], list[str]]


@st.composite
def plays(draw: st.DrawFn) -> list[Step]:
    """Steps of a process: exchanges are opened and then closed with a bill, while the primary does what it likes."""
    steps: list[Step] = []
    under_way: list[int] = []
    for clock, kind in enumerate(
        draw(st.lists(st.sampled_from(["open", "bill", "both", "down", "up", "late", "restart", "wait"]), max_size=25))
    ):
        if kind == "open" or (kind == "bill" and not under_way):
            under_way.append(clock)
            steps.append(("write", [open_row(clock, instance="here", seen_ms=clock)], []))
        elif kind == "bill":
            done = under_way.pop(draw(st.integers(0, len(under_way) - 1)))
            steps.append(("write", rows_of(bill_of(done, inputs=True)), [id_of(done)]))
        elif kind == "both":
            refused = RefusalRow(hour=1, instance="here", key_name="", code="x", requests=clock)
            steps.append(
                ("write", [*rows_of(bill_of(clock)), InstanceRow(instance="here", heard_ms=clock), refused], [])
            )
        else:
            steps.append((kind, [], []))
    return steps


@settings(max_examples=20)
@given(plays())
def test_whatever_fails_the_primary_has_at_the_end_what_was_acknowledged(play: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        primary, reference = Moody(folder / "primary.db"), SqliteStore(folder / "reference.db")
        primary.real.open()
        reference.open()
        store = SpooledStore(primary, folder / "spool.db", most_bytes=MANY_BYTES)
        for kind, rows, closed in play:
            if kind == "write":
                store.write(rows, closed)
                reference.write(rows, closed)
            elif kind == "late":
                primary.fail_after = 2
            elif kind == "restart":
                store.close()
                store = SpooledStore(primary, folder / "spool.db", most_bytes=MANY_BYTES)
            elif kind == "wait" and not primary.down:
                drained(store)
            else:
                primary.down = kind == "down"
        primary.down = False
        primary.fail_after = 0
        store.write([])  # where the primary failed on its last call, nobody has asked it since
        drained(store)
        store.close()
        assert contents(primary, TABLES) == contents(reference, TABLES)
        reference.close()


# -- with PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with made_cluster(port=free_port()) as made:
            yield made
    except ServerMissingError as missing:
        cannot_run(missing)


@pytest.fixture
def server(cluster: Cluster) -> Iterator[PostgresServer]:
    yield cluster.start()
    cluster.stop()


def counts(server: PostgresServer, schema: str) -> tuple[set[str], int]:
    """The exchanges that are there, and how many attempts."""
    with contextlib.closing(PostgresStore(server.url, schema=schema)) as one:
        with one.reading() as reading:
            ((attempts,),) = reading.rows("SELECT COUNT(*) FROM attempts")
        return set(billed(one)), int(attempts or 0)


def test_rows_flow_through_kills_freezes_and_restarts(cluster: Cluster, server: PostgresServer, tmp_path: Path) -> None:
    """Four replicas write all the time; nothing they write is refused, and all of it is there at the end, once."""
    schema, done, acknowledged, faults = f"flow {next(SCHEMAS)}", threading.Event(), [0] * 4, []

    def replica(number: int) -> None:
        primary = PostgresStore(server.url, schema=schema, timeout_s=0.5)
        with spooled(primary, tmp_path / "spool.db") as store:
            try:
                while not done.is_set():
                    n = number * 1_000_000 + acknowledged[number]
                    store.write([open_row(n)])
                    store.write(rows_of(bill_of(n, attempts=2)), closed=[id_of(n)])
                    acknowledged[number] += 1
                    done.wait(0.001)
                drained(store)
            except (LedgerDown, TimeoutError, AssertionError) as fault:
                faults.append(fault)

    def some(more: int) -> None:
        before = sum(acknowledged)
        wait_for(lambda: sum(acknowledged) >= before + more or bool(faults))

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    some(40)
    cluster.kill()
    some(200)
    running = cluster.start()
    some(100)
    with frozen(running):
        some(200)
    some(100)
    cluster.stop()
    some(200)
    cluster.start()
    some(40)
    done.set()
    for thread in threads:
        thread.join()
    assert not faults
    there, attempts = counts(server, schema)
    assert there == {id_of(number * 1_000_000 + n) for number in range(4) for n in range(acknowledged[number])}
    assert attempts == 2 * len(there)
    with contextlib.closing(PostgresStore(server.url, schema=schema)) as one:
        assert left_open(one) == set()


WRITER = """
import sys
from pathlib import Path
from gateway.ledger import spool
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.spool import SpooledStore
from tests.gateway.ledger.bills import bill_of, rows_of
url, schema, path, first, bills = sys.argv[1:]
spool._MOST_ROWS = 12
store = SpooledStore(PostgresStore(url, schema=schema, timeout_s=5.0), Path(path), most_bytes=1 << 30)
for n in range(int(first), int(first) + int(bills)):
    store.write(rows_of(bill_of(n, attempts=2)))
    print(n, flush=True)
while not store._straight:
    store._closing.wait(0.01)
store.close()
"""


def writer(server: PostgresServer, schema: str, path: Path, first: int, bills: int) -> subprocess.Popen[str]:
    arguments = [server.url, schema, str(path), str(first), str(bills)]
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_writer_that_is_killed_while_it_drains_loses_nothing(
    cluster: Cluster, server: PostgresServer, tmp_path: Path
) -> None:
    schema, path = f"killed {next(SCHEMAS)}", tmp_path / "spool.db"
    with contextlib.closing(PostgresStore(server.url, schema=schema, timeout_s=20.0)) as one:
        one.write([])
    cluster.kill()
    acknowledged: set[str] = set()
    with writer(server, schema, path, 0, 400) as first:
        assert first.stdout is not None
        acknowledged |= {id_of(int(line)) for line in itertools.islice(first.stdout, 400)}
        cluster.start()
        wait_for(lambda: len(counts(server, schema)[0]) > 0)
        first.kill()
    assert len(acknowledged) == 400
    assert 0 < len(counts(server, schema)[0]) < 400
    with writer(server, schema, path, 5000, 10) as second:
        assert second.stdout is not None
        acknowledged |= {id_of(int(line)) for line in second.stdout}
    assert second.returncode == 0
    there, attempts = counts(server, schema)
    assert there == acknowledged
    assert attempts == 2 * len(there)


def test_bad_rows_of_postgresql_are_set_aside(server: PostgresServer, tmp_path: Path) -> None:
    primary = PostgresStore(server.url, schema=f"bad {next(SCHEMAS)}", timeout_s=20.0)
    noise = "".join(chr(0x4E00 + hash((n, 7)) % 20000) for n in range(5000))
    with spooled(primary, tmp_path / "spool.db") as store:
        bad = RefusalRow(hour=1, instance="here", key_name=noise, code="x", requests=1)
        store.write([*rows_of(bill_of(1)), bad, *rows_of(bill_of(2))])
        assert set(billed(store)) == {id_of(1), id_of(2)}
        assert store.set_aside_rows == 1
        with pytest.raises(BadRows):
            primary.write([bad])
