"""How are large bodies read without anybody waiting for them? In a process of their own.

Reading a body is one uninterruptible call: a few microseconds for a usual one, but 60 ms for a megabyte of empty
lists. Bodies up to `_INLINE_BYTES` are read at once; larger ones go to a child process, one after the other. The child
is started with us, because that takes longer than any body.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from backends.backend import Endpoint
from gateway.body import Body, read_body
from gateway.child import Child, serve
from gateway.errors import Refusal
from gateway.http import joined

_INLINE_BYTES = 24 * 1024
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
        self._child = Child("gateway.bodies")

    async def open(self) -> None:
        """Start the child, so that the first large body does not wait for that."""
        await self._child.open()

    async def read(self, endpoint: Endpoint, raw: bytes) -> Body:
        """Read a body as `read_body` does. Raises `Refusal`."""
        if len(raw) <= _INLINE_BYTES:
            return read_body(endpoint, raw)
        told, parts = await self._child.ask(bytes([_ENDPOINTS.index(endpoint)]), raw)
        answer = _decode(told)
        if isinstance(answer, _Refused):
            raise Refusal(answer.code, answer.message, param=answer.param)
        # The JSON of the body is never copied for a codec.
        return msgspec.structs.replace(answer.body, rest=await joined(parts))

    async def close(self) -> None:
        """End the child."""
        await self._child.close()


def _answer(head: bytes, raw: bytes) -> tuple[bytes, bytes]:
    try:
        body = read_body(_ENDPOINTS[head[0]], raw)
    except Refusal as refusal:
        return _encode(_Refused(refusal.code, refusal.message, refusal.param)), b""
    return _encode(_Read(msgspec.structs.replace(body, rest=b""))), body.rest


if __name__ == "__main__":
    serve(_answer)
