"""How do the proofs ask? Bare connections that can leave at any byte and time every event."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import msgspec

from tests.running import ALICE, HELLO


def request(body: bytes, path: str = "/v1/chat/completions", key: str = ALICE) -> bytes:
    """Write a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def look(path: str, key: str) -> bytes:
    """Write a request for what is there."""
    return f"GET {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n\r\n".encode()


def chat(model: str, *, stream: bool, **fields: Any) -> bytes:
    """Write a request for a chat."""
    return request(json.dumps({"model": model, "messages": HELLO, "stream": stream, **fields}).encode())


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Keep a connection for the block; afterwards it is broken off, so that nothing of it lingers here."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def break_off(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Leave: with RST, or with FIN."""
    if reset:
        given = writer.get_extra_info("socket")
        if given is not None:  # None: the other side has gone
            given.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


class Answer(msgspec.Struct):
    """An answer as far as it came. `arrivals_s` are the times at which something of its body came."""

    status: int = 0
    headers: dict[str, str] = {}
    body: bytes = b""
    whole: bool = False
    arrivals_s: list[float] = []

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def ending(self) -> str:
        """`done`, `error` (an event of a stream says so) or `silent`: cut without a word."""
        if not self.whole:
            return "silent"
        if not self.streamed:
            return "done"
        last = self.body.rstrip(b"\n").rpartition(b"\n\n")[2]
        if last == b"data: [DONE]":
            return "done"
        return "error" if last.startswith(b'data: {"error":') else "silent"


async def ask(port: int, data: bytes) -> Answer:
    """Send a request on a connection of its own and read the answer to its end, or as far as it comes."""
    answer = Answer()
    async with connected(port) as (reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            writer.write(data)
            await writer.drain()
            await read_answer(reader, answer)
    return answer


async def read_answer(
    reader: asyncio.StreamReader, answer: Answer, enough: Callable[[bytes], bool] = lambda _: False
) -> None:
    """Read into `answer` as far as it comes, or of a stream until a part is `enough`.

    Raises IncompleteReadError where it breaks off.
    """
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    answer.status = int(lines[0].split()[1])
    answer.headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    if "content-length" in answer.headers:
        answer.body = await reader.readexactly(int(answer.headers["content-length"]))
        answer.arrivals_s.append(monotonic())
        answer.whole = True
        return
    parts: list[bytes] = []
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
            answer.arrivals_s.append(monotonic())
            if enough(parts[-1]):
                return
        await reader.readexactly(2)
        answer.whole = True
    finally:
        answer.body = b"".join(parts)
