"""Does one request climb as it should, whole and streamed, whatever the servers do? Real processes, real sockets."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.running import ALICE, HELLO, Reply, Stack, running_stack, wait_until

TEXT = "The capital of France is Paris. It"
BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def text_of(reply: Reply, *, stream: bool) -> str:
    """Return the text of an answer, after a look at everything a client relies on."""
    assert reply.status == 200, reply
    if not stream:
        (choice,) = reply.json()["choices"]
        assert choice["logprobs"] is None
        assert choice["finish_reason"]
        assert reply.json()["model"] == reply.headers["x-tierway-model"]
        return str(choice["message"]["content"])
    events = reply.events
    assert events.count("[DONE]") == 1
    assert events[-1] == "[DONE]"
    return clean_text(events[:-1], reply.headers["x-tierway-model"])


def clean_text(chunks: list[Any], model: str) -> str:
    """Return the text of chunks that are one clean stream of `model`."""
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["model"] for chunk in chunks} == {model}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    assert all(choice["logprobs"] is None for choice in choices)
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def seen(stack: Stack) -> list[int]:
    return [upstream.seen for upstream in stack.upstreams]


def outcomes(stack: Stack, reply: Reply) -> list[tuple[str, str]]:
    return [(one["tier"], one["outcome"]) for one in stack.gateway.decision(reply)["attempts"]]


@contextmanager
def open_stream(port: int, model: str = "auto", **fields: Any) -> Iterator[http.client.HTTPResponse]:
    """Ask for a stream and leave the reading to the caller."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = json.dumps({"model": model, "messages": HELLO, "stream": True, **fields})
        headers = {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def event_of(response: http.client.HTTPResponse) -> str:
    """Read one event."""
    line = response.readline().decode().rstrip("\n")
    assert response.readline() == b"\n"
    return line


# -- doubt ------------------------------------------------------------------------------------------------------------


@BOTH
def test_an_easy_question_is_the_small_one_s(stack: Stack, stream: bool) -> None:
    reply = stack.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == TEXT
    assert (reply.headers["x-tierway-tier"], reply.headers["x-tierway-attempts"]) == ("small", "1")
    assert reply.headers["x-tierway-confidence"] == "0.9512"
    assert seen(stack) == [1, 0, 0]


@BOTH
def test_a_doubtful_answer_goes_up(stack: Stack, stream: bool) -> None:
    stack.small.script(logprob=-1, pieces=["No", "body", " ", "knows", "!"])
    reply = stack.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == TEXT
    assert reply.headers["x-tierway-tier"] == "medium"
    assert outcomes(stack, reply) == [("small", "doubted"), ("medium", "accepted")]
    assert seen(stack) == [1, 1, 0]


@BOTH
def test_the_last_tier_is_never_doubted(stack: Stack, stream: bool) -> None:
    for upstream in stack.upstreams:
        upstream.script(logprob=-3)
    reply = stack.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == TEXT
    assert reply.headers["x-tierway-tier"] == "large"
    assert outcomes(stack, reply) == [("small", "doubted"), ("medium", "doubted"), ("large", "accepted")]
    assert "x-tierway-degraded" not in reply.headers


@BOTH
def test_confidence_is_the_mean_of_the_first_tokens_or_of_all(stack: Stack, stream: bool) -> None:
    # The first four are sure, the rest is not: held, a stream is let through; whole, the answer is doubted.
    stack.small.script(logprobs=[-0.01, -0.01, -0.01, -0.01, -4.0], interval_ms=15)
    reply = stack.gateway.chat(stream=stream)
    assert reply.headers["x-tierway-tier"] == ("small" if stream else "medium")


def test_a_doubted_stream_is_stopped_at_its_server(stack: Stack) -> None:
    stack.small.script(logprob=-3, interval_ms=30, tokens=2000)
    started_s = time.monotonic()
    reply = stack.gateway.chat(stream=True)
    assert text_of(reply, stream=True) == TEXT
    assert time.monotonic() - started_s < 5, "the doubted answer was waited for"
    assert stack.small.idle(1.0)
    assert stack.small.state()["aborted"] == 1


def test_an_answer_without_scores_is_doubted_by_default(stack: Stack) -> None:
    message = {"role": "assistant", "content": "Paris"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    stack.reciter.recite(whole={"id": "1", "object": "chat.completion", "model": "r", "choices": [choice]})
    reply = stack.gateway.chat("told")
    assert (reply.headers["x-tierway-tier"], reply.status) == ("large", 200)


# -- failure before the first byte ------------------------------------------------------------------------------------

FAULTS: dict[str, dict[str, Any]] = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429},
    "401": {"status": 401},
    "an HTML page": {"html": True},
    "an HTML page with 200": {"html": True, "status": 404},
    "a closed connection": {"fail": "close"},
    "a reset connection": {"fail": "reset"},
    "a dead engine": {"fail": "error"},
    "a dead engine after two tokens": {"fail": "error", "fail_after": 2, "interval_ms": 1},
    "a cut after two tokens": {"fail": "close", "fail_after": 2, "interval_ms": 1},
    "a reset after two tokens": {"fail": "reset", "fail_after": 2, "interval_ms": 1},
}


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_before_the_first_byte_is_passed_over(stack: Stack, fault: str, stream: bool) -> None:
    stack.small.script(**FAULTS[fault])
    reply = stack.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == TEXT
    assert reply.headers["x-tierway-tier"] == "medium"
    assert outcomes(stack, reply) == [("small", "failed"), ("medium", "accepted")]


