"""Does a file of SQLite keep what it took, and say clearly why where it takes nothing?"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from gateway.ledger.contract import BadRows, LedgerDown
from gateway.ledger.rows import AnyRow, InstanceRow
from gateway.ledger.schema import migrations
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import bill_of, billed, id_of, left_open, open_row, rows_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    one = SqliteStore(path, busy_s=0.05)
    one.open()
    yield one
    one.close()


def rows(*numbers: int) -> list[AnyRow]:
    return [row for number in numbers for row in rows_of(bill_of(number))]


def test_what_is_written_is_there_and_only_its_owner_can_read_it(store: SqliteStore, path: Path) -> None:
    store.write(rows(*range(200)))
    assert billed(store) == {id_of(number): ("answered", 90) for number in range(200)}
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_commit_is_synced(store: SqliteStore) -> None:
    db = store._connection()
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_rows_and_the_closing_of_an_open_exchange_are_one(store: SqliteStore) -> None:
    store.write([open_row(1), open_row(2), open_row(3)])
    store.write([*rows(1), open_row(2, seen_ms=2**60)], [id_of(1), id_of(2), id_of(9)])
    assert left_open(store) == {id_of(3)}


def test_a_reader_sees_one_moment_and_holds_up_nobody(store: SqliteStore) -> None:
    store.write(rows(1))
    with store.reading() as reading:
        store.write(rows(2))
        counts = [list(reading.rows("SELECT COUNT(*) FROM exchanges")) for _ in range(2)]
        store.write(rows(3))
    assert counts == [[(1,)], [(1,)]]
    assert len(billed(store)) == 3


def test_a_reader_cannot_write(store: SqliteStore) -> None:
    with store.reading() as reading, pytest.raises(LedgerDown, match="may not be written"):
        list(reading.rows("DELETE FROM exchanges"))


def test_values_go_with_a_query(store: SqliteStore) -> None:
    store.write(rows(1, 2))
    with store.reading() as reading:
        assert list(reading.rows("SELECT COUNT(*) FROM exchanges WHERE exchange_id = ?", [id_of(2)])) == [(1,)]


# -- rows that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\ud800", None], ids=["no text", "null"])
def test_rows_that_cannot_be_are_told_from_a_ledger_that_is_down(store: SqliteStore, name: str) -> None:
    bad = msgspec.structs.replace(bill_of(2).exchange, key_name=name)
    with pytest.raises(BadRows):
        store.write([*rows(1), bad])
    assert billed(store) == {}
    store.write(rows(3))
    assert set(billed(store)) == {id_of(3)}


def test_a_number_too_large_is_a_bad_row(store: SqliteStore) -> None:
    with pytest.raises(BadRows):
        store.write([msgspec.structs.replace(bill_of(2).exchange, output_nusd=2**63)])


# -- a file that is not well ------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """Try to open a file; return what is said, and make sure that it was left alone."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerDown) as caught:
        SqliteStore(path, busy_s=0.05).open()
    assert (path.read_bytes() if path.is_file() else None) == before
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_of_something_else_is_left_alone(path: Path) -> None:
    path.write_bytes(b"Dear diary, " * 1000)
    assert "not a file of SQLite" in refusal(path)


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE songs (name TEXT)")
    db.close()
    assert "tables of another program" in refusal(path)


@pytest.mark.parametrize("size", [3, 100, 4096, 3 * 4096 + 17])
def test_a_file_that_was_cut_off_is_left_alone(store: SqliteStore, path: Path, size: int) -> None:
    store.write(rows(*range(300)))
    store.close()
    os.truncate(path, size)
    said = refusal(path)
    assert "damaged or cut off" in said or "not a file of SQLite" in said


def test_a_newer_ledger_is_left_alone(store: SqliteStore, path: Path) -> None:
    store.change([("INSERT INTO schema_version VALUES (99, 0)", ())])
    store.close()
    assert f"has version 99 of its schema, and this program knows versions up to {len(migrations())}" in refusal(path)
    with pytest.raises(LedgerDown, match="version 99"), SqliteStore(path).reading():
        pass


def test_an_older_ledger_is_brought_up_to_date_and_keeps_its_rows(store: SqliteStore, path: Path) -> None:
    store.write(rows(1))
    store.close()
    older = SqliteStore(path)
    step = msgspec.structs.replace(migrations()[-1], version=2, statements=("CREATE TABLE more (a TEXT)",))
    older._known = (*migrations()[:1], step)
    with pytest.raises(LedgerDown, match=r"has version 1 .* reads version 2"), older.reading():
        pass
    older.open()
    with older.reading() as reading:
        assert list(reading.rows("SELECT COUNT(*) FROM more")) == [(0,)]
        assert list(reading.rows("SELECT version FROM schema_version ORDER BY 1")) == [(1,), (2,)]
    assert len(billed(older)) == 1
    older.close()


def test_an_upgrade_that_fails_changes_nothing(store: SqliteStore, path: Path) -> None:
    store.write(rows(1))
    store.close()
    older = SqliteStore(path)
    broken = ("CREATE TABLE more (a TEXT)", "CREATE TABLE exchanges (a TEXT)")
    older._known = (*migrations()[:1], msgspec.structs.replace(migrations()[-1], version=2, statements=broken))
    with pytest.raises(LedgerDown, match="already exists"):
        older.open()
    again = SqliteStore(path)
    again.open()
    with again.reading() as reading:
        assert not list(reading.rows("SELECT 1 FROM sqlite_master WHERE name = 'more'"))
    again.close()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "the folder" in refusal(tmp_path / "mnt" / "ledger.db")
    assert not (tmp_path / "mnt").exists()


