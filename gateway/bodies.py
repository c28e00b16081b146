"""How are large bodies read without anybody waiting for them? In a process of their own.

Reading a body is one uninterruptible call: a few microseconds for a usual one, but 60 ms for a megabyte of empty
lists. Bodies up to `_INLINE_BYTES` are read at once; larger ones go through a pipe to a child process, one after the
other, so that the event loop only ever copies bytes. The child is started with us, because that takes longer than any
body, again when it has died, and ends with us, because its standard input does.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Callable

import msgspec

from backends.backend import Endpoint
from gateway.body import Body, read_body
from gateway.errors import Refusal
from gateway.http import joined

_INLINE_BYTES = 24 * 1024
_SLICE_BYTES = 256 * 1024
_HEADER = struct.Struct("!BQ")  # the endpoint, the size of the body
_REPLY = struct.Struct("!IQ")  # the size of what is told of it, that of its `rest`, which is never copied for a codec
_ENDPOINTS: tuple[Endpoint, ...] = ("chat/completions", "completions")


class _Refused(msgspec.Struct, frozen=True, tag="refused"):
    code: str
    message: str
    param: str | None


class _Read(msgspec.Struct, frozen=True, tag="read"):
    body: Body


_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], _Refused | _Read] = msgspec.msgpack.Decoder(_Refused | _Read).decode


class BodyReader:
    """Reads request bodies of any size."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Start the child, so that the first large body does not wait for that."""
        async with self._turn:
            await self._started()

    async def read(self, endpoint: Endpoint, raw: bytes) -> Body:
        """Read a body as `read_body` does. Raises `Refusal`."""
        if len(raw) <= _INLINE_BYTES:
            return read_body(endpoint, raw)
        # Shielded, because a request that is cancelled in the middle must not leave half a reply in the pipe.
        told, parts = await asyncio.shield(asyncio.ensure_future(self._ask(endpoint, raw)))
        answer = _decode(told)
        if isinstance(answer, _Refused):
            raise Refusal(answer.code, answer.message, param=answer.param)
        return msgspec.structs.replace(answer.body, rest=await joined(parts))

    async def _ask(self, endpoint: Endpoint, raw: bytes) -> tuple[bytes, list[bytes]]:
        async with self._turn:
            try:
                return await self._ask_child(endpoint, raw)
            except (asyncio.IncompleteReadError, ConnectionError):
                # It was killed, by the memory guard for example: a new one may do better.
                self._child = None
                return await self._ask_child(endpoint, raw)

    async def _ask_child(self, endpoint: Endpoint, raw: bytes) -> tuple[bytes, list[bytes]]:
        child = await self._started()
        if child.stdin is None or child.stdout is None:
            raise ConnectionError("the child has no pipes")
        child.stdin.write(_HEADER.pack(_ENDPOINTS.index(endpoint), len(raw)))
        view = memoryview(raw)
        for start in range(0, len(raw), _SLICE_BYTES):
            child.stdin.write(view[start : start + _SLICE_BYTES])
            await child.stdin.drain()
        told_bytes, size_bytes = _REPLY.unpack(await child.stdout.readexactly(_REPLY.size))
        told = await child.stdout.readexactly(told_bytes)
        parts: list[bytes] = []
        while size_bytes:
            part = await child.stdout.read(min(size_bytes, _SLICE_BYTES))
            if not part:
                raise ConnectionError("the child has gone")
            parts.append(part)
            size_bytes -= len(part)
        return told, parts

    async def _started(self) -> asyncio.subprocess.Process:
        child = self._child
        if child is None or child.returncode is not None:
            child = self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway.bodies",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=_SLICE_BYTES,
            )
        return child

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            if child.stdin is not None:
                child.stdin.close()
            await child.wait()


def _serve() -> None:
    """Be the child: read bodies from standard input until it ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(header := source.read(_HEADER.size)) == _HEADER.size:
        number, size_bytes = _HEADER.unpack(header)
        raw = source.read(size_bytes)
        if len(raw) < size_bytes:
            return
        rest = b""
        try:
            body = read_body(_ENDPOINTS[number], raw)
            rest = body.rest
            told = _encode(_Read(msgspec.structs.replace(body, rest=b"")))
        except Refusal as refusal:
            told = _encode(_Refused(refusal.code, refusal.message, refusal.param))
        target.write(_REPLY.pack(len(told), len(rest)))
        target.write(told)
        target.write(rest)
        target.flush()


if __name__ == "__main__":
    _serve()
