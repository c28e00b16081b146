"""Does the client of vLLM servers stand what servers and networks do? Against a real socket, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from backends import vllm
from backends.backend import (
    BackendFault,
    Broken,
    Call,
    Counters,
    Overloaded,
    Rejected,
    ServerFacts,
    TimedOut,
    Timeouts,
    Unreachable,
    Window,
)
from backends.error_answers import fault_of
from backends.sse import DONE
from backends.vllm import HttpPool, VllmBackend

RECORDED = Path(__file__).parents[1] / "contract"
KEY = "sk-upstream-secret"
STREAM = Call(endpoint="chat/completions", body=(b'{"stream":true}',), stream=True)
WHOLE = Call(endpoint="completions", body=(b'{"prompt":"x"}',), stream=False)
QUICK = Timeouts(connect_s=0.05, first_token_s=0.05, between_tokens_s=0.05, total_s=5.0)

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
T = TypeVar("T")


# -- a server that does exactly what a test says ----------------------------------------------------------------------


class Request(msgspec.Struct):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Connection:
    """One accepted connection, number `number` of its server."""

    def __init__(self, server: Server, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self._server = server
        self._reader = reader
        self._writer = writer

    async def request(self) -> Request:
        """Read a request. Raises `IncompleteReadError` when the peer has gone."""
        head = await self.head()
        head.body = await self._reader.readexactly(int(head.headers.get("content-length", "0")))
        self._server.requests.append(head)
        self._server.asked.set()
        return head

    async def head(self) -> Request:
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return Request(method, path, headers, b"")

    def say(self, *data: bytes) -> None:
        self._writer.write(b"".join(data))

    def answer(self, status: int, body: bytes, kind: str = "application/json", *extra: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", f"content-type: {kind}", *extra]
        self.say("\r\n".join(lines).encode() + b"\r\n\r\n", body)

    def event(self, *events: bytes) -> None:
        for event in events:
            self.say(b"%x\r\n%b\r\n" % (len(event), event))

    def reset(self) -> None:
        """End the connection with RST in place of FIN."""
        given = self._writer.get_extra_info("socket")
        given.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def until_gone(self) -> None:
        """Wait until the peer closes."""
        with suppress(ConnectionError):
            while await self._reader.read(65536):
                pass
        self._server.gone.append(self.number)
        self._server.left.set()


Play = Callable[[Connection], Awaitable[None]]


class Server:
    def __init__(self, play: Play) -> None:
        self._play = play
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.connections = 0
        self.requests: list[Request] = []
        self.gone: list[int] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(Connection(self, self.connections, reader, writer), writer))
        self._tasks.add(task)

    async def _serve(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        try:
            await self._play(connection)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.append(connection.number)
            self.left.set()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


@asynccontextmanager
async def serving(play: Play) -> AsyncIterator[Server]:
    server = Server(play)
    listening = await asyncio.start_server(server.accept, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        await server.close()


def against(play: Play, client: Callable[[VllmBackend, Server], Awaitable[T]], timeouts: Timeouts | None = None) -> T:
    """Run `client` against a server that plays `play` on every connection."""

    async def run() -> T:
        async with serving(play) as server:
            pool = HttpPool()
            try:
                async with asyncio.timeout(10):
                    return await client(VllmBackend(pool, url=server.url, api_key=KEY, timeouts=timeouts), server)
            finally:
                await pool.close()

    return asyncio.run(run())


async def read(backend: VllmBackend, call: Call) -> list[bytes]:
    async with backend.open(call) as answer:
        return [chunk async for chunks in answer for chunk in chunks]


def answer_to(call: Call, play: Play) -> list[bytes]:
    return against(play, lambda backend, _: read(backend, call))


def fault(call: Call, play: Play, timeouts: Timeouts | None = None) -> BackendFault:
    async def client(backend: VllmBackend, _: Server) -> BackendFault:
        with pytest.raises(BackendFault) as raised:
            await read(backend, call)
        return raised.value

    return against(play, client, timeouts)


def token(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


async def streams(connection: Connection) -> None:
    """Answer every request of a connection with a complete stream."""
    while True:
        await connection.request()
        connection.say(SSE_HEAD)
        connection.event(token("a"), token("b"), DONE)
        connection.say(LAST_CHUNK)


async def answers(connection: Connection) -> None:
    """Answer every request of a connection with a complete JSON."""
    while True:
        await connection.request()
        connection.answer(200, b'{"choices":[]}')


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_whole_answer_is_one_chunk() -> None:
    assert answer_to(WHOLE, answers) == [b'{"choices":[]}']


def test_a_stream_is_complete_events_up_to_the_end() -> None:
    assert answer_to(STREAM, streams) == [token("a"), token("b"), DONE]


def test_events_come_together_as_they_came_and_never_in_parts() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        data = token("a") + token("b") + token("c")
        connection.say(SSE_HEAD)
        connection.event(data[:100])
        await may_go_on.wait()
        connection.event(data[100:], DONE)
        connection.say(LAST_CHUNK)
        await connection.until_gone()

    async def client(backend: VllmBackend, _: Server) -> list[list[bytes]]:
        parts = []
        async with backend.open(STREAM) as answer:
            async for chunks in answer:
                parts.append(chunks)
                may_go_on.set()
        return parts

    may_go_on = asyncio.Event()
    first, *rest = against(play, client)
    assert first == [token("a")]
    assert [one for part in rest for one in part] == [token("b"), token("c"), DONE]


@pytest.mark.parametrize("name", ["chat_stream_logprobs", "completions_stream", "variants/stream_keepalive"])
@pytest.mark.parametrize("size", [1, 7, 100, 100_000])
def test_a_recorded_stream_arrives_whole_in_packets_of_any_size(name: str, size: int) -> None:
    recorded = (RECORDED / "vllm" / f"{name}.sse").read_bytes()

    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(SSE_HEAD)
        connection.event(*[recorded[at : at + size] for at in range(0, len(recorded), size)])
        connection.say(LAST_CHUNK)
        await connection.until_gone()

    assert b"".join(answer_to(STREAM, play)) == recorded


def test_the_call_is_sent_as_it_is() -> None:
    async def client(backend: VllmBackend, server: Server) -> list[Request]:
        await read(backend, WHOLE)
        await read(backend, msgspec.structs.replace(WHOLE, endpoint="chat/completions", body=('{"ü":1}'.encode(),)))
        return server.requests

    first, second = against(answers, client)
    assert (first.method, first.path, first.body) == ("POST", "/v1/completions", WHOLE.body[0])
    assert (second.path, second.body) == ("/v1/chat/completions", '{"ü":1}'.encode())


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/v1/completions"),
        ("/", "/v1/completions"),
        ("/v1", "/v1/completions"),
        ("/v1/", "/v1/completions"),
        ("/deep/v1", "/deep/v1/completions"),
    ],
)
def test_a_url_may_be_given_with_or_without_its_version(suffix: str, path: str) -> None:
    async def run() -> str:
        async with serving(answers) as server:
            pool = HttpPool()
            try:
                await read(VllmBackend(pool, url=server.url + suffix), WHOLE)
            finally:
                await pool.close()
            return server.requests[0].path

    assert asyncio.run(run()) == path


# -- headers ----------------------------------------------------------------------------------------------------------


def headers_of(call: Call, api_key: str | None) -> dict[str, str]:
    async def run() -> dict[str, str]:
        async with serving(answers) as server:
            pool = HttpPool()
            try:
                await read(VllmBackend(pool, url=server.url, api_key=api_key), call)
            finally:
                await pool.close()
            return server.requests[0].headers

    return asyncio.run(run())


def test_the_key_of_the_server_is_sent_as_a_bearer_token() -> None:
    assert headers_of(WHOLE, KEY)["authorization"] == f"Bearer {KEY}"


def test_no_header_is_sent_that_nobody_asked_for() -> None:
    call = msgspec.structs.replace(WHOLE, headers=(("traceparent", "00-1-2-01"), ("x-request-id", "req-1")))
    found = headers_of(call, None)
    assert found.pop("host").startswith("127.0.0.1:")
    assert found == {
        "content-type": "application/json",
        "accept-encoding": "identity",
        "content-length": str(len(WHOLE.body[0])),
        "traceparent": "00-1-2-01",
        "x-request-id": "req-1",
    }


def test_a_cookie_of_the_server_is_not_sent_back() -> None:
    async def play(connection: Connection) -> None:
        while True:
            await connection.request()
            connection.answer(200, b"{}", "application/json", "set-cookie: a=b; path=/")

    async def client(_: VllmBackend, server: Server) -> dict[str, str]:
        # A jar would take no cookie of a bare address.
        pool = HttpPool()
        backend = VllmBackend(pool, url=server.url.replace("127.0.0.1", "localhost"))
        try:
            await read(backend, WHOLE)
            await read(backend, WHOLE)
        finally:
            await pool.close()
        return server.requests[1].headers

    assert "cookie" not in against(play, client)


# -- large bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 65_535, 65_536, 65_537, 5_000_000])
def test_bodies_of_any_size_arrive_whole_and_once(size: int) -> None:
    body = bytes(number % 251 for number in range(1000)) * (size // 1000) + b"x" * (size % 1000)

    async def client(backend: VllmBackend, server: Server) -> list[Request]:
        await read(backend, msgspec.structs.replace(WHOLE, body=(body[:1], body[1:])))
        return server.requests

    (request,) = against(answers, client)
    assert request.body == body
    assert request.headers["content-length"] == str(size)
    assert "transfer-encoding" not in request.headers


def test_a_large_body_is_sent_again_from_its_beginning_after_a_lost_connection() -> None:
    body = b"0123456789" * 20_000

    async def play(connection: Connection) -> None:
        await connection.request()
        if connection.number > 1:
            connection.answer(200, b"{}")
            await connection.until_gone()

    async def client(backend: VllmBackend, server: Server) -> list[Request]:
        await read(backend, msgspec.structs.replace(WHOLE, body=(body[:1], body[1:])))
        return server.requests

    first, second = against(play, client)
    assert first.body == second.body == body


def test_a_server_that_refuses_before_it_has_read_everything_is_understood() -> None:
    async def play(connection: Connection) -> None:
        await connection.head()
        connection.answer(413, error("Too large."), "application/json", "connection: close")

    found = fault(msgspec.structs.replace(WHOLE, body=(b"x" * 5_000_000,)), play)
    assert isinstance(found, Rejected)
    assert found.status == 413


# -- faults -----------------------------------------------------------------------------------------------------------


def whole(status: int, body: bytes, kind: str = "application/json", *extra: str) -> Play:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.answer(status, body, kind, *extra)
        await connection.until_gone()

    return play


def stream_then(*events: bytes, end: Callable[[Connection], None] = lambda _: None, hang: bool = False) -> Play:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(SSE_HEAD)
        connection.event(*events)
        if hang:
            await connection.until_gone()
        else:
            end(connection)

    return play


async def cut_short(connection: Connection) -> None:
    await connection.request()
    connection.say(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")


def error(message: str, **fields: object) -> bytes:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None, **fields}}).encode()


def test_a_refusal_keeps_the_words_of_the_server() -> None:
    play = whole(422, error("No such grammar.", code="bad_grammar", param="guided"))
    refused = fault(WHOLE, play)
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.message, refused.code, refused.param) == (
        422,
        "No such grammar.",
        "bad_grammar",
        "guided",
    )
    assert not refused.too_long


def test_a_refused_stream_is_a_refusal_too() -> None:
    assert isinstance(fault(STREAM, whole(400, error("No."))), Rejected)


def test_a_server_without_room_may_say_when_to_come_back() -> None:
    full = fault(WHOLE, whole(503, b"<html>busy</html>", "text/html", "retry-after: 7"))
    assert isinstance(full, Overloaded)
    assert full.retry_after_s == 7.0


BROKEN: dict[str, tuple[Call, Play]] = {
    "HTML from a dying proxy": (WHOLE, whole(502, b"<html>502 Bad Gateway</html>", "text/html")),
    "an engine that died": (WHOLE, whole(500, error("EngineCore encountered an issue."))),
    "a redirect": (WHOLE, whole(307, b"", "text/html", "location: http://example.invalid/")),
    "a redirect to itself": (WHOLE, whole(308, b"", "text/html", "location: /v1/completions")),
    "an empty success": (WHOLE, whole(204, b"")),
    "bad credentials": (WHOLE, whole(401, b'{"error":"Unauthorized"}')),
    "forbidden": (WHOLE, whole(403, error("No."))),
    "a whole answer that is HTML": (WHOLE, whole(200, b"<html>login</html>", "text/html")),
    "a whole answer that is a stream": (WHOLE, whole(200, DONE, "text/event-stream")),
    "a stream that is JSON": (STREAM, whole(200, b"{}")),
    "a stream that is HTML": (STREAM, whole(200, b"<html>", "text/html")),
    "an error that is HTML": (WHOLE, whole(400, b"<html>Bad Request</html>", "text/html")),
    "an error of another shape": (WHOLE, whole(404, b'{"detail":"Not Found"}')),
    "an error that is no object": (WHOLE, whole(400, b"[" * 10_000)),
    "an address where nothing is": (WHOLE, whole(404, error("File Not Found", type="not_found_error", code=404))),
    "a model that is not there": (WHOLE, whole(404, error("no such model", code="model_not_found"))),
    "a whole answer cut short": (WHOLE, cut_short),
    "a stream cut between events": (STREAM, stream_then(token("a"))),
    "a stream cut in an event": (STREAM, stream_then(token("a"), token("b")[:-1])),
    "a stream that is reset": (STREAM, stream_then(token("a"), end=Connection.reset)),
    "a stream that ends in an event": (
        STREAM,
        stream_then(token("a"), b"data: {", end=lambda connection: connection.say(LAST_CHUNK)),
    ),
    "a chunk that is none": (STREAM, stream_then(token("a"), end=lambda connection: connection.say(b"zz\r\n"))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_broken(name: str) -> None:
    assert type(fault(*BROKEN[name])) is Broken


def test_what_came_before_a_stream_broke_off_was_given_out() -> None:
    async def client(backend: VllmBackend, _: Server) -> list[bytes]:
        seen: list[bytes] = []
        with pytest.raises(Broken):
            await read_into(seen, backend)
        return seen

    async def read_into(seen: list[bytes], backend: VllmBackend) -> None:
        async with backend.open(STREAM) as answer:
            async for chunks in answer:
                seen += chunks

    assert against(stream_then(token("a"), token("b"), end=Connection.reset), client)[:1] == [token("a")]


def test_what_is_not_http_is_a_fault() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        await connection.until_gone()

    assert isinstance(fault(WHOLE, play), (Broken, Unreachable))


def test_an_event_without_an_end_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_LARGEST_EVENT_BYTES", 100_000)
    assert type(fault(STREAM, stream_then(b"data: " + b"x" * 200_000, hang=True))) is Broken


def test_a_whole_answer_without_an_end_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_LARGEST_ANSWER_BYTES", 100_000)
    assert type(fault(WHOLE, whole(200, b"x" * 200_000))) is Broken


def test_an_error_without_an_end_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_LARGEST_ERROR_BYTES", 1000)
    assert type(fault(WHOLE, whole(400, error("x" * 200_000)))) is Broken


def test_a_long_message_of_a_server_is_cut() -> None:
    refused = fault_of(400, error("x" * 50_000))
    assert isinstance(refused, Rejected)
    assert len(refused.message) == 1000


def test_a_port_where_nobody_listens_is_unreachable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))

        async def run() -> None:
            pool = HttpPool()
            try:
                with pytest.raises(Unreachable):
                    await read(VllmBackend(pool, url=f"http://127.0.0.1:{free.getsockname()[1]}"), WHOLE)
            finally:
                await pool.close()

        asyncio.run(run())


def test_a_name_that_does_not_exist_is_unreachable() -> None:
    async def run() -> None:
        pool = HttpPool()
        try:
            with pytest.raises((Unreachable, TimedOut)):
                await read(VllmBackend(pool, url="http://nowhere.invalid", timeouts=Timeouts(total_s=3.0)), WHOLE)
        finally:
            await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize("name", ["bad credentials", "a stream that is reset", "a redirect", "a chunk that is none"])
def test_no_exception_shows_the_key(name: str) -> None:
    call, play = BROKEN[name]
    found = fault(call, play)
    shown = f"{found} {found!r} {found.args!r}" + "".join(traceback.format_exception(found))
    assert KEY not in shown


def test_a_backend_does_not_show_its_key() -> None:
    assert KEY not in repr(VllmBackend(HttpPool(), url="http://127.0.0.1:1", api_key=KEY))


# -- what recorded errors mean ----------------------------------------------------------------------------------------


def recorded_errors() -> Iterator[tuple[str, int, bytes]]:
    for path in sorted(RECORDED.rglob("*.json")):
        recorded = json.loads(path.read_bytes())
        response = recorded.get("response", recorded)
        if response.get("status", 200) >= 400 and "body" in response:
            body = response["body"]
            yield (
                str(path.relative_to(RECORDED).with_suffix("")),
                response["status"],
                (body if isinstance(body, str) else json.dumps(body)).encode(),
            )


ERRORS = list(recorded_errors())
NOT_REFUSALS: dict[str, type[BackendFault]] = {
    "llamacpp/err_method_not_allowed": Broken,
    "llamacpp/get_nonexistent": Broken,
    "llamacpp/get_version": Broken,
    "vllm/err_method_not_allowed": Broken,
    "vllm/err_unknown_model": Broken,
    "vllm/err_unknown_model_stream": Broken,
    "vllm/get_nonexistent": Broken,
    "vllm/variants/err_bad_api_key": Broken,
    "vllm/variants/err_no_api_key": Broken,
    "vllm/variants/models_no_key": Broken,
    "vllm/variants/err_queue_full_overflow": Overloaded,
    "vllm/variants/err_queue_full_overflow2": Overloaded,
}


def test_there_are_recorded_errors_of_every_kind() -> None:
    names = {name for name, _, _ in ERRORS}
    assert set(NOT_REFUSALS) <= names
    assert len(names) >= 30
    assert {name.split("/")[0] for name in names} == {"vllm", "llamacpp"}


@pytest.mark.parametrize(("name", "status", "body"), ERRORS, ids=[name for name, _, _ in ERRORS])
def test_a_recorded_error_means_what_the_server_meant(name: str, status: int, body: bytes) -> None:
    found = fault_of(status, body)
    assert type(found) is NOT_REFUSALS.get(name, Rejected)
    if isinstance(found, Rejected):
        assert 400 <= found.status < 500
        assert found.message
        assert found.code is None or not found.code.isdigit()
        assert found.too_long == ("prompt_too_long" in name)
        assert (found.code == "context_length_exceeded") == found.too_long


@pytest.mark.parametrize(
    ("advice", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("30", 30.0),
        ("1.5", 1.5),
        ("-4", 0.0),
        ("Fri, 20 Nov 2026 05:00:09 GMT", None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("1e300", 86_400.0),
    ],
)
def test_advice_to_come_back_later_is_a_sane_number_or_none(advice: str | None, seconds: float | None) -> None:
    for status in (429, 503):
        full = fault_of(status, b"", advice)
        assert isinstance(full, Overloaded)
        assert full.retry_after_s == seconds


@pytest.mark.parametrize(
    "status", [301, 304, 400, 401, 403, 404, 407, 408, 409, 413, 429, 499, 500, 502, 503, 504, 529]
)
@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"null", b"[]", b'"x"', b'{"error":null}', b'{"error":{"message":7}}', b"[" * 100_000]
)
def test_any_answer_with_any_status_is_some_fault(status: int, body: bytes) -> None:
    assert isinstance(fault_of(status, body), (Broken, Overloaded))


@pytest.mark.parametrize(
    "body",
    [
        error("This model's maximum context length is 4096 tokens."),
        error("x", code="context_length_exceeded"),
        error("x", type="exceed_context_size_error"),
        error("the request exceeds the available context size. try increasing the context size"),
    ],
)
def test_a_prompt_that_is_too_long_is_known_in_every_dialect(body: bytes) -> None:
    found = fault_of(400, body)
    assert isinstance(found, Rejected)
    assert found.too_long
    assert found.code == "context_length_exceeded"


# -- limits of time ---------------------------------------------------------------------------------------------------


async def silent(connection: Connection) -> None:
    await connection.request()
    await connection.until_gone()


def timed_out(call: Call, play: Play, timeouts: Timeouts) -> TimedOut:
    began_s = time.monotonic()
    found = fault(call, play, timeouts)
    assert time.monotonic() - began_s < 2.0
    assert isinstance(found, TimedOut)
    return found


def test_a_stream_that_never_begins_times_out_at_its_first_token() -> None:
    found = timed_out(STREAM, silent, QUICK)
    assert (found.phase, str(found)) == ("first_token", "first_token took longer than 0.05 s")


def test_a_head_without_an_event_is_no_first_token() -> None:
    assert timed_out(STREAM, stream_then(hang=True), QUICK).phase == "first_token"


def test_half_an_event_is_no_token() -> None:
    assert timed_out(STREAM, stream_then(token("a")[:-1], hang=True), QUICK).phase == "first_token"


def test_a_stream_that_stops_times_out_between_tokens() -> None:
    assert timed_out(STREAM, stream_then(token("a"), hang=True), QUICK).phase == "between_tokens"


def test_a_whole_answer_has_only_the_total_limit() -> None:
    limits = Timeouts(connect_s=0.01, first_token_s=0.01, between_tokens_s=0.01, total_s=0.08)
    found = timed_out(WHOLE, silent, limits)
    assert (found.phase, str(found)) == ("total", "total took longer than 0.08 s")


def trickle(event: bytes, every_s: float) -> Play:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(SSE_HEAD)
        gone = asyncio.create_task(connection.until_gone())
        while not gone.done():
            connection.event(event)
            await asyncio.wait([gone], timeout=every_s)

    return play


def test_a_stream_that_goes_on_for_too_long_runs_into_the_total_limit() -> None:
    limits = Timeouts(first_token_s=1.0, between_tokens_s=1.0, total_s=0.1)
    assert timed_out(STREAM, trickle(token("a"), 0.01), limits).phase == "total"


def test_comments_that_keep_a_connection_alive_are_no_tokens() -> None:
    assert timed_out(STREAM, trickle(b": keep-alive\n\n", 0.01), QUICK).phase == "first_token"


def test_comments_between_tokens_are_none_either() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(SSE_HEAD)
        connection.event(token("a"))
        gone = asyncio.create_task(connection.until_gone())
        while not gone.done():
            await asyncio.wait([gone], timeout=0.01)
            connection.event(b": keep-alive\n\n")

    assert timed_out(STREAM, play, QUICK).phase == "between_tokens"


def test_a_stream_that_is_slow_but_within_its_limits_is_complete() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(SSE_HEAD)
        for number in range(6):
            connection.event(token(str(number)))
            await asyncio.sleep(0.05)
        connection.event(DONE)
        connection.say(LAST_CHUNK)
        await connection.until_gone()

    limits = Timeouts(first_token_s=0.2, between_tokens_s=0.2)
    found = against(play, lambda backend, _: read(backend, STREAM), limits)
    assert len(found) == 7


def test_the_time_of_a_slow_reader_does_not_count() -> None:
    async def client(backend: VllmBackend, _: Server) -> list[bytes]:
        seen: list[bytes] = []
        async with backend.open(STREAM) as answer:
            async for chunks in answer:
                if not seen:
                    await asyncio.sleep(0.3)
                    may_go_on.set()
                seen += chunks
        return seen

    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(SSE_HEAD)
        connection.event(token("a"))
        await may_go_on.wait()
        connection.event(token("b"), DONE)
        connection.say(LAST_CHUNK)
        await connection.until_gone()

    may_go_on = asyncio.Event()
    limits = Timeouts(first_token_s=5.0, between_tokens_s=0.2)
    assert against(play, client, limits) == [token("a"), token("b"), DONE]


def test_the_total_limit_ends_even_a_call_whose_reader_is_busy() -> None:
    async def client(backend: VllmBackend, _: Server) -> TimedOut:
        with pytest.raises(TimedOut) as raised:
            await be_busy(backend)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        return raised.value

    async def be_busy(backend: VllmBackend) -> None:
        async with backend.open(STREAM) as answer:
            async for _ in answer:
                await asyncio.Event().wait()

    limits = Timeouts(total_s=0.08)
    assert against(stream_then(token("a"), hang=True), client, limits).phase == "total"


def test_a_cancellation_from_outside_stays_one() -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        reading = asyncio.create_task(read(backend, STREAM))
        await server.asked.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await server.left.wait()

    against(silent, client)


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port that accepts no more connections: the kernel drops the first packet of every new one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = []
        try:
            for _ in range(3):
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(listening.getsockname())
                waiting.append(one)
            yield listening.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


def test_a_server_that_does_not_accept_is_unreachable_within_the_limit_of_connecting() -> None:
    async def run(port: int) -> None:
        pool = HttpPool()
        try:
            backend = VllmBackend(pool, url=f"http://127.0.0.1:{port}", timeouts=Timeouts(connect_s=0.05))
            with pytest.raises(Unreachable):
                await read(backend, WHOLE)
        finally:
            await pool.close()

    began_s = time.monotonic()
    with full_backlog() as port:
        asyncio.run(run(port))
    assert 0.04 < time.monotonic() - began_s < 2.0


# -- leaving ----------------------------------------------------------------------------------------------------------


def test_leaving_in_mid_stream_closes_the_connection() -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        async with backend.open(STREAM) as answer:
            async for chunks in answer:
                assert chunks[0] == token("a")
                break
        await server.left.wait()

    against(stream_then(token("a"), hang=True), client)


def test_leaving_before_the_first_event_closes_the_connection() -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        async with backend.open(STREAM):
            pass
        await server.left.wait()

    against(stream_then(hang=True), client)


def test_an_exception_in_the_block_closes_the_connection_and_stays_itself() -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        with pytest.raises(KeyError):
            await stumble(backend)
        await server.left.wait()

    async def stumble(backend: VllmBackend) -> None:
        async with backend.open(STREAM) as answer:
            async for _ in answer:
                raise KeyError

    against(stream_then(token("a"), hang=True), client)


@pytest.mark.parametrize("call", [STREAM, WHOLE], ids=["streamed", "whole"])
def test_cancelling_before_the_head_closes_the_connection(call: Call) -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        reading = asyncio.create_task(read(backend, call))
        await server.asked.wait()
        reading.cancel()
        await asyncio.wait([reading])
        await server.left.wait()

    against(silent, client)


def test_cancelling_in_the_middle_of_a_whole_answer_closes_the_connection() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        head_sent.set()
        await connection.until_gone()

    async def client(backend: VllmBackend, server: Server) -> None:
        reading = asyncio.create_task(read(backend, WHOLE))
        await head_sent.wait()
        reading.cancel()
        await asyncio.wait([reading])
        await server.left.wait()

    head_sent = asyncio.Event()
    against(play, client)


def test_a_time_limit_closes_the_connection() -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        with pytest.raises(TimedOut):
            await read(backend, STREAM)
        await server.left.wait()

    against(silent, client, QUICK)


def test_leaving_after_the_first_of_several_events_at_once_closes_the_connection() -> None:
    async def client(backend: VllmBackend, server: Server) -> None:
        async with backend.open(STREAM) as answer:
            async for _ in answer:
                break
        await server.left.wait()

    against(stream_then(token("a"), token("b"), hang=True), client)


# -- connections ------------------------------------------------------------------------------------------------------


def connections_after(play: Play, *calls: Call) -> int:
    async def client(backend: VllmBackend, server: Server) -> int:
        for call in calls:
            await read(backend, call)
        assert len(server.requests) == len(calls)
        return server.connections

    return against(play, client)


def test_a_connection_is_used_again_after_a_finished_stream() -> None:
    assert connections_after(streams, STREAM, STREAM, STREAM) == 1


def test_a_connection_is_used_again_after_a_whole_answer() -> None:
    assert connections_after(answers, WHOLE, WHOLE, WHOLE) == 1


def test_a_connection_is_used_again_when_the_end_of_the_body_comes_after_the_end_of_the_stream() -> None:
    async def play(connection: Connection) -> None:
        while True:
            await connection.request()
            connection.say(SSE_HEAD)
            connection.event(token("a"), DONE)
            await asyncio.sleep(0.01)
            connection.say(LAST_CHUNK)

    assert connections_after(play, STREAM, STREAM) == 1


def test_a_stream_whose_body_does_not_end_is_complete_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_LAST_READ_S", 0.02)

    async def client(backend: VllmBackend, server: Server) -> None:
        assert await read(backend, STREAM) == [token("a"), DONE]
        await server.left.wait()

    against(stream_then(token("a"), DONE, hang=True), client)


def test_an_answer_that_ends_with_its_connection_is_complete() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.say(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        connection.say(token("a"), DONE)

    assert answer_to(STREAM, play) == [token("a"), DONE]


def test_calls_at_the_same_time_have_connections_of_their_own() -> None:
    async def client(backend: VllmBackend, server: Server) -> int:
        await asyncio.gather(*(read(backend, STREAM) for _ in range(20)))
        return server.connections

    assert against(streams, client) == 20


def test_a_kept_connection_that_the_server_closes_is_tried_once_more_on_another() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        connection.answer(200, b"{}")
        await connection.request()
        if connection.number > 1:
            connection.answer(200, b"{}")

    async def client(backend: VllmBackend, server: Server) -> tuple[int, int]:
        assert await read(backend, WHOLE) == [b"{}"]
        assert await read(backend, WHOLE) == [b"{}"]
        return server.connections, len(server.requests)

    assert against(play, client) == (2, 3)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_lost_twice_is_unreachable_and_not_tried_a_third_time(reset: bool) -> None:
    async def play(connection: Connection) -> None:
        await connection.request()
        if reset:
            connection.reset()

    async def client(backend: VllmBackend, server: Server) -> int:
        with pytest.raises(Unreachable):
            await read(backend, WHOLE)
        return server.connections

    assert against(play, client) == 2


def test_a_connection_lost_in_the_middle_of_an_answer_is_not_tried_again() -> None:
    async def client(backend: VllmBackend, server: Server) -> int:
        with pytest.raises(Broken):
            await read(backend, STREAM)
        return server.connections

    assert against(stream_then(token("a"), end=Connection.reset), client) == 1


def test_a_lost_connection_is_not_tried_again_when_the_time_is_up() -> None:
    async def client(backend: VllmBackend, server: Server) -> int:
        with pytest.raises(TimedOut):
            await read(backend, STREAM)
        return server.connections

    assert against(silent, client, QUICK) == 1


# -- the probe --------------------------------------------------------------------------------------------------------


def health(status: int, models: int = 200) -> Play:
    async def play(connection: Connection) -> None:
        while True:
            request = await connection.request()
            connection.answer({"/health": status, "/v1/models": models}[request.path], b"")

    return play


def probe(play: Play, timeouts: Timeouts | None = None) -> list[str]:
    async def client(backend: VllmBackend, server: Server) -> list[str]:
        await backend.probe()
        return [request.path for request in server.requests]

    return against(play, client, timeouts)


def test_a_healthy_server_is_asked_for_its_models_once() -> None:
    async def client(backend: VllmBackend, server: Server) -> list[str]:
        for _ in range(3):
            await backend.probe()
        return [request.path for request in server.requests]

    assert against(health(200), client) == ["/health", "/v1/models", "/health", "/health"]


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_server_that_does_not_tell_its_models_is_no_worse(status: int) -> None:
    assert probe(health(200, status)) == ["/health", "/v1/models"]


@pytest.mark.parametrize(("kind", "model"), [("vllm", "smollm2-135m"), ("llamacpp", "smollm2")])
def test_a_probe_says_what_the_server_says_of_itself(kind: str, model: str) -> None:
    async def play(connection: Connection) -> None:
        while True:
            request = await connection.request()
            connection.answer(200, answered(f"{kind}/get_v1_models") if request.path == "/v1/models" else b"{}")

    async def client(backend: VllmBackend, _: Server) -> list[ServerFacts]:
        return [await backend.probe(), await backend.probe()]

    first, second = against(play, client)
    assert first == second
    assert first == ServerFacts(software=kind, windows=(Window(model, 2048),))  # type: ignore[arg-type]


def test_a_server_that_was_away_is_asked_anew_what_it_is() -> None:
    async def play(connection: Connection) -> None:
        while True:
            request = await connection.request()
            connection.answer(statuses.pop(0) if request.path == "/health" else 200, b"{}")

    async def client(backend: VllmBackend, server: Server) -> list[str]:
        for _ in range(3):
            with suppress(Broken):
                await backend.probe()
        return [request.path for request in server.requests]

    statuses = [200, 503, 200]
    assert against(play, client) == ["/health", "/v1/models", "/health", "/health", "/v1/models"]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_a_health_check_is_asked_for_its_models(status: int) -> None:
    assert probe(health(status)) == ["/health", "/v1/models"]


def test_a_server_whose_health_check_fails_is_broken() -> None:
    with pytest.raises(Broken):
        probe(health(503))
    with pytest.raises(Broken):
        probe(health(404, 500))


def test_a_server_that_hangs_up_is_unreachable() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()

    with pytest.raises(Unreachable):
        probe(play)


# -- counting ---------------------------------------------------------------------------------------------------------

CHAT_CALL = Call(
    endpoint="chat/completions", body=(b'{"model":"m","stream":true,', b'"messages":[{"role":"user"}]}'), stream=False
)
TEXT_CALL = Call(endpoint="completions", body=(b'{"model":"m",', b'"prompt":"Hello world"}'), stream=False)


def answered(name: str) -> bytes:
    """The body of a recorded answer."""
    recorded = json.loads((RECORDED / f"{name}.json").read_bytes())
    return json.dumps(recorded["response"]["body"], separators=(",", ":")).encode()


def counts(kind: str, answers: dict[str, tuple[int, bytes]], *calls: Call) -> tuple[list[int | None], list[Request]]:
    """What a server of that kind says of calls, and what it was asked for that."""

    async def play(connection: Connection) -> None:
        while True:
            request = await connection.request()
            if request.method == "GET":
                connection.answer(200, answered(f"{kind}/get_v1_models") if request.path == "/v1/models" else b"{}")
            else:
                connection.answer(*answers.get(request.path, (404, b"{}")))

    async def client(backend: VllmBackend, server: Server) -> tuple[list[int | None], list[Request]]:
        await backend.probe()
        found = [await backend.count_tokens(call) for call in calls]
        return found, [request for request in server.requests if request.method == "POST"]

    return against(play, client)


def test_vllm_is_asked_with_the_body_of_the_call() -> None:
    tokenize = {"/tokenize": (200, answered("vllm/tokenize_chat"))}
    found, asked = counts("vllm", tokenize, CHAT_CALL, TEXT_CALL)
    assert found == [37, 37]
    assert [(one.path, one.body) for one in asked] == [
        ("/tokenize", b"".join(CHAT_CALL.body)),
        ("/tokenize", b"".join(TEXT_CALL.body)),
    ]


def test_llama_cpp_is_asked_for_a_chat_at_one_address_and_for_a_text_at_another() -> None:
    answers = {
        "/v1/chat/completions/input_tokens": (200, answered("llamacpp/count_chat")),
        "/tokenize": (200, answered("llamacpp/tokenize_content")),
    }
    batch = Call(endpoint="completions", body=(b'{"prompt":["a","b"]}',), stream=False)
    found, asked = counts("llamacpp", answers, CHAT_CALL, TEXT_CALL, batch)
    assert found == [37, 2, None]
    assert [one.body for one in asked] == [
        b"".join(CHAT_CALL.body),
        b'{"add_special":true,"content":"Hello world"}',
    ]


def test_a_server_that_cannot_count_is_asked_once() -> None:
    found, asked = counts("vllm", {}, CHAT_CALL, CHAT_CALL)
    assert found == [None, None]
    assert len(asked) == 1


@pytest.mark.parametrize("answer", [(400, b"{}"), (500, b""), (200, b"<html>"), (200, b'{"tokens":[]}')])
def test_a_request_that_is_not_counted_says_nothing_of_the_next(answer: tuple[int, bytes]) -> None:
    found, asked = counts("vllm", {"/tokenize": answer}, CHAT_CALL, CHAT_CALL)
    assert found == [None, None]
    assert len(asked) == 2


def test_a_megabyte_is_sent_in_slices_and_its_ids_are_counted() -> None:
    ids = ",".join(str(one) for one in range(250_000))
    answers = {"/tokenize": (200, f'{{"count":250000,"max_model_len":9,"tokens":[{ids}]}}'.encode())}
    large = Call(endpoint="completions", body=(b'{"model":"m",', b'"prompt":"%b"}' % (b"x" * 1_000_000)), stream=False)
    found, asked = counts("vllm", answers, large)
    assert found == [250_000]
    assert asked[0].body == b"".join(large.body)


def test_a_server_that_hangs_up_on_a_count_is_a_fault() -> None:
    async def play(connection: Connection) -> None:
        await connection.request()

    async def client(backend: VllmBackend, _: Server) -> int | None:
        return await backend.count_tokens(CHAT_CALL)

    with pytest.raises(Unreachable):
        against(play, client)


# -- its own counters -------------------------------------------------------------------------------------------------


def counters(status: int, text: bytes) -> Counters | None:
    async def play(connection: Connection) -> None:
        request = await connection.request()
        assert (request.path, request.headers["authorization"]) == ("/metrics", f"Bearer {KEY}")
        connection.answer(status, text)

    return against(play, lambda backend, _: backend.counters())


def test_a_server_is_asked_for_its_counters() -> None:
    found = counters(200, (RECORDED / "vllm/get_metrics.txt").read_bytes())
    assert found is not None
    assert (found.prompt_tokens, found.completion_tokens, found.running) == (37, 8, 0)


@pytest.mark.parametrize(("status", "text"), [(404, b"vllm:"), (501, b"{}"), (200, b"<html></html>"), (401, b"")])
def test_a_server_without_counters_has_none(status: int, text: bytes) -> None:
    assert counters(status, text) is None


def test_a_server_that_cannot_say_what_it_counted_is_broken() -> None:
    with pytest.raises(Broken):
        counters(500, b"")
