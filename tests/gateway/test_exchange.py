"""Does one request go its way, in the right order? The exchange over scripted backends and both sinks, without a socket."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from backends.backend import BackendFault, Broken, Overloaded, Rejected, Unreachable
from backends.scripted import Pause, ScriptedBackend
from gateway.decision import as_json
from gateway.exchange import Gateway, exchange
from tests.gateway.plays import HELLO, SCOPE, UNSURE, Client, Lines, ask, changed, decided, fails, gateway_over, says

both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@both
def test_a_sure_answer_of_the_smallest_is_served(stream: bool) -> None:
    large = says("never")
    gateway = gateway_over(small=says(), large=large)
    client = asyncio.run(ask(gateway, stream=stream))
    assert (client.status, client.text, large.calls) == (200, "The sea is wide.", [])
    assert (client.headers["x-tierway-tier"], client.headers["x-tierway-model"]) == ("small", "model-small")
    assert client.headers["x-tierway-confidence"] == "0.9900"
    assert b"logprob" not in client.body.replace(b'"logprobs":null', b"")


@both
def test_a_doubted_answer_is_replaced_before_anybody_sees_it(stream: bool) -> None:
    gateway = gateway_over(small=says("Wrong", " wrong", " wrong", sure=UNSURE), large=says("Right"))
    client = asyncio.run(ask(gateway, stream=stream))
    assert (client.text, client.headers["x-tierway-attempts"]) == ("Right", "2")
    decision = decided(gateway, client)
    assert [one.outcome for one in decision.attempts] == ["doubted", "accepted"]
    assert decision.cost_nusd == sum(one.cost.total_nusd for one in decision.attempts) > 0
    assert "x-tierway-degraded" not in client.headers


@both
@pytest.mark.parametrize("fault", [Unreachable("gone"), Broken("502"), Overloaded("full")], ids=repr)
def test_a_tier_that_fails_is_passed_over(stream: bool, fault: BackendFault) -> None:
    client = asyncio.run(ask(gateway_over(small=fails(fault), large=says("Here")), stream=stream))
    assert (client.text, client.headers["x-tierway-tier"]) == ("Here", "large")


def test_where_a_server_stands_is_told_to_the_operator_alone() -> None:
    async def play() -> None:
        gateway = gateway_over(small=fails(Unreachable("no way to 10.0.0.7:8000")), large=says())
        client = await ask(gateway, stream=False)
        shown = as_json(decided(gateway, client))
        assert json.loads(shown)["attempts"][0]["fault"] == "Unreachable"
        assert b"10.0.0.7" not in shown + client.body + repr(client.headers).encode()
        gateway.log.flush()
        assert isinstance(gateway.log._stream, Lines)
        assert b"10.0.0.7" in b"".join(gateway.log._stream.written)

    asyncio.run(play())


@both
def test_a_doubted_answer_is_better_than_none(stream: bool) -> None:
    small = says(sure=UNSURE)
    gateway = gateway_over(small=small, large=fails(Broken("500")))
    client = asyncio.run(ask(gateway, stream=stream))
    assert (client.text, client.headers["x-tierway-degraded"]) == ("The sea is wide.", "true")
    assert (len(small.calls), small.open_calls) == (1, 0)


@both
@pytest.mark.parametrize(
    ("faults", "status", "code"),
    [
        ((Unreachable("a"), Unreachable("b")), 502, "upstream_unavailable"),
        ((Broken("a"), Unreachable("b")), 502, "upstream_error"),
        ((Overloaded("a", 7.0), Broken("b")), 503, "upstream_overloaded"),
        ((Rejected(422, "No.", code="odd", param="x"), Broken("b")), 422, "odd"),
        ((Rejected(400, "Too long.", too_long=True), Unreachable("b")), 502, "upstream_error"),
        (
            (Rejected(400, "Long.", too_long=True), Rejected(400, "Longer.", too_long=True)),
            400,
            "context_length_exceeded",
        ),
    ],
    ids=str,
)
def test_there_is_an_error_only_when_no_tier_can_answer(
    stream: bool, faults: tuple[BackendFault, BackendFault], status: int, code: str
) -> None:
    gateway = gateway_over(small=fails(faults[0]), large=fails(faults[1]))
    client = asyncio.run(ask(gateway, stream=stream))
    assert (client.status, json.loads(client.body)["error"]["code"]) == (status, code)
    assert client.headers["content-type"] == "application/json"
    assert decided(gateway, client).ending == "exhausted"
    assert status < 500 or "retry-after" in client.headers or client.headers["x-should-retry"] == "false"


@both
def test_the_record_is_kept_before_the_last_byte_leaves(stream: bool) -> None:
    client = asyncio.run(ask(gateway_over(small=says()), stream=stream))
    assert client.recorded_before_end


def test_nothing_of_a_stream_waits_but_its_end() -> None:
    async def play() -> None:
        words = says("One", " two", " three", " four")
        gateway = gateway_over(small=changed(words, lambda script: [*script[:-3], Pause(None), *script[-3:]]))
        client = Client(gateway, HELLO)
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        while b" four" not in client.body:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])

    asyncio.run(asyncio.wait_for(play(), 5))


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    small = changed(says(), lambda script: [*script[:-3], Broken("the engine died")])
    gateway = gateway_over(small=small)
    client = asyncio.run(ask(gateway, stream=True))
    *_, last = [event for event in client.body.split(b"\n\n") if event]
    assert json.loads(last[6:])["error"]["code"] == "stream_broken"
    assert b"[DONE]" not in client.body
    assert b"engine" not in client.body
    assert b'"finish_reason":"stop"' not in client.body
    assert decided(gateway, client).ending == "broken"


def test_a_server_that_sends_everything_but_an_answer_is_passed_over() -> None:
    junk = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    endless = ScriptedBackend(lambda _call: [junk] * 20_000)
    gateway = gateway_over(small=endless, large=says("Here"))
    client = asyncio.run(ask(gateway, stream=True))
    assert (client.text, client.headers["x-tierway-tier"]) == ("Here", "large")


@both
def test_a_client_that_leaves_frees_every_backend(stream: bool) -> None:
    async def play() -> tuple[Gateway, ScriptedBackend]:
        small = ScriptedBackend(lambda _call: [Pause(None)])
        gateway = gateway_over(small=small, large=says())
        leaves = asyncio.Event()
        asking = asyncio.create_task(ask(gateway, stream=stream, leaves=leaves))
        while not small.open_calls:
            await asyncio.sleep(0)
        leaves.set()
        client = await asking
        assert client.messages == []
        return gateway, small

    gateway, small = asyncio.run(asyncio.wait_for(play(), 5))
    assert (small.open_calls, gateway.metrics.open_exchanges) == (0, 0)
    (decision,) = gateway.store._kept.values()
    assert (decision.ending, decision.attempts[0].outcome) == ("abandoned", "cancelled")


def test_a_gateway_that_stops_says_so_in_an_open_stream() -> None:
    async def play() -> None:
        words = says()
        small = changed(words, lambda script: [*script[:-3], Pause(None)])
        gateway = gateway_over(small=small)
        client = Client(gateway, HELLO)
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        while b" wide" not in client.body:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert json.loads(client.body.split(b"\n\n")[-2][6:])["error"]["code"] == "shutting_down"
        assert b"[DONE]" not in client.body
        assert small.open_calls == 0

    asyncio.run(asyncio.wait_for(play(), 5))


def test_what_is_asked_of_a_backend_is_the_clients_request_and_our_two_wishes() -> None:
    small = says()
    asyncio.run(ask(gateway_over(small=small, large=says()), stream=True, temperature=0, vendor={"a": None}))
    (call,) = small.calls
    assert msgspec.json.decode(b"".join(call.body)) == {
        "model": "model-small",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 1,
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "vendor": {"a": None},
    }
    assert call.headers == ()


def test_a_route_that_doubts_nothing_asks_for_no_scores() -> None:
    small = says()
    asyncio.run(ask(gateway_over(small=small), stream=False))
    assert b"logprobs" not in b"".join(small.calls[0].body)