@BOTH
def test_a_frozen_server_is_given_up_in_time(stack: Stack, stream: bool) -> None:
    for script in ({"fail": "hang"}, {"fail": "hang", "fail_after": 2, "interval_ms": 1}):
        stack.small.script("hasty-1b", **script)
        started_s = time.monotonic()
        reply = stack.gateway.chat("patient", stream=stream)
        took_s = time.monotonic() - started_s
        assert text_of(reply, stream=stream) == TEXT
        assert reply.headers["x-tierway-tier"] == "large"
        assert 0.25 < took_s < 4, took_s
        assert "TimedOut" in stack.gateway.decision(reply)["attempts"][0]["fault"]
        assert stack.small.idle(1.0), "the frozen call is still open"


@BOTH
def test_a_server_that_stopped_as_a_process_is_given_up_in_time(stack: Stack, stream: bool) -> None:
    stack.small.process.signal(signal.SIGSTOP)
    try:
        reply = stack.gateway.chat("patient", stream=stream)
    finally:
        stack.small.process.signal(signal.SIGCONT)
    assert reply.headers["x-tierway-tier"] == "large"
    assert text_of(reply, stream=stream) == TEXT


@BOTH
def test_all_above_a_doubt_fail(stack: Stack, stream: bool) -> None:
    stack.small.script(logprob=-2, pieces=["Per", "haps", " ", "Lyon", "."])
    stack.medium.script(status=500)
    stack.large.script(fail="error")
    reply = stack.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == "Perhaps Lyon."
    assert reply.headers["x-tierway-degraded"] == "true"
    assert reply.headers["x-tierway-tier"] == "small"
    assert outcomes(stack, reply) == [("small", "accepted"), ("medium", "failed"), ("large", "failed")]
    assert seen(stack) == [1, 1, 1], "the doubted answer was kept, not asked for again"


@BOTH
def test_nothing_was_kept_and_all_above_fail(stack: Stack, stream: bool) -> None:
    stack.small.script(logprob=-2, pieces=["Per", "haps", " ", "Lyon", "."], interval_ms=2)
    stack.medium.script(status=500)
    stack.large.script(status=500)
    reply = stack.gateway.chat("forgetful", stream=stream)
    assert text_of(reply, stream=stream) == "Perhaps Lyon."
    assert reply.headers["x-tierway-degraded"] == "true"
    assert stack.gateway.decision(reply)["degraded"] is True


@BOTH
def test_the_best_of_the_doubted_is_served(stack: Stack, stream: bool) -> None:
    stack.small.script(logprob=-2)
    stack.medium.script(logprob=-1, pieces=["a", "b", "c", "d", "e"])
    stack.large.script(status=500)
    reply = stack.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == "abcde"
    assert (reply.headers["x-tierway-tier"], reply.headers["x-tierway-degraded"]) == ("medium", "true")


# -- nobody can answer ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("html", [False, True])
def test_everything_fails(stack: Stack, stream: bool, html: bool) -> None:
    for upstream in stack.upstreams:
        upstream.script(html=True) if html else upstream.script(status=500)
    reply = stack.gateway.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (502, "upstream_error")
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers
    for secret in ("html", "nginx", "127.0.0.1", "engine", *(upstream.models[0] for upstream in stack.upstreams)):
        assert secret not in reply.body.decode().lower()
    assert reply.headers["x-tierway-attempts"] == "3"
    assert stack.gateway.decision(reply)["ending"] == "exhausted"


