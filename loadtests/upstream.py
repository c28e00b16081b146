"""What would a vLLM server send? A scripted look-alike in its own process, cheap enough to measure others with.

It answers in the bytes of `loadtests/transcript.py`, one write an event, and it counts: what a gateway left open,
finished or aborted is read at `GET /__state`.

- `POST /__script` with `{"model": "small", "script": {…}}` changes how one model answers, or all of them without
  `model`. The fields of `Script` that are left out are those of the command line.
- A request whose `user` is `script:{…}` is answered by that script, laid over the one in force.
- `POST /__reset` forgets scripts, counts and kept requests; `GET /__requests` lists the last `--keep` requests.

The first line on standard output is `{"port": N}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import struct
import sys
import time
from collections import deque
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import httptools
import msgspec

if not __package__:  # run by its path: the folder that holds `loadtests` is not on the path of modules yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtests.playing import Counts, Playing, Programme, head
from loadtests.transcript import Asked, Kind, Script, encode, order_of

try:
    import uvloop
except ImportError:  # the standard loop does as well, at twice the cost
    uvloop = None  # type: ignore[assignment,unused-ignore]

BAD_GATEWAY_PAGE = (
    "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n"
    "<hr><center>nginx/1.24.0</center>\r\n</body>\r\n</html>\r\n"
)


class Kept(msgspec.Struct):
    """A request as it came, for tests that look at what was passed on."""

    path: str
    headers: dict[str, str]
    body: str


class Upstream:
    """What all connections share: the models, their programmes and the counts."""

    def __init__(self, models: list[str], script: Script, keep: int) -> None:
        self.models = models
        self._script = script
        self.counts = Counts()
        self.kept: deque[Kept] = deque(maxlen=keep)
        self._asked = msgspec.json.Decoder(Asked)
        self._first = Programme(script)
        self._programmes: dict[str, Programme] = {}
        self._ids = 0
        self.started_s = int(time.time())

    def reset(self) -> None:
        """As at the start. Requests that are open stay counted as open."""
        self.counts = Counts(
            connections=self.counts.connections,
            uploading=self.counts.uploading,
            open=self.counts.open,
            started=self.counts.open,
        )
        self.kept.clear()
        self._programmes.clear()
        self._first = Programme(self._script)

    def new_id(self) -> str:
        """Sixteen hexadecimal digits, as vLLM's."""
        self._ids += 1
        return f"{self.started_s & 0xFFFFFFFF:08x}{self._ids:08x}"

    def decode(self, body: bytes) -> Asked:
        return self._asked.decode(body)

    def set_script(self, body: bytes) -> None:
        """Raise `msgspec.MsgspecError` for a script that is none."""
        asked = msgspec.json.decode(body, type=dict[str, Any])
        script = self._laid_over(self._script, asked.get("script", {}))
        model = asked.get("model")
        for name in self.models if model is None else [str(model)]:
            self._programmes[name] = Programme(script)

    @staticmethod
    def _laid_over(script: Script, fields: dict[str, Any]) -> Script:
        return msgspec.convert(msgspec.to_builtins(script) | fields, Script)

    def programme(self, asked: Asked) -> Programme:
        """Return the programme for a request; one that plays a limited number of times counts down."""
        found = self._programmes.get(asked.model, self._first)
        if asked.user is not None and asked.user.startswith("script:"):
            return Programme(self._laid_over(found.script, msgspec.json.decode(asked.user[7:])))
        if found.left is not None:
            if found.left == 0:
                return self._first
            found.left -= 1
        return found

    def metrics(self) -> bytes:
        """Render the few of vLLM's metrics that say how busy it is."""
        counts = self.counts
        values = {
            "num_requests_running": ("gauge", counts.open),
            "num_requests_waiting": ("gauge", 0),
            "kv_cache_usage_perc": ("gauge", 0),
            "prompt_tokens_total": ("counter", counts.prompt_tokens),
            "generation_tokens_total": ("counter", counts.completion_tokens),
        }
        lines = [
            "# HELP process_start_time_seconds Scripted.",
            "# TYPE process_start_time_seconds gauge",
            f"process_start_time_seconds {float(self.started_s)}",
        ]
        for name, (kind, value) in values.items():
            lines += [f"# HELP vllm:{name} Scripted.", f"# TYPE vllm:{name} {kind}"]
            # Counted for all models together: one of them stands for the others, so that the sum is right.
            lines.append(f'vllm:{name}{{engine="0",model_name="{self.models[0]}"}} {float(value)}')
        return ("\n".join(lines) + "\n").encode()

    def model_list(self) -> bytes:
        permission = {
            "id": f"modelperm-{self.new_id()}",
            "object": "model_permission",
            "created": self.started_s,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        cards = [
            {"id": name, "object": "model", "created": self.started_s, "owned_by": "vllm", "root": name, "parent": None}
            | {"max_model_len": 32768, "permission": [permission]}
            for name in self.models
        ]
        return encode({"object": "list", "data": cards})


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """Write an error in vLLM's shape."""
    phrase = HTTPStatus(status).phrase
    return encode({"error": {"message": message, "type": phrase, "param": param, "code": status}})


class Request(msgspec.Struct):
    """One request that arrived in full."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    close: bool


class Connection(asyncio.Protocol):
    """One connection: requests in, one answer at a time out, pipelined requests in their order."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._path = ""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._uploading = False
        self._waiting: deque[Request] = deque()
        self._request: Request | None = None
        self._playing: Playing | None = None

    @property
    def counts(self) -> Counts:
        return self._upstream.counts

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)
        self.counts.connections += 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            body = b"Invalid HTTP request received."
            self.write(head(400, "text/plain; charset=utf-8", len(body), {}, close=True) + body)
            self._hang_up()

    def eof_received(self) -> bool | None:
        self._peer_left()
        return False

    def connection_lost(self, _exc: Exception | None) -> None:
        self._peer_left()
        self._transport = None
        self.counts.connections -= 1

    def pause_writing(self) -> None:
        if self._playing is not None:
            self._playing.pause()

    def resume_writing(self) -> None:
        if self._playing is not None:
            self._playing.resume()

    # The parser's side.

    def on_message_begin(self) -> None:
        self._path, self._headers, self._body = "", {}, []
        self._uploading = True
        self.counts.uploading += 1

    def on_url(self, url: bytes) -> None:
        self._path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._uploading = False
        self.counts.uploading -= 1
        close = not self._parser.should_keep_alive()
        method = self._parser.get_method().decode()
        self._waiting.append(Request(method, self._path, self._headers, b"".join(self._body), close))
        self._next()

    # The answers' side.

    def write(self, data: bytes) -> None:
        """Send, if there is still someone to send to."""
        if self._transport is not None and data:
            self._transport.write(data)

    def answered(self) -> None:
        """Count the answer under way as complete and turn to the next request."""
        self._playing = None
        self.counts.open -= 1
        self.counts.finished += 1
        self._done()

    def failed(self, *, reset: bool) -> None:
        """End the answer under way here, and the connection with it."""
        self._playing = None
        self.counts.open -= 1
        self.counts.failed += 1
        self._hang_up(reset=reset)

    def _hang_up(self, *, reset: bool = False) -> None:
        self._waiting.clear()
        if self._transport is None:
            return
        if reset:
            # A linger time of zero makes the kernel send RST in place of FIN.
            given = self._transport.get_extra_info("socket")
            given.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.close()

    def _peer_left(self) -> None:
        self._waiting.clear()
        if self._uploading:
            self._uploading = False
            self.counts.uploading -= 1
        if self._playing is not None:
            self._playing.cancel()
            self._playing = None
            self.counts.open -= 1
            self.counts.aborted += 1

    def _done(self) -> None:
        request, self._request = self._request, None
        if request is not None and request.close:
            self._hang_up()
        elif self._waiting:
            # In a later turn: a chain of pipelined requests is no recursion.
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._request is None and self._waiting:
            self._request = self._waiting.popleft()
            self._answer(self._request)

    def _reply(self, status: int, body: bytes, kind: str | None = "application/json", **extra: str) -> None:
        close = self._request is not None and self._request.close
        self.write(head(status, kind if body else None, len(body), extra, close=close) + body)
        self._done()

    def _refuse(self, status: int, body: bytes, kind: str = "application/json", **extra: str) -> None:
        self.counts.refused += 1
        self._reply(status, body, kind, **extra)

    def _answer(self, request: Request) -> None:
        path = request.path.partition("?")[0]
        upstream = self._upstream
        if path in ("/v1/chat/completions", "/v1/completions"):
            if request.method != "POST":
                self._reply(405, encode({"detail": "Method Not Allowed"}), allow="POST")
            else:
                upstream.kept.append(Kept(request.path, request.headers, request.body.decode("utf-8", "replace")))
                self._complete("chat" if path == "/v1/chat/completions" else "text", request)
        elif path in ("/health", "/ping"):
            self._reply(200, b"")
        elif path == "/v1/models":
            self._reply(200, upstream.model_list())
        elif path == "/version":
            self._reply(200, encode({"version": "0.32.0"}))
        elif path == "/load":
            self._reply(200, encode({"server_load": self.counts.open}))
        elif path == "/metrics":
            self._reply(200, upstream.metrics(), "text/plain; version=1.0.0; charset=utf-8")
        elif path == "/__state":
            self._reply(200, encode(self.counts))
        elif path == "/__requests":
            self._reply(200, encode(list(upstream.kept)))
        elif path == "/__reset" and request.method == "POST":
            upstream.reset()
            self._reply(200, encode(self.counts))
        elif path == "/__script" and request.method == "POST":
            self._set_script(request.body)
        else:
            self._reply(404, encode({"detail": "Not Found"}))

    def _set_script(self, body: bytes) -> None:
        try:
            self._upstream.set_script(body)
        except msgspec.MsgspecError as problem:
            self._reply(400, error_body(400, str(problem)))
        else:
            self._reply(200, b"{}")

    def _complete(self, kind: Kind, request: Request) -> None:
        upstream = self._upstream
        try:
            asked = upstream.decode(request.body)
            programme = upstream.programme(asked)
        except msgspec.MsgspecError as problem:
            self._refuse(400, error_body(400, f"1 validation error:\n  {problem}"))
            return
        if asked.model not in upstream.models:
            message = f"The model `{asked.model}` does not exist. Valid aliases: {', '.join(upstream.models)}."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            self._refuse(404, encode({"error": error}))
            return
        if not bytes(asked.messages if kind == "chat" else asked.prompt):
            field = "messages" if kind == "chat" else "prompt"
            message = f"1 validation error:\n  {{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required'}}"
            self._refuse(400, error_body(400, message, f"body.{field}"))
            return
        script = programme.script
        if script.status != 200 or script.html:
            self._refuse_as_scripted(script)
            return
        given_id = request.headers.get("x-request-id")
        order = order_of(kind, asked)
        self.counts.open += 1
        self.counts.started += 1
        self._playing = Playing(self, programme, order, given_id or upstream.new_id(), close=request.close)
        self._playing.begin()

    def _refuse_as_scripted(self, script: Script) -> None:
        status = 502 if script.html and script.status == 200 else script.status
        if script.body is not None:
            body = script.body.encode()
        elif script.html:
            body = BAD_GATEWAY_PAGE.encode()
        else:
            body = error_body(status, "The engine is currently busy and cannot accept new requests.")
        kind = "text/html" if script.html else script.content_type
        delay_s = script.head_delay_ms / 1000
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, lambda: self._refuse(status, body, kind, **script.headers))
        else:
            self._refuse(status, body, kind, **script.headers)


