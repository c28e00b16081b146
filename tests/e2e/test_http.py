"""Is it good HTTP for clients of every age? What travels around a request rather than in it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Self

import pytest

from tests.running import ALICE, HELLO, OPERATOR, Gateway, Stack, wait_until

BODY = json.dumps({"model": "auto", "messages": HELLO}).encode()
STREAM = json.dumps({"model": "auto", "messages": HELLO, "stream": True}).encode()
ORIGIN = "https://chat.example.com"


class Wire:
    """A bare connection that reads whole answers."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def head(self) -> tuple[int, dict[str, str]]:
        line = self._file.readline().decode()
        assert line.startswith("HTTP/1.1 "), line
        headers: dict[str, str] = {}
        while (header := self._file.readline().decode("latin-1").rstrip("\r\n")) != "":
            name, _, value = header.partition(": ")
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value
        return int(line.split()[1]), headers

    def answer(self, *, headless: bool = False) -> tuple[int, dict[str, str], bytes]:
        status, headers = self.head()
        if headless:
            return status, headers, b""
        if "content-length" in headers:
            return status, headers, self._file.read(int(headers["content-length"]))
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                assert self._file.readline() == b"\r\n"
            assert self._file.readline() == b"\r\n"
            return status, headers, body
        return status, headers, self._file.read()

    def ended(self) -> bool:
        return self._file.read(1) == b""

    def quiet(self, for_s: float = 0.15) -> bool:
        self.socket.settimeout(for_s)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(10)


def request(
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes | None = BODY,
    *lines: str,
    version: str = "1.1",
) -> bytes:
    """Write a request; without a body nothing says that there is one."""
    head = [f"{method} {path} HTTP/{version}", "Host: gateway", f"Authorization: Bearer {ALICE}", *lines]
    if body is not None:
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + (body or b"")


@pytest.fixture
def wire(stack: Stack) -> Iterator[Wire]:
    with Wire(stack.gateway.port) as wire:
        yield wire


def test_many_requests_on_one_connection(wire: Wire) -> None:
    for number in range(5):
        wire.send(request("POST", "/v1/chat/completions", STREAM if number % 2 else BODY, f"x-request-id: n-{number}"))
        status, headers, body = wire.answer()
        assert (status, headers["x-request-id"]) == (200, f"n-{number}")
        assert body.endswith(b"data: [DONE]\n\n") == bool(number % 2)
        wire.send(request("GET", "/v1/models/none", None))
        assert wire.answer()[0] == 404
        wire.send(request(body=b"{"))
        assert wire.answer()[0] == 400


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    wire.send(
        *(request("POST", "/v1/chat/completions", STREAM if n % 3 else BODY, f"x-request-id: n-{n}") for n in range(25))
    )
    for number in range(25):
        status, headers, body = wire.answer()
        assert (status, headers["x-request-id"]) == (200, f"n-{number}")
        assert body
    assert wire.quiet()


def test_pipelined_behind_a_large_body(wire: Wire, stack: Stack) -> None:
    large = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "x" * 1_000_000}]}).encode()
    wire.send(request(body=large), request(body=large), request("GET", "/healthz", None))
    assert [wire.answer()[0] for _ in range(3)] == [200, 200, 200]
    assert len(stack.small.requests()[-1]["body"]["messages"][0]["content"]) == 1_000_000


def test_expect_100_continue(wire: Wire) -> None:
    wire.send(
        request(
            "POST",
            "/v1/chat/completions",
            None,
            "Expect: 100-continue",
            "Content-Type: application/json",
            f"Content-Length: {len(BODY)}",
        )
    )
    assert wire.head()[0] == 100
    wire.send(BODY)
    assert wire.answer()[0] == 200


def test_expect_100_continue_is_not_invited_to_send_what_will_be_refused(wire: Wire) -> None:
    wire.send(
        request(
            "POST",
            "/v1/chat/completions",
            None,
            "Expect: 100-continue",
            "Content-Type: application/json",
            "Content-Length: 99999999",
        )
    )
    assert wire.answer()[0] == 413


