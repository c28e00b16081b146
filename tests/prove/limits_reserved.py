"""What was reserved for each request? As Redis itself tells that it was asked (MONITOR), whoever asked."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from tests.servers.redis import RedisServer

_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(rb"\\(x[0-9a-f]{2}|.)")
_MEANT = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}
_PARTITION = b":{deployment}"
_SECOND_TRY = "/counted"
_AT_ONCE = 1 << 20


class Reserved:
    """The amounts held for a request, by the name of the account; those that were asked for last."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._by_id: dict[str, dict[str, int]] | None = None

    def add(self, lines: list[bytes]) -> None:
        """Take what Redis tells; it is read later."""
        self._lines += lines

    def of(self, exchange_id: str) -> dict[str, int]:
        """Return what was reserved for one exchange; nothing where it was never asked for."""
        if self._by_id is None:
            self._by_id = dict(pair for line in self._lines for pair in _reservations(line))
        return self._by_id.get(exchange_id, {})


def _reservations(line: bytes) -> Iterator[tuple[str, dict[str, int]]]:
    parts = _QUOTED.findall(line)
    if len(parts) < 6 or parts[0].upper() != b"EVALSHA" or not parts[3].endswith(_PARTITION):
        return
    # The name of the script, the number of keys, the key and the header come before the operations.
    for part in parts[5:]:
        operation = msgspec.msgpack.decode(_ESCAPED.sub(_meant, part))
        if operation[0] == "reserve":
            yield operation[1].removesuffix(_SECOND_TRY), {entry[0]: entry[3] for entry in operation[2]}


def _meant(found: re.Match[bytes]) -> bytes:
    what = found[1]
    return bytes([int(what[1:], 16)]) if len(what) == 3 else _MEANT.get(what, what)


@contextmanager
def watched(server: RedisServer) -> Iterator[Reserved]:
    """Listen to a Redis for as long as the block runs."""
    reserved = Reserved()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"AUTH {server.password}\r\nMONITOR\r\n".encode())
        answer = b""
        while answer.count(b"+OK\r\n") < 2:
            answer += connection.recv(4096)

        def listen() -> None:
            rest = b""
            # The server may be gone before it is asked to stop.
            with suppress(OSError):
                while more := connection.recv(_AT_ONCE):
                    *lines, rest = (rest + more).split(b"\r\n")
                    reserved.add(lines)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield reserved
        finally:
            connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)
