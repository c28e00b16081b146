"""Does every bad request get an answer that a client understands, soon, and without harm?"""

from __future__ import annotations

import socket

import pytest

from tests.e2e.malformed import CHAT, OK_BYTES, Case, cases, check, chunked, head, send
from tests.running import HELLO, Stack, wait_until

CASES = cases()
SLOWEST_S = 1.0  # a bound for a busy machine; `make prove` says how long it really takes


def test_the_table_is_as_long_as_promised() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused(session_stack: Stack, case: Case) -> None:
    outcome = send(session_stack.gateway.port, case)
    check(case, outcome)
    assert outcome.took_s < SLOWEST_S


def test_the_whole_table_leaves_no_trace(stack: Stack) -> None:
    gateway = stack.gateway
    pid = gateway.pid
    for case in CASES:
        check(case, send(gateway.port, case))
    assert [upstream.seen for upstream in stack.upstreams] == [0, 0, 0], "an upstream saw something of it"
    assert gateway.process.running
    assert gateway.pid == pid
    assert gateway.get("/healthz").status == 200
    assert gateway.chat().status == 200
    said = gateway.process.said()
    assert "Traceback" not in said
    assert "internal error" not in said


def test_a_body_that_is_cut_harms_nobody(stack: Stack) -> None:
    gateway = stack.gateway
    for cut in (head(f"POST {CHAT}", b"Content-Length: 500\r\n") + OK_BYTES, chunked([OK_BYTES])[:-7]):
        for leave in (socket.SHUT_WR, socket.SHUT_RDWR):
            with socket.create_connection(("127.0.0.1", gateway.port), 5) as connection:
                connection.sendall(cut)
                connection.shutdown(leave)
                assert connection.recv(1) == b"", "there is nobody left who could read an answer"
    assert [upstream.seen for upstream in stack.upstreams] == [0, 0, 0]
    assert wait_until(lambda: "incomplete_body" in gateway.process.said())


def test_of_a_key_given_twice_the_backend_gets_what_was_judged(stack: Stack) -> None:
    body = b'{"model": "large", "n": 2, "model": "small", "n": 1, "messages": [], "messages": %b, "user": "a", "user": "b"}'
    reply = stack.gateway.post("/v1/chat/completions", body % str(HELLO).replace("'", '"').encode())
    assert reply.status == 200
    assert stack.large.seen == 0
    (request,) = stack.small.requests()
    assert request["body"] == {"model": Stack.SMALL, "n": 1, "messages": HELLO, "user": "b"}