def test_a_body_in_chunks(wire: Wire) -> None:
    head = request("POST", "/v1/chat/completions", None, "Content-Type: application/json", "Transfer-Encoding: chunked")
    wire.send(head)
    for start in range(0, len(BODY), 7):
        part = BODY[start : start + 7]
        wire.send(b"%x;name=value\r\n%b\r\n" % (len(part), part))
    wire.send(b"0\r\nX-Trailer: 1\r\n\r\n")
    assert wire.answer()[0] == 200
    wire.send(request())
    assert wire.answer()[0] == 200, "the connection is in step"


def test_a_request_byte_by_byte(wire: Wire) -> None:
    for byte in request():
        wire.send(bytes([byte]))
    assert wire.answer()[0] == 200


def test_http_1_0_whole(wire: Wire) -> None:
    wire.send(request(version="1.0"))
    status, headers, body = wire.answer()
    assert (status, headers["connection"]) == (200, "close")
    assert json.loads(body)["object"] == "chat.completion"
    assert wire.ended()


def test_http_1_0_streamed_knows_no_chunks(wire: Wire) -> None:
    wire.send(request(body=STREAM, version="1.0"))
    status, headers, body = wire.answer()
    assert status == 200
    assert "transfer-encoding" not in headers
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_connection_close_is_kept(wire: Wire) -> None:
    wire.send(request("POST", "/v1/chat/completions", STREAM, "Connection: close"))
    status, headers, body = wire.answer()
    assert (status, headers["connection"]) == (200, "close")
    assert body.endswith(b"data: [DONE]\n\n")
    assert wire.ended()


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_an_upgrade_is_ignored_and_loses_nothing(wire: Wire, protocol: str) -> None:
    # As the JDK's client sends it, with the body behind it.
    lines = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAEAAEAAAAIAAAAA")
    wire.send(request("POST", "/v1/chat/completions", BODY, *lines))
    assert wire.answer()[0] == 200
    wire.send(request("POST", "/v1/chat/completions", STREAM, *lines), request())
    assert wire.answer()[2].endswith(b"data: [DONE]\n\n")
    assert wire.answer()[0] == 200


def test_an_upgrade_in_pieces(wire: Wire) -> None:
    data = request("POST", "/v1/chat/completions", BODY, "Connection: upgrade", "Upgrade: h2c")
    for start in range(0, len(data), 11):
        wire.send(data[start : start + 11])
    assert wire.answer()[0] == 200


def test_head(wire: Wire) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/auto"):
        wire.send(request("HEAD", path, None), request("GET", path, None))
        status, headers, _ = wire.answer(headless=True)
        assert status == 200
        assert headers["x-request-id"]
        assert wire.answer()[0] == 200, "nothing came behind the head"


def test_options_without_cors(wire: Wire) -> None:
    wire.send(
        request("OPTIONS", "/v1/chat/completions", None, f"Origin: {ORIGIN}", "Access-Control-Request-Method: POST")
    )
    status, headers, body = wire.answer()
    assert (status, headers["allow"]) == (405, "POST")
    assert json.loads(body)["error"]["code"] == "method_not_allowed"
    assert not [name for name in headers if name.startswith("access-control")]


