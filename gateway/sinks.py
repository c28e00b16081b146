"""How does an answer leave? As a stream of events while it comes, or as one JSON at the end.

Only a sink knows whether the client streams. The order of its calls: `begin` once when an attempt is committed,
`write` for what may pass, then `end` or `fail`. Where nothing was committed no sink is called: `send_refusal` answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from backends.sse import DONE
from gateway.decision import Header
from gateway.errors import Refusal

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Sink(Protocol):
    """Where an answer goes."""

    async def begin(self, headers: Callable[[], list[Header]]) -> None:
        """Commit: what comes from now on is the answer. `headers` tells those known so far."""
        ...

    async def write(self, data: bytes) -> None:
        """Let a part of the answer through."""
        ...

    async def end(self, tail: list[bytes], headers: list[Header], note: bytes | None) -> None:
        """Close the answer with its last part. `headers` are final; `note` is for a client that asked for one."""
        ...

    async def fail(self, refusal: Refusal) -> None:
        """Say that the answer cannot be completed."""
        ...


def make_sink(send: Send, headers: list[Header], *, stream: bool, note_in_usage: bool = False) -> Sink:
    """Return the way out that the client asked for. `headers` are known before any answer."""
    return SseSink(send, headers, note_in_usage=note_in_usage) if stream else JsonSink(send, headers)


class SseSink:
    """Server-sent events: the head leaves with the commit, every part when it comes."""

    def __init__(self, send: Send, headers: list[Header], *, note_in_usage: bool = False) -> None:
        self._send = send
        self._headers = headers
        self._note_in_usage = note_in_usage

    async def begin(self, headers: Callable[[], list[Header]]) -> None:
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    *self._headers,
                    *headers(),
                ],
            }
        )

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, tail: list[bytes], headers: list[Header], note: bytes | None) -> None:
        if note is not None:
            if self._note_in_usage and tail and b'"choices":[]' in tail[-1]:
                tail = [*tail[:-1], tail[-1][:-3] + b',"tierway":' + note + b"}\n\n"]
            else:
                tail = [*tail, b": tierway " + note + b"\n\n"]
        await self._send({"type": "http.response.body", "body": b"".join([*tail, DONE])})

    async def fail(self, refusal: Refusal) -> None:
        # No [DONE] follows: what was cut must not look complete.
        await self._send({"type": "http.response.body", "body": b"data: " + refusal.body() + b"\n\n"})


class JsonSink:
    """One JSON: nothing leaves before everything is known."""

    def __init__(self, send: Send, headers: list[Header]) -> None:
        self._send = send
        self._headers = headers

    async def begin(self, headers: Callable[[], list[Header]]) -> None:
        """Wait: the head of a whole answer tells the end of the story."""

    async def write(self, data: bytes) -> None:
        raise AssertionError("a whole answer has no part before its last")

    async def end(self, tail: list[bytes], headers: list[Header], note: bytes | None) -> None:
        body = b"".join(tail)
        await send_whole(self._send, 200, body, [*self._headers, *headers])

    async def fail(self, refusal: Refusal) -> None:
        await send_refusal(self._send, refusal, self._headers)


async def send_whole(send: Send, status: int, body: bytes, headers: list[Header]) -> None:
    """Send a complete JSON response."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_refusal(send: Send, refusal: Refusal, headers: list[Header]) -> None:
    """Send an error answer."""
    await send_whole(send, refusal.status, refusal.body(), [*headers, *refusal.headers()])
