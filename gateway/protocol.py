"""How are the bytes of a connection taken for HTTP? By uvicorn's protocol, and with what clients need besides.

* What is not HTTP is refused in OpenAI's shape too, and no head may be larger than `_LARGEST_HEAD_BYTES`.
* The departure of a client reaches the request under way, also when other requests wait behind it.
* `Upgrade` is ignored, as RFC 9110 section 7.8 allows. The JDK's client asks for h2c with its first request, and sends
  the body along; uvicorn would lose both the body and the connection.
* HTTP/1.0 knows no chunks: a stream ends there with its connection.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.errors import Refusal
from gateway.http import new_id, request_id

_LARGEST_HEAD_BYTES = 64 * 1024
_LINGER_S = 1.0
# So many requests are read ahead while one is answered: who reads no more does not notice that the client has gone.
_MOST_WAITING = 16
_log = logging.getLogger("tierway.protocol")


class HttpProtocol(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: RequestResponseCycle | None = None
        self._heads = 0
        self._head_bytes = 0
        self._in_head = False
        self._upgrading = False
        self._over = False

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._unset_keepalive_if_required()
        head = self._heads if self._in_head else None
        size_bytes = len(data)
        while data:
            try:
                self.parser.feed_data(data)
                data = b""
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    self._refuse(Refusal("method_not_allowed", "CONNECT is not allowed here."))
                    return
                data = self._without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._refuse(Refusal("invalid_http", "These bytes are not a request of HTTP/1.1."))
                return
        if self._in_head and head == self._heads:
            self._head_bytes += size_bytes
            if self._head_bytes > _LARGEST_HEAD_BYTES:
                self._refuse(Refusal("head_too_large", "The headers are larger than anybody needs."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        """Tell the request under way that nobody waits for its answer. uvicorn tells only the one that came last."""
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    # -- the parser's side ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads += 1
        self._head_bytes = 0
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._upgrading = self.parser.should_upgrade()
        if self._upgrading:
            return  # it begins once more, without that header
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            _end_with_connection(self.cycle)
        if 0 < len(self.pipeline) <= _MOST_WAITING:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        if not self._upgrading:
            super().on_message_complete()

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return the request that asked for another protocol, as if it had not, and what came behind its head."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b\r\n" % line for line in self.headers if line[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        return b"".join([*lines, b"\r\n", rest])

    # -- the application's side -----------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what no application can be asked about, and hear no more from this client."""
        self._over = True
        _log.info("refused a connection's bytes: %s", refusal.code)
        answering = self._running
        self._give_up()
        if answering is not None and answering.response_started and not answering.response_complete:
            # An answer within an answer would be taken for a part of it.
            self.transport.close()
            return
        body = refusal.body()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id({"headers": self.headers or ()}) or new_id("req-").encode()),
            (b"connection", b"close"),
            *refusal.headers(),
        ]
        lines = [b"%b: %b\r\n" % line for line in headers]
        self.transport.write(b"".join([STATUS_LINE[refusal.status], *lines, b"\r\n", body]))
        # To close while the client still sends would break the connection before it has read this.
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


def _end_with_connection(cycle: RequestResponseCycle) -> None:
    """Have an answer without a length sent as it is, instead of in chunks."""
    send = cycle.send
    open_ended = False

    async def send_plainly(message: MutableMapping[str, Any]) -> None:
        nonlocal open_ended
        if message["type"] == "http.response.start":
            open_ended = all(name != b"content-length" for name, _ in message["headers"])
            if open_ended:
                cycle.chunked_encoding = False
        elif open_ended:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)  # type: ignore[arg-type]

    cycle.send = send_plainly  # type: ignore[method-assign, assignment]
