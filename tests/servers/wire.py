"""What does PostgreSQL answer? The simple query protocol, without a client library.

https://www.postgresql.org/docs/current/protocol-flow.html
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_PROTOCOL_3 = 196608


def ask(socket_path: Path, sql: str) -> list[tuple[str | None, ...]]:
    """The rows that `sql` gives, every value as text. Raises RuntimeError with the server's own words."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
        connection.settimeout(10)
        connection.connect(str(socket_path))
        startup = struct.pack("!i", _PROTOCOL_3) + b"user\0postgres\0database\0postgres\0\0"
        connection.sendall(struct.pack("!i", len(startup) + 4) + startup)
        rows: list[tuple[str | None, ...]] = []
        asked = False
        while True:
            kind, length = struct.unpack("!ci", answers.read(5))
            payload = answers.read(length - 4)
            if kind == b"E":
                raise RuntimeError(payload.replace(b"\0", b" ").decode())
            if kind == b"D":
                rows.append(_values(payload))
            if kind == b"Z":
                if asked:
                    return rows
                asked = True
                query = sql.encode() + b"\0"
                connection.sendall(b"Q" + struct.pack("!i", len(query) + 4) + query)


def _values(payload: bytes) -> tuple[str | None, ...]:
    (count,) = struct.unpack_from("!h", payload)
    values: list[str | None] = []
    at = 2
    for _ in range(count):
        (size,) = struct.unpack_from("!i", payload, at)
        at += 4
        values.append(None if size < 0 else payload[at : at + size].decode())
        at += max(size, 0)
    return tuple(values)
