"""How is a scripted answer sent? One event after the other, at its pace, until its end, its fault, or the peer's."""

from __future__ import annotations

import asyncio
import json
import math
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from loadtests.transcript import Answer, Order, Script, encode, write_answer

DEAD_ENGINE = {
    "error": {
        "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}


class Counts(msgspec.Struct):
    """What happened so far. `open` = started - finished - aborted - failed."""

    connections: int = 0
    uploading: int = 0
    """Requests whose body has not arrived in full."""
    open: int = 0
    started: int = 0
    finished: int = 0
    aborted: int = 0
    """Left by the peer before the answer was complete."""
    failed: int = 0
    """Ended early by a script."""
    refused: int = 0
    """Answered with an error: bad request, unknown model, or a script's status."""
    tokens: int = 0
    prompt_tokens: int = 0
    """Of answers that began, as usage reports them, without cached ones."""
    completion_tokens: int = 0
    """As usage reports them: with the end token, and of answers that were aborted only those that were sent."""
    events: int = 0


class Programme:
    """A script in force for a model, with the answers already written for it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.left = script.times
        self._written: dict[Order, Answer] = {}

    def answer(self, order: Order) -> Answer:
        """Return the answer to an order, written at its first use."""
        found = self._written.get(order)
        if found is None:
            found = self._written[order] = write_answer(self.script, order)
        return found


class Peer(Protocol):
    """Who an answer is played to."""

    @property
    def counts(self) -> Counts: ...

    def write(self, data: bytes) -> None: ...

    def answered(self) -> None:
        """Count the answer under way as complete and turn to the next request."""

    def failed(self, *, reset: bool) -> None:
        """End the answer under way here, and the connection with it."""


def head(status: int, kind: str | None, length: int | None, extra: dict[str, str], *, close: bool) -> bytes:
    """Write the head of an answer as a vLLM behind uvicorn does. No length: chunks follow."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"date: {formatdate(usegmt=True)}", "server: uvicorn"]
    if length is not None:
        lines.append(f"content-length: {length}")
    if kind is not None:
        lines.append(f"content-type: {kind}")
    lines += [f"{name}: {value}" for name, value in extra.items()]
    lines.append("vary: Origin")
    if length is None:
        lines.append("transfer-encoding: chunked")
    if close:
        lines.append("connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Playing:
    """One answer under way: paced by timers, stopped by the peer's departure or by its script."""

    def __init__(self, connection: Peer, programme: Programme, order: Order, answer_id: str, *, close: bool) -> None:
        self._connection = connection
        self._script = programme.script
        self._order = order
        self._answer = programme.answer(order)
        self._id = answer_id.encode()
        self._close = close
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._at = 0  # the next event
        self._token = 0  # the last token that was waited for
        self._wrote = 0
        self._due = 0.0
        self._paused = False

    def begin(self) -> None:
        """Send what can be sent now; the rest follows by itself."""
        script = self._script
        delay_s = script.head_delay_ms / 1000
        if script.fail is not None and script.fail_after is None:
            self._later(delay_s, self._fail)
        elif self._order.stream:
            self._later(delay_s, self._start_stream)
        else:
            fails = script.fail is not None and (script.fail_after or 0) < self._answer.steps
            steps = (script.fail_after or 0) if fails else self._answer.steps
            self._later(delay_s + steps * script.interval_ms / 1000, self._fail if fails else self._send_whole)

    def cancel(self) -> None:
        """Nothing more is sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._timer is None and self._at:
                self._timer = self._loop.call_soon(self._step)

    def _later(self, delay_s: float, then: Any) -> None:
        if delay_s <= 0:
            then()
        else:
            self._timer = self._loop.call_later(delay_s, then)

    def _send_whole(self) -> None:
        self._timer = None
        prefix = b'{"id":"chatcmpl-' if self._order.kind == "chat" else b'{"id":"cmpl-'
        body = prefix + self._id + self._answer.whole
        top = head(200, "application/json", len(body), self._script.headers, close=self._close)
        self._connection.counts.tokens += self._answer.tokens
        self._count_prompt()
        self._connection.counts.completion_tokens += self._answer.tokens
        self._connection.write(top + body)
        self._connection.answered()

    def _count_prompt(self) -> None:
        script = self._script
        self._connection.counts.prompt_tokens += max(0, script.prompt_tokens - script.cached_tokens)

    def _start_stream(self) -> None:
        self._count_prompt()
        kind = "text/event-stream; charset=utf-8"
        self._connection.write(head(200, kind, None, self._script.headers, close=self._close))
        self._id = (b'data: {"id":"chatcmpl-' if self._order.kind == "chat" else b'data: {"id":"cmpl-') + self._id
        self._timer = self._loop.call_soon(self._step)

    def _next_step(self, last_s: float, interval_s: float) -> float:
        """Return when the next token is due: all answers step together, as the sequences of one engine do.

        Never two tokens in a rush to make up for a late one.
        """
        return max(last_s + interval_s, math.ceil(self._loop.time() / interval_s) * interval_s)

    def _step(self) -> None:
        """Write the next event, or burst of events, and wait as long as a token takes."""
        self._timer = None
        script, events, counts = self._script, self._answer.events, self._connection.counts
        written: list[bytes] = []
        while self._at < len(events) and len(written) < script.burst:
            rest, token = events[self._at]
            if script.fail is not None and token > (script.fail_after or 0):
                self._connection.write(b"".join(written))
                self._fail()
                return
            if token > self._token and script.interval_ms:
                self._token = token
                self._due = self._next_step(self._due, script.interval_ms / 1000)
                if not written:
                    self._timer = self._loop.call_at(self._due, self._step)
                    return
            self._at += 1
            counts.events += 1
            counts.tokens += token > 0
            counts.completion_tokens += token > 0
            self._wrote += token > 0
            written.append(b"%x\r\n%b%b\r\n" % (len(self._id) + len(rest), self._id, rest))
        if len(written) < script.burst:
            written.append(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            counts.events += 1
            counts.completion_tokens += max(0, self._answer.tokens - self._wrote)
            self._connection.write(b"".join(written))
            self._connection.answered()
            return
        self._connection.write(b"".join(written))
        if not self._paused:
            self._timer = self._loop.call_soon(self._step)

    def _fail(self) -> None:
        self._timer = None
        how = self._script.fail
        if how == "hang":
            return  # until the peer leaves
        if how == "error":
            if self._script.fail_after is None or not self._order.stream:
                body = encode(DEAD_ENGINE)
                self._connection.write(head(500, "application/json", len(body), {}, close=True) + body)
            else:
                event = b"data: " + json.dumps(DEAD_ENGINE).encode() + b"\n\n"
                self._connection.write(b"%x\r\n%b\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" % (len(event), event))
            self._connection.failed(reset=False)
        else:
            self._connection.failed(reset=how == "reset")