@BOTH
def test_everything_is_full(stack: Stack, stream: bool) -> None:
    for upstream, wait in zip(stack.upstreams, ("9", "4", "6"), strict=True):
        upstream.script(status=429, headers={"retry-after": wait})
    reply = stack.gateway.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (503, "upstream_overloaded")
    assert reply.headers["retry-after"] == "4"
    assert "x-should-retry" not in reply.headers


@BOTH
@pytest.mark.parametrize("status", [400, 404, 409, 422])
def test_a_refusal_keeps_its_message_and_code(stack: Stack, stream: bool, status: int) -> None:
    error = {"message": "No such adapter.", "type": "BadRequestError", "param": "lora", "code": "no_adapter"}
    for upstream in stack.upstreams:
        upstream.script(status=status, body=json.dumps({"error": error}))
    reply = stack.gateway.chat(stream=stream)
    assert reply.status == status
    assert {name: reply.error[name] for name in ("message", "param", "code")} == {
        "message": "No such adapter.",
        "param": "lora",
        "code": "no_adapter",
    }


@BOTH
@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_the_operator_s_fault(stack: Stack, stream: bool, status: int) -> None:
    body = json.dumps(
        {"error": {"message": "Invalid API key: sk-secret", "type": "x", "param": None, "code": "invalid"}}
    )
    for upstream in stack.upstreams:
        upstream.script(status=status, body=body)
    reply = stack.gateway.chat(stream=stream)
    assert reply.status == 502
    assert "www-authenticate" not in reply.headers
    assert "sk-secret" not in reply.body.decode()


@BOTH
def test_a_prompt_that_is_too_long(stack: Stack, stream: bool) -> None:
    message = "This model's maximum context length is 32768 tokens. However, you requested 40000 tokens."
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
    stack.small.script(status=400, body=body)
    assert text_of(stack.gateway.chat(stream=stream), stream=stream) == TEXT, "a larger model may take it"
    stack.medium.script(status=400, body=body)
    stack.large.script(status=400, body=body)
    reply = stack.gateway.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert reply.error["message"] == message


def test_answers_that_are_none(stack: Stack) -> None:
    for whole in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"choices": []}',
        b'{"choices": "x"}',
        b'{"error": {"message": "x"}}',
        b"\xff",
    ):
        stack.reciter.recite(whole=whole)
        assert stack.gateway.chat("told").headers["x-tierway-tier"] == "large", whole
        assert stack.gateway.chat("reciter").status == 502, whole
    for stream in (["{"], ["[DONE]"], [{"error": {"message": "x"}}, "[DONE]"], [{"choices": "x"}], ["\x00"], []):
        stack.reciter.recite(stream=stream)
        assert stack.gateway.chat("told", stream=True).headers["x-tierway-tier"] == "large", stream
        assert stack.gateway.chat("reciter", stream=True).status == 502, stream
    assert "Traceback" not in stack.gateway.process.said()


# -- failure after the first byte -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("fault", ["close", "reset", "error"])
def test_a_stream_that_breaks_says_so(stack: Stack, model: str, fault: str) -> None:
    stack.small.script(fail=fault, fail_after=6, interval_ms=3)
    reply = stack.gateway.chat(model, stream=True)
    assert reply.status == 200
    *chunks, last = reply.events
    assert chunks
    assert last["error"]["code"] == "stream_broken"
    assert last["error"]["type"] == "server_error"
    assert "EngineCore" not in reply.body.decode()
    assert "[DONE]" not in reply.body.decode()
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert seen(stack) == [1, 0, 0]
    assert stack.gateway.decision(reply)["ending"] == "broken"


def test_a_stream_that_freezes_says_so(stack: Stack) -> None:
    stack.small.script("hasty-1b", fail="hang", fail_after=6, interval_ms=3)
    reply = stack.gateway.chat("patient", stream=True)
    assert reply.headers["x-tierway-tier"] == "hasty"
    assert reply.events[-1]["error"]["code"] == "stream_broken"
    assert "[DONE]" not in reply.body.decode()
    assert stack.small.idle(1.0)