def test_everything_has_an_id(stack: Stack) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/nowhere", "/v1/requests/x", "/status"):
        for key in (ALICE, None):
            reply = stack.gateway.get(path, key)
            assert reply.headers["x-request-id"], path
            assert reply.headers["x-tierway-config"], path
    ids = {stack.gateway.get("/healthz").headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


def test_what_no_model_was_asked_about_is_counted_and_logged_too(stack: Stack) -> None:
    gateway = stack.gateway
    reply = gateway.get("/no%0Awhere%22", ALICE)
    assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    assert wait_until(lambda: reply.headers["x-request-id"] in gateway.process.said())
    (line,) = [line for line in gateway.process.said().splitlines() if reply.headers["x-request-id"] in line]
    told = json.loads(line)
    assert (told["event"], told["error"], told["path"]) == ("refused", "unknown_url", '/no\nwhere"')
    assert b'tierway_refusals_total{code="unknown_url"}' in gateway.get("/metrics").body


def test_health_needs_no_key_and_status_an_operator_s(stack: Stack) -> None:
    gateway = stack.gateway
    assert gateway.get("/healthz").json() == {"status": "ok"}
    assert gateway.get("/readyz").json() == {"status": "ready"}
    assert b"tierway_exchanges_total" in gateway.get("/metrics").body
    assert gateway.get("/status").status == 401
    assert (gateway.get("/status", ALICE).status, gateway.get("/status", ALICE).error["code"]) == (403, "admin_only")
    status = gateway.get("/status", OPERATOR).json()
    assert status["config"] == gateway.get("/healthz").headers["x-tierway-config"]
    assert status["routes"]["gpt-4o"]["serves"] == "auto"


def test_bodies_of_16_mb_are_taken(stack: Stack) -> None:
    filler = "x" * (16 * 1024 * 1024 - 200)
    reply = stack.gateway.post(
        "/v1/chat/completions", {"model": "auto", "messages": [{"role": "user", "content": filler}]}
    )
    assert reply.status == 200
    # The upstream's own record of so large a request need not stay.
    stack.small.reset()


@pytest.fixture(scope="module")
def with_cors(session_stack: Stack) -> Gateway:
    return session_stack.start_gateway(server={"cors_origins": [ORIGIN]})


def test_a_preflight_needs_no_key(with_cors: Gateway) -> None:
    with Wire(with_cors.port) as wire:
        asked = (
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization, content-type, x-tierway-include",
        )
        wire.send(
            f"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\n{asked[0]}\r\n{asked[1]}\r\n\r\n".encode()
        )
        status, headers, _ = wire.answer()
        assert status in (200, 204)
        assert headers["access-control-allow-origin"] in (ORIGIN, "*")
        assert "POST" in headers["access-control-allow-methods"]
        for name in ("authorization", "content-type", "x-tierway-include"):
            assert name in headers["access-control-allow-headers"].lower()
        assert headers["x-request-id"]


@pytest.mark.parametrize("body", [BODY, STREAM, b"{"], ids=["whole", "streamed", "refused"])
def test_a_page_may_read_the_answer(with_cors: Gateway, body: bytes) -> None:
    with Wire(with_cors.port) as wire:
        wire.send(request("POST", "/v1/chat/completions", body, f"Origin: {ORIGIN}"))
        status, headers, _ = wire.answer()
        assert status == (400 if body == b"{" else 200)
        assert headers["access-control-allow-origin"] in (ORIGIN, "*")
        wire.send(request("POST", "/v1/chat/completions", body, "Origin: https://evil.example.com"))
        _, headers, _ = wire.answer()
        assert headers.get("access-control-allow-origin") is None


def test_the_port_is_said_to_be_taken(session_stack: Stack) -> None:
    taken = session_stack.gateway.port
    with pytest.raises(AssertionError, match="in use"):
        session_stack.start_gateway("--port", str(taken))


def test_ready_says_when_nothing_can_be_served(session_stack: Stack) -> None:
    config = session_stack.config()
    config["backends"] = {"gone": {"kind": "vllm", "url": "http://127.0.0.1:9", "model": "gone"}}
    config["tiers"] = [{"name": "small", "backends": ["gone"], "price": {"input": 0, "output": 0}}]
    config["routes"] = {"auto": {"steps": [{"tier": "small"}]}}
    config["keys"] = config["keys"][:2]
    with Gateway(config, session_stack.folder, ready="/healthz") as gateway:
        reply = gateway.get("/readyz")
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert gateway.chat().status == 502
        assert wait_until(lambda: gateway.get("/readyz").status == 503)
