"""Does dropping unsynced writes take what was not synced, and nothing else?"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.servers.fixtures import cannot_run
from tests.servers.postgres import Cluster, open_folder
from tests.servers.process import ServerMissingError
from tests.servers.unsynced import Disk, library
from tests.servers.wire import ask

_WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.execute(f"PRAGMA synchronous={sys.argv[2]}")
database.execute(f"PRAGMA wal_autocheckpoint={sys.argv[3]}")
database.execute("CREATE TABLE bills (id INTEGER PRIMARY KEY, text TEXT)")
for number in range(10_000):
    database.execute("INSERT INTO bills VALUES (?, ?)", (number, "x" * 900))
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def shim() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tierway-disk-", dir=open_folder()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            path = library(folder)
        except ServerMissingError as missing:
            # In CI too: a compiler is nothing that this project asks for.
            pytest.skip(str(missing))
        yield path


@pytest.fixture
def disk(shim: Path, tmp_path: Path) -> Disk:
    folder = tmp_path / "disk"
    folder.mkdir()
    return Disk(folder, tmp_path, shim)


def play(disk: Disk, script: str) -> None:
    """Run Python in the folder, and end it without a word."""
    ending = "\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run(
        [sys.executable, "-c", script + ending],
        cwd=disk.folder,
        env={**os.environ, **disk.environment},
        check=False,
    )


def left(disk: Disk) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(disk.folder.iterdir()) if path.is_file()}


def write_rows(disk: Disk, synchronous: str, acknowledged: int, *, checkpoint: int) -> None:
    """Write rows until so many have been acknowledged, and kill the writer then."""
    argv = [sys.executable, "-c", _WRITER, str(disk.folder / "ledger.db"), synchronous, str(checkpoint)]
    with subprocess.Popen(argv, env={**os.environ, **disk.environment}, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(acknowledged):
            assert writer.stdout.readline()
        writer.kill()


def rows_of(disk: Disk) -> int:
    """Count the rows that are there; -1 where the database is broken."""
    try:
        with contextlib.closing(sqlite3.connect(disk.folder / "ledger.db")) as database:
            (sound,) = database.execute("PRAGMA integrity_check").fetchone()
            (rows,) = database.execute("SELECT count(*) FROM bills").fetchone()
    except sqlite3.Error:
        return -1
    return int(rows) if sound == "ok" else -1


def test_what_was_synced_stays_and_what_was_not_goes(disk: Disk) -> None:
    disk.folder.joinpath("before").write_text("there")
    disk.settle()
    play(
        disk,
        "import os\n"
        "half = open('half', 'w'); half.write('synced'); half.flush(); os.fsync(half.fileno())\n"
        "half.write(', not synced'); half.flush()\n"
        "none = open('none', 'w'); none.write('never synced'); none.flush()\n"
        "before = open('before', 'w'); before.flush()\n",
    )
    assert left(disk) == {"before": "", "half": "synced, not synced", "none": "never synced"}
    lost = disk.cut()
    assert left(disk) == {"before": "there", "half": "synced"}
    assert lost.files == 3


@pytest.mark.parametrize("folder_synced", [False, True])
def test_names_are_durable_when_their_folder_is_synced(disk: Disk, folder_synced: bool) -> None:
    for name in ("gone", "old"):
        disk.folder.joinpath(name).write_text(name)
    disk.settle()
    sync = "os.fsync(os.open('.', os.O_RDONLY))" if folder_synced else ""
    play(disk, f"import os\nos.rename('old', 'new'); os.unlink('gone'); open('made', 'w').write('x'); {sync}")
    disk.cut()
    # Of what was made the name is durable then; what is in it never was.
    assert left(disk) == ({"new": "old", "made": ""} if folder_synced else {"gone": "gone", "old": "old"})


def test_a_file_that_took_the_place_of_another_is_not_mixed_with_it(disk: Disk) -> None:
    disk.folder.joinpath("list").write_text("a" * 5000)
    disk.settle()
    play(disk, "import os\nnew = open('beside', 'w'); new.write('b' * 5000); new.close(); os.rename('beside', 'list')")
    disk.cut(Random(1))
    assert set(left(disk)["list"]) == {"a"}


def test_a_disk_that_reorders_keeps_any_sectors_of_what_was_not_synced(disk: Disk) -> None:
    disk.folder.joinpath("file").write_text("a" * 512 * 20)
    disk.settle()
    mixed = set()
    for seed in range(8):
        play(disk, "open('file', 'r+').write('b' * 512 * 20)")
        disk.cut(Random(seed))
        mixed.add(len(set(left(disk)["file"])))
        disk.folder.joinpath("file").write_text("a" * 512 * 20)
        disk.settle()
    assert mixed == {1, 2}


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_sqlite_that_syncs_loses_no_acknowledged_row(disk: Disk, seed: int | None) -> None:
    write_rows(disk, "FULL", 60, checkpoint=20)
    disk.cut(None if seed is None else Random(seed))
    assert rows_of(disk) >= 60


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL"])
def test_sqlite_that_does_not_sync_each_commit_loses_acknowledged_rows(disk: Disk, synchronous: str) -> None:
    # A checkpoint would sync.
    write_rows(disk, synchronous, 60, checkpoint=1000)
    disk.cut()
    assert rows_of(disk) < 60


def test_postgresql_keeps_what_it_has_synced(shim: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tierway-pg-", dir=open_folder()) as name:
        beside = Path(name)
        beside.chmod(0o755)
        folder = beside / "server"
        folder.mkdir()
        try:
            cluster = Cluster(folder, "wal_writer_delay=10s", made_with=("--wal-segsize=1",))
        except ServerMissingError as missing:
            cannot_run(missing)
        disk = Disk(cluster.data, beside, shim)
        cluster.environment = disk.environment
        try:
            socket = cluster.start().socket_path
            ask(socket, "CREATE TABLE bills (id int)")
            ask(socket, "CHECKPOINT")
            for number in range(20):
                ask(socket, f"INSERT INTO bills VALUES ({number})")
            for number in range(20, 40):
                ask(socket, f"SET synchronous_commit = off; INSERT INTO bills VALUES ({number})")
            cluster.kill()
            disk.cut()
            cluster.start()
            rows = ask(socket, "SELECT id FROM bills ORDER BY id")
        finally:
            cluster.stop()
        assert rows == [(str(number),) for number in range(20)]