def test_a_stream_that_ends_before_its_answer_does(stack: Stack) -> None:
    def event(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "r", "choices": [choice]}

    said = [event({"role": "assistant", "content": ""}), event({"content": "Par"})]
    for ending, cut in ((["[DONE]"], False), ([], False), ([], True)):
        stack.reciter.recite(stream=[*said, *ending], cut=cut)
        reply = stack.gateway.chat("reciter", stream=True)
        assert reply.events[-1]["error"]["code"] == "stream_broken"
        assert "[DONE]" not in reply.body.decode()
    # All that was promised has come, only the last word is missing: that is a whole answer.
    stack.reciter.recite(stream=[*said, event({"content": "is"}), event({}, "stop")])
    reply = stack.gateway.chat("reciter", stream=True)
    assert reply.events[-1] == "[DONE]"
    assert reply.events[-2]["choices"][0]["finish_reason"] == "stop"


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["auto", "small"])
def test_the_first_event_goes_out_before_the_last_is_made(stack: Stack, model: str) -> None:
    stack.small.script(interval_ms=25, tokens=40)
    with open_stream(stack.gateway.port, model) as response:
        first = event_of(response)
        assert json.loads(first[6:])["choices"][0]["delta"]["role"] == "assistant"
        assert stack.small.state()["open"] == 1
        made = stack.small.state()["events"]
        assert made < 20
        # Nothing is gathered: what is made comes, one by one.
        for _ in range(made, 35):
            event_of(response)
        assert stack.small.state()["open"] == 1
        rest = response.read().decode()
    assert rest.endswith("data: [DONE]\n\n")


def test_a_slow_reader_slows_only_itself(stack: Stack) -> None:
    stack.small.script(tokens=20_000, burst=50)
    with open_stream(stack.gateway.port, "small", logprobs=True, top_logprobs=20) as slow:
        event_of(slow)
        assert text_of(stack.gateway.chat("medium", stream=True), stream=True) == TEXT

        def held() -> int:
            return stack.small.state()["events"]

        def stands() -> bool:
            before = held()
            time.sleep(0.2)
            return held() == before

        assert wait_until(stands, 10), "the backend is read for a client that does not read"
        assert held() < 20_000
    assert stack.small.idle(1.0)


# -- departures -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("model", ["auto", "small"])
def test_a_departure_before_the_first_byte_frees_the_backend(
    stack: Stack, stream: bool, reset: bool, model: str
) -> None:
    stack.small.script(head_delay_ms=20_000)
    with leaving(stack, {"model": model, "messages": HELLO, "stream": stream}, reset=reset):
        assert wait_until(lambda: stack.small.state()["open"] == 1)
    assert stack.small.idle(1.0)
    assert seen(stack) == [1, 0, 0], "a departure is no failure: nobody else is asked"


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_a_departure_while_a_doubted_answer_is_kept_frees_all(stack: Stack, reset: bool) -> None:
    stack.small.script(logprob=-3, interval_ms=20, tokens=5000)
    stack.medium.script(head_delay_ms=20_000)
    with leaving(stack, {"model": "auto", "messages": HELLO, "stream": True}, reset=reset):
        assert wait_until(lambda: stack.medium.state()["open"] == 1)
        assert stack.small.state()["open"] == 1, "it is kept until the next has begun"
    assert stack.small.idle(1.0)
    assert stack.medium.idle(1.0)


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("pipelined", [1, 2, 4])
def test_a_departure_frees_the_backend_though_others_wait_behind(stack: Stack, reset: bool, pipelined: int) -> None:
    stack.small.script(head_delay_ms=20_000)
    body = {"model": "small", "messages": HELLO}
    with leaving(stack, *[body] * pipelined, reset=reset):
        assert wait_until(lambda: stack.small.state()["open"] == 1)
    assert stack.small.idle(1.0)


@contextmanager
def leaving(stack: Stack, *bodies: dict[str, Any], reset: bool) -> Iterator[socket.socket]:
    """Send requests on one connection, one after the other without waiting, and leave at the end of the block."""
    with socket.create_connection(("127.0.0.1", stack.gateway.port), 10) as connection:
        for number, body in enumerate(bodies):
            data = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
            connection.sendall(
                f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
            )
            if number == 0:
                wait_until(lambda: stack.small.state()["open"] == 1)
        yield connection
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


# -- servers that die and come back -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal() -> Iterator[Stack]:
    """A stack whose servers may be killed."""
    with running_stack() as stack:
        yield stack


@BOTH
def test_a_dead_server_is_passed_over_and_taken_back(mortal: Stack, stream: bool) -> None:
    mortal.small.kill()
    reply = mortal.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == TEXT
    assert reply.headers["x-tierway-tier"] == "medium"
    assert wait_until(lambda: mortal.gateway.states()["small-1"] == "down")
    reply = mortal.gateway.chat(stream=stream)
    assert reply.headers["x-tierway-attempts"] == "1", "known to be dead: not asked"
    mortal.small.start()
    assert mortal.gateway.all_up()
    assert mortal.gateway.chat(stream=stream).headers["x-tierway-tier"] == "small"


