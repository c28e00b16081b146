"""How fast are a bounded number of requests answered? A lean load generator over raw HTTP, in its own process.

A fixed number of connections each send one request after another until the count is used up or time is out. The last
line on standard output is the report, a JSON object; every answer that is not a complete 200 is an error, by reason.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

try:
    import uvloop
except ImportError:  # the standard loop does as well, at twice the cost
    uvloop = None  # type: ignore[assignment,unused-ignore]

TAIL_BYTES = 256  # enough to see how a stream ended


class Report(msgspec.Struct, kw_only=True):
    """What a run came to. Times are milliseconds, from the request's last byte handed to the kernel."""

    completed: int
    errors: dict[str, int]
    events: int
    """SSE events of complete answers, `[DONE]` among them."""
    reads: int
    """Reads that brought events: fewer than the events where the server gathered them."""
    body_bytes: int
    elapsed_s: float
    cpu_s: float
    """Of this process: where it comes near the elapsed time, the client was the limit."""
    requests_per_s: float
    events_per_s: float
    first_byte_ms: dict[str, float]
    total_ms: dict[str, float]
    gap_ms: dict[str, float] | None = None
    """Between two reads that brought events, of one answer; only when asked for."""


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p50, p99 and the largest of seconds, in milliseconds; empty for none."""
    if not values:
        return {}
    found = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(found[max(0, math.ceil(q * len(found)) - 1)] * 1000, 3) for name, q in at.items()}


class Tally:
    """What all connections of a run share: the requests that are left and what came of the others."""

    def __init__(self, requests: int, *, streamed: bool, gaps: bool) -> None:
        self.left = requests
        self.streamed = streamed
        self.completed = 0
        self.errors: dict[str, int] = {}
        self.events = 0
        self.reads = 0
        self.body_bytes = 0
        self.first_byte_s: list[float] = []
        self.total_s: list[float] = []
        self.gap_s: list[float] | None = [] if gaps else None

    def take(self) -> bool:
        """Take one of the requests that are left."""
        if self.left <= 0:
            return False
        self.left -= 1
        return True

    def error(self, reason: str) -> None:
        self.errors[reason] = self.errors.get(reason, 0) + 1


class Connection(asyncio.Protocol):
    """One connection that sends its next request when the answer to the last one is complete."""

    def __init__(self, request: bytes, tally: Tally, ended: asyncio.Future[None]) -> None:
        self._request = request
        self._tally = tally
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._busy = False
        self._clear()

    def _clear(self) -> None:
        self._sent_s = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self._events = 0
        self._seen = 0  # events at the last read
        self._bytes = 0
        self._tail = b""

    def send(self) -> None:
        """Send the next request, or end when none is left."""
        if self._transport is None or not self._tally.take():
            self._end()
            return
        self._busy = True
        self._parser = httptools.HttpResponseParser(self)
        self._clear()
        self._transport.write(self._request)

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if not self._ended.done():
            self._ended.set_result(None)

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            return
        now_s = time.perf_counter()
        if not self._first_s and self._bytes == 0:
            self._last_s = now_s
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as problem:
            self._fail(type(problem).__name__)
            return
        if self._events > self._seen:
            self._tally.reads += 1
            if self._tally.gap_s is not None and self._seen:
                self._tally.gap_s.append(now_s - self._last_s)
            self._last_s = now_s
            self._seen = self._events

    def connection_lost(self, _exc: Exception | None) -> None:
        self._transport = None
        if self._busy:
            self._busy = False
            self._tally.error("connection lost" if not self._bytes else "answer cut off")
        self._end()

    # The parser's side.

    def on_body(self, body: bytes) -> None:
        if not self._first_s:
            self._first_s = time.perf_counter()
        self._bytes += len(body)
        if self._tally.streamed:
            self._events += body.count(b"\n\n")
            if self._tail[-1:] == b"\n" and body[:1] == b"\n":
                self._events += 1  # the blank line came in two pieces
        self._tail = body[-TAIL_BYTES:] if len(body) >= TAIL_BYTES else (self._tail + body)[-TAIL_BYTES:]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(f"status {status}")
            return
        if self._tally.streamed and b"data: [DONE]" not in self._tail:
            self._fail("stream without an end")
            return
        if self._tally.streamed and b'"error"' in self._tail:
            self._fail("error event")
            return
        tally = self._tally
        tally.completed += 1
        tally.events += self._events
        tally.body_bytes += self._bytes
        tally.first_byte_s.append((self._first_s or time.perf_counter()) - self._sent_s)
        tally.total_s.append(time.perf_counter() - self._sent_s)
        self._busy = False
        # In a later turn: this one is still inside the parser.
        asyncio.get_running_loop().call_soon(self.send)

    def _fail(self, reason: str) -> None:
        self._busy = False
        self._tally.error(reason)
        if self._transport is not None:
            self._transport.close()


async def open_connection(
    host: str, port: int, request: bytes, tally: Tally
) -> tuple[Connection, asyncio.Future[None]]:
    """Open a connection that waits for its first `send`. Raise `OSError` when nobody listens."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    _, connection = await loop.create_connection(lambda: Connection(request, tally, ended), host, port)
    return connection, ended