async def serve(upstream: Upstream, host: str, port: int, *, until_eof: bool) -> None:
    """Serve until a signal, or with `until_eof` until standard input ends, so that no orphan stays behind."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    server = await loop.create_server(lambda: Connection(upstream), host, port, backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    if until_eof:
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 4096) else stopped.set())
    await stopped.wait()
    server.close()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="A scripted look-alike of a vLLM server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--model", action="append", help="a model id it serves; may be repeated (default: scripted)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an answer that carry text")
    parser.add_argument("--interval-ms", type=float, default=0, help="time before each token")
    parser.add_argument("--head-delay-ms", type=float, default=0, help="time before the head of an answer")
    parser.add_argument("--burst", type=int, default=1, help="events a write")
    parser.add_argument("--logprob", type=float, default=-0.05, help="log-probability of every token")
    parser.add_argument("--prompt-tokens", type=int, default=37, help="prompt tokens of every bill")
    parser.add_argument("--keep", type=int, default=0, help="how many requests `GET /__requests` lists")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    asked = parser.parse_args()
    script = Script(
        tokens=asked.tokens,
        interval_ms=asked.interval_ms,
        head_delay_ms=asked.head_delay_ms,
        burst=asked.burst,
        logprob=asked.logprob,
        prompt_tokens=asked.prompt_tokens,
    )
    upstream = Upstream(asked.model or ["scripted"], script, asked.keep)
    run = asyncio.run if uvloop is None else uvloop.run
    run(serve(upstream, asked.host, asked.port, until_eof=asked.until_eof))


if __name__ == "__main__":
    main()