@BOTH
def test_every_server_is_dead(mortal: Stack, stream: bool) -> None:
    for upstream in mortal.upstreams:
        upstream.kill()
    reply = mortal.gateway.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (502, "upstream_unavailable")
    assert reply.headers["x-should-retry"] == "false"
    assert wait_until(lambda: list(mortal.gateway.states().values()).count("down") == 4)
    assert mortal.gateway.chat(stream=stream).status == 502, "believed dead, asked all the same, as a last resort"
    mortal.small.start()
    # A restarted server serves the very next request, before any probe has seen it.
    reply = mortal.gateway.chat(stream=stream)
    assert text_of(reply, stream=stream) == TEXT
    for upstream in (mortal.medium, mortal.large):
        upstream.start()
    assert mortal.gateway.all_up()


def test_a_server_killed_in_mid_stream(mortal: Stack) -> None:
    assert mortal.gateway.all_up()
    mortal.small.script(interval_ms=20, tokens=500)
    with open_stream(mortal.gateway.port) as response:
        event_of(response)
        mortal.small.kill()
        rest = response.read().decode()
    last = rest.rstrip("\n").rpartition("\n\n")[2]
    assert json.loads(last[6:])["error"]["code"] == "stream_broken"
    assert "[DONE]" not in rest
    mortal.small.start()
    assert mortal.gateway.all_up()


# -- the end of the gateway -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["one process", "two workers"])
def test_sigterm_finishes_open_streams(session_stack: Stack, options: tuple[str, ...]) -> None:
    session_stack.reset()
    gateway = session_stack.start_gateway(*options)
    session_stack.small.script(interval_ms=50, tokens=30)
    with open_stream(gateway.port) as response:
        event_of(response)
        gateway.process.signal(signal.SIGTERM)
        rest = response.read().decode()
    assert rest.endswith("data: [DONE]\n\n")
    assert rest.count('"content":') == 30
    assert gateway.process.wait() == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", gateway.port), 1)
    assert "Traceback" not in gateway.process.said()
    session_stack.reset()


def test_a_stream_longer_than_the_grace_is_cut_loudly(session_stack: Stack) -> None:
    session_stack.reset()
    gateway = session_stack.start_gateway(server={"shutdown_grace": "1s"})
    session_stack.small.script(interval_ms=50, tokens=500)
    with open_stream(gateway.port) as response:
        event_of(response)
        gateway.process.signal(signal.SIGTERM)
        try:
            rest = response.read().decode()
        except http.client.IncompleteRead as cut:
            rest = cut.partial.decode()
    assert "[DONE]" not in rest
    assert '"finish_reason":"stop"' not in rest
    assert "shutting_down" in rest
    gateway.process.wait()
    assert session_stack.small.idle(1.0)
    session_stack.reset()


def test_idle_connections_do_not_hold_up_the_end(session_stack: Stack) -> None:
    gateway = session_stack.start_gateway()
    with socket.create_connection(("127.0.0.1", gateway.port), 5), open_idle(gateway.port):
        started_s = time.monotonic()
        gateway.process.signal(signal.SIGTERM)
        gateway.process.wait(8)
        assert time.monotonic() - started_s < 5


@contextmanager
def open_idle(port: int) -> Iterator[None]:
    """Keep a connection that was used once."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    yield
    connection.close()


def test_the_log_has_one_line_an_exchange_and_no_prompt(stack: Stack) -> None:
    reply = stack.gateway.chat(messages=[{"role": "user", "content": "xyzzy-secret"}])
    exchange_id = reply.headers["x-tierway-exchange-id"]

    def lines() -> list[dict[str, Any]]:
        found = [line for line in stack.gateway.process.said().splitlines() if exchange_id in line]
        return [json.loads(line) for line in found]

    assert wait_until(lambda: len(lines()) == 1)
    (line,) = lines()
    assert (line["event"], line["tier"], line["ending"], line["cost_usd"]) == (
        "exchange",
        "small",
        "answered",
        "0.0000011",
    )
    assert "xyzzy" not in stack.gateway.process.said()
    assert ALICE not in stack.gateway.process.said()


def test_nothing_of_a_kind_is_left_open_after_all_this(session_stack: Stack) -> None:
    gateway = session_stack.gateway

    def open_files() -> int:
        return len(list(Path(f"/proc/{gateway.pid}/fd").iterdir()))

    assert wait_until(lambda: "tierway_open_exchanges 0\n" in gateway.get("/metrics").body.decode())
    assert wait_until(lambda: open_files() < 60, 8), f"{open_files()} files open"