async def replace_lost(host: str, port: int, request: bytes, tally: Tally) -> None:
    """Keep one connection at work: a new one for each that was lost, while requests are left."""
    while tally.left > 0:
        try:
            connection, ended = await open_connection(host, port, request, tally)
        except OSError:
            tally.take()
            tally.error("connection refused")
            await asyncio.sleep(0.01)
            continue
        connection.send()
        await ended


async def run(asked: argparse.Namespace, request: bytes) -> Report:
    """Connect, wait for the word to begin if told to, send everything, and report."""
    target = urlsplit(asked.url)
    host, port = target.hostname or "127.0.0.1", target.port or 80
    tally = Tally(asked.requests, streamed=asked.stream, gaps=asked.gaps)
    opened = [await open_connection(host, port, request, tally) for _ in range(asked.concurrency)]
    if asked.wait:
        print(json.dumps({"ready": True}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    began_s, began_cpu = time.perf_counter(), time.process_time()

    async def work(connection: Connection, ended: asyncio.Future[None]) -> None:
        connection.send()
        await ended
        await replace_lost(host, port, request, tally)

    workers = [asyncio.ensure_future(work(*pair)) for pair in opened]
    _, late = await asyncio.wait(workers, timeout=asked.time_s)
    elapsed_s = time.perf_counter() - began_s
    for worker in late:
        worker.cancel()
        tally.error("out of time")
    return Report(
        completed=tally.completed,
        errors=tally.errors,
        events=tally.events,
        reads=tally.reads,
        body_bytes=tally.body_bytes,
        elapsed_s=round(elapsed_s, 4),
        cpu_s=round(time.process_time() - began_cpu, 4),
        requests_per_s=round(tally.completed / elapsed_s, 1),
        events_per_s=round(tally.events / elapsed_s, 1),
        first_byte_ms=quantiles(tally.first_byte_s),
        total_ms=quantiles(tally.total_s),
        gap_ms=None if tally.gap_s is None else quantiles(tally.gap_s),
    )


def request_bytes(asked: argparse.Namespace) -> bytes:
    """Write the one request that is sent again and again."""
    target = urlsplit(asked.url)
    body: dict[str, Any] = {"model": asked.model, "messages": [{"role": "user", "content": asked.prompt}]}
    if asked.stream:
        body["stream"] = True
    if asked.max_tokens is not None:
        body["max_tokens"] = asked.max_tokens
    body |= json.loads(asked.fields)
    data = msgspec.json.encode(body)
    if len(data) < asked.body_bytes:
        body["messages"][0]["content"] += " word" * ((asked.body_bytes - len(data)) // 5)
        data = msgspec.json.encode(body)
    lines = [
        f"POST {target.path or '/'} HTTP/1.1",
        f"host: {target.netloc}",
        "accept: */*",
        "content-type: application/json",
        f"content-length: {len(data)}",
    ]
    if asked.key is not None:
        lines.append(f"authorization: Bearer {asked.key}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def main() -> None:
    """Read the command line, run, and print the report."""
    parser = argparse.ArgumentParser(description="A lean load generator for chat completions.")
    parser.add_argument("url", help="where to post, e.g. http://127.0.0.1:8080/v1/chat/completions")
    parser.add_argument("--key", default=None, help="API key (default: none is sent)")
    parser.add_argument("--model", default="auto")
    parser.add_argument("--stream", action="store_true", help="ask for streamed answers")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--fields", default="{}", help="further fields of the body, as a JSON object")
    parser.add_argument("--body-bytes", type=int, default=0, help="lengthen the prompt to about so many bytes")
    parser.add_argument("--requests", type=int, default=100, help="how many requests in all")
    parser.add_argument("--concurrency", type=int, default=1, help="how many connections")
    parser.add_argument("--time-s", type=float, default=60, help="give up after so many seconds")
    parser.add_argument("--gaps", action="store_true", help="report the gaps between events")
    parser.add_argument("--wait", action="store_true", help="connect, print a line, and begin at a line of input")
    asked = parser.parse_args()
    start = asyncio.run if uvloop is None else uvloop.run
    report = start(run(asked, request_bytes(asked)))
    print(msgspec.json.encode(report).decode(), flush=True)
    os._exit(0 if not report.errors else 1)  # a thread may still wait for standard input


if __name__ == "__main__":
    main()
