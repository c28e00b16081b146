"""What does the least that can be done cost here? Two programs beside which the gateway's figures are read.

A bare ASGI app under uvicorn answers every request with a constant: whole, or as `--events` events of a stream
`--interval-ms` apart. With `--relay-to` it is a relay that copies bytes between two sockets and understands none: the
system calls that any gateway makes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import uvicorn
import uvloop

Message = MutableMapping[str, Any]

EVENT = (
    b'data: {"id":"chatcmpl-0000000000000000","object":"chat.completion.chunk","created":1795150560,'
    b'"model":"reference","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
    b'"finish_reason":null,"token_ids":null}]}\n\n'
)
WHOLE = b'{"id":"chatcmpl-0000000000000000","object":"chat.completion","choices":[],"model":"reference"}'


class Reference:
    """The app."""

    def __init__(self, events: int, interval_s: float) -> None:
        self._events = events
        self._interval_s = interval_s

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        streamed = b'"stream":true' in body
        kind = b"text/event-stream" if streamed else b"application/json"
        headers = [(b"content-type", kind)]
        if not streamed:
            headers.append((b"content-length", b"%d" % len(WHOLE)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if not streamed:
            await send({"type": "http.response.body", "body": WHOLE})
            return
        for _ in range(1 if b'"max_tokens":1}' in body else self._events):
            await asyncio.sleep(self._interval_s)
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class End(asyncio.Protocol):
    """One of the two ends of a relayed connection."""

    def __init__(self, upstream_port: int | None) -> None:
        self._upstream_port = upstream_port  # absent: this is the upstream's end
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._opening: asyncio.Future[None] | None = None  # held, or the loop may drop it half-way
        self.other: End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._upstream_port is not None:
            self._opening = asyncio.ensure_future(self._open(self._upstream_port))

    async def _open(self, port: int) -> None:
        try:
            _, other = await asyncio.get_running_loop().create_connection(lambda: End(None), "127.0.0.1", port)
        except OSError:
            self.close()
            return
        self.other, other.other = other, self
        for data in self._early:
            other.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        else:
            self.other.write(data)

    def connection_lost(self, _exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def relay(port: int, upstream_port: int) -> None:
    """Copy bytes until the process is ended."""
    server = await asyncio.get_running_loop().create_server(lambda: End(upstream_port), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="A bare ASGI app, for comparison.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--interval-ms", type=float, default=5)
    parser.add_argument("--relay-to", type=int, help="the port that bytes are copied to")
    asked = parser.parse_args()
    if asked.relay_to is not None:
        uvloop.run(relay(asked.port, asked.relay_to))
        return
    app = Reference(asked.events, asked.interval_ms / 1000)
    uvicorn.run(app, port=asked.port, access_log=False, log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