def test_a_ledger_that_is_not_there_cannot_be_read(path: Path) -> None:
    with pytest.raises(LedgerDown, match="There is no ledger"), SqliteStore(path).reading():
        pass
    assert not path.exists()


def test_a_folder_that_may_not_be_written_is_told() -> None:
    # The root of this file system is made by the kernel and takes no file from anybody.
    assert "could not be used" in refusal(Path("/proc/ledger.db"))


def test_what_is_removed_in_use_is_missed(store: SqliteStore, path: Path) -> None:
    store.write(rows(1))
    away = path.with_name("away.db")
    path.rename(away)
    store._look_s = 0.0
    for _ in range(2):
        with pytest.raises(LedgerDown, match="was removed while it was in use"):
            store.write(rows(2))
    assert not path.exists()
    away.rename(path)
    store.write(rows(2))
    assert len(billed(store)) == 2


# -- a disk that is full, a file that is locked -----------------------------------------------------------------------


def test_a_file_that_may_not_grow_is_told_and_well_again_when_it_may(store: SqliteStore) -> None:
    written = 0
    store._connection().execute("PRAGMA max_page_count = 120")
    with pytest.raises(LedgerDown, match="make room"):  # noqa: PT012 - which one it is does not matter
        for written in range(100):
            store.write(rows(*range(written * 10, written * 10 + 10)))
    assert len(billed(store)) == written * 10 > 0
    store.write(rows(*range(5000, 5010)))
    assert len(billed(store)) == written * 10 + 10


def test_a_disk_that_was_full_is_well_again_when_there_is_room(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._connection().execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerDown, match="make room"):
        store.write(rows(*range(200)))
    few = os.statvfs_result((4096, 4096, 1000, 100, 100, 0, 0, 0, 0, 255))
    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda _: few)
        with pytest.raises(LedgerDown, match="409600 bytes of it are free"):
            store.write(rows(1))
    store.write(rows(1))
    assert len(billed(store)) == 1


def test_most_bytes_is_never_passed(path: Path) -> None:
    store = SqliteStore(path, most_bytes=400_000)
    with pytest.raises(LedgerDown, match="make room"):  # noqa: PT012 - which one it is does not matter
        for start in range(0, 5000, 10):
            store.write(rows(*range(start, start + 10)))
    store.close()
    assert 200_000 < path.stat().st_size <= 400_000


_FULL = """
    import resource, signal, sys
    from pathlib import Path
    from gateway.ledger.contract import LedgerDown
    from gateway.ledger.sqlite import SqliteStore
    from tests.gateway.ledger.bills import bill_of, rows_of
    store, written = SqliteStore(Path(sys.argv[1])), 0
    store.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
    try:
        for number in range(5000):
            store.write(rows_of(bill_of(number)))
            written += 1
    except LedgerDown as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.write(rows_of(bill_of(written)))
    print(written + 1)
"""


def test_a_disk_that_takes_no_more_is_told_and_nothing_is_lost(path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FULL), path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said, written = run.stdout.splitlines()
    assert "disk" in said
    assert set(billed(SqliteStore(path))) == {id_of(number) for number in range(int(written))}


def test_a_file_that_another_program_locks_is_told_and_written_afterwards(store: SqliteStore, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerDown, match="another program has it locked"):
        store.write(rows(1))
    other.execute("ROLLBACK")
    other.close()
    store.write(rows(1))
    assert len(billed(store)) == 1


# -- several processes ------------------------------------------------------------------------------------------------

_WRITER = """
    import sys
    from pathlib import Path
    from gateway.ledger.sqlite import SqliteStore
    from tests.gateway.ledger.bills import bill_of, rows_of
    store, first = SqliteStore(Path(sys.argv[1])), int(sys.argv[2])
    for number in range(first, first + 60):
        store.write(rows_of(bill_of(number)))
        print(number, flush=True)
"""


def writers(path: Path, firsts: Sequence[int]) -> list[subprocess.Popen[str]]:
    code = textwrap.dedent(_WRITER)
    return [
        subprocess.Popen([sys.executable, "-c", code, path, str(first)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for first in firsts
    ]


def test_several_processes_begin_and_write_one_file(path: Path) -> None:
    running = writers(path, [0, 1000, 2000])
    outputs = [one.communicate(timeout=60)[0] for one in running]
    assert [one.returncode for one in running] == [0, 0, 0]
    written = {id_of(int(line)) for output in outputs for line in output.split()}
    assert set(billed(SqliteStore(path))) == written
    assert len(written) == 180


def test_what_a_killed_process_was_told_is_written_is_there(path: Path) -> None:
    for first in (0, 1000, 2000):
        (one,) = writers(path, [first])
        assert one.stdout is not None
        told = [int(one.stdout.readline()) for _ in range(10)]
        one.send_signal(signal.SIGKILL)
        told += [int(line) for line in one.communicate()[0].split()]
        found = billed(SqliteStore(path))
        assert {id_of(number) for number in told} <= set(found)
        assert set(found.values()) == {("answered", 90)}


def test_a_heartbeat_never_goes_back(store: SqliteStore) -> None:
    store.write([InstanceRow(instance="a", heard_ms=5)])
    store.write([InstanceRow(instance="a", heard_ms=3)])
    with store.reading() as reading:
        assert list(reading.rows("SELECT heard_ms FROM instances")) == [(5,)]
