"""Does one request go its way, in the right order? The exchange over scripted backends and both sinks, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, MutableMapping
from hashlib import sha256
from typing import Any

import msgspec
import pytest

from backends.backend import BackendFault, Broken, Overloaded, Rejected, Unreachable
from backends.scripted import Pause, Script, ScriptedBackend, recite
from gateway.bodies import BodyReader
from gateway.decision import Decision, DecisionStore, as_json
from gateway.exchange import Gateway, exchange
from gateway.fleet import Fleet, Member
from gateway.log import ExchangeLog
from gateway.metrics import Metrics
from policies.access import Caller, Keyring
from policies.cost import Price
from routing.ladder import Hold, Ladder, Route, Rung, Seat

KEY = b"tw-test"
SURE, UNSURE = -0.01, -2.0
HELLO = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "headers": [(b"authorization", b"Bearer " + KEY)],
}
WORDS = ("The", " sea", " is", " wide", ".")


class Lines:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, line: bytes, /) -> None:
        self.written.append(line)


class Client:
    """The other end of one request: what was sent to it, in order, and what was known when the last byte came."""

    def __init__(self, gateway: Gateway, body: Mapping[str, Any], *, leaves: asyncio.Event | None = None) -> None:
        self.messages: list[MutableMapping[str, Any]] = []
        self.recorded_before_end = False
        self._gateway = gateway
        self._leaves = leaves or asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.recorded_before_end = self._gateway.store.get(self.headers["x-tierway-exchange-id"]) is not None
        self.messages.append(message)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def text(self) -> str:
        """What the answer says, streamed or whole."""
        if self.headers["content-type"] == "application/json":
            text: str = json.loads(self.body)["choices"][0]["message"]["content"]
            return text
        chunks = [json.loads(event[6:]) for event in self.body.split(b"\n\n") if event.startswith(b"data: {")]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ()))


def gateway_over(**tiers: ScriptedBackend) -> Gateway:
    """A gateway whose route `auto` climbs the tiers in the order given, each but the last doubted below 0.8."""
    rungs = tuple(
        Rung(name, (Seat(name, f"model-{name}"),), None if name == list(tiers)[-1] else 0.8) for name in tiers
    )
    route = Route(name="auto", rungs=rungs, hold=Hold(tokens=3))
    return Gateway(
        config="c0ffee",
        id_prefix="tw00-",
        max_body_bytes=1_000_000,
        keyring=Keyring.of([(sha256(KEY).hexdigest(), Caller(key="tester"))]),
        ladder=Ladder({"auto": route}),
        prices={name: Price(input_nusd=10**9, cached_input_nusd=10**9, output_nusd=2 * 10**9) for name in tiers},
        fleet=Fleet(
            {
                name: Member(name=name, kind="scripted", model=f"model-{name}", tier=name, backend=backend)
                for name, backend in tiers.items()
            }
        ),
        bodies=BodyReader(),
        store=DecisionStore(100),
        metrics=Metrics(),
        log=ExchangeLog(Lines(), format="json", level="info"),
    )


async def ask(gateway: Gateway, *, stream: bool, leaves: asyncio.Event | None = None, **fields: Any) -> Client:
    client = Client(gateway, {**HELLO, "stream": stream, **fields}, leaves=leaves)
    await exchange(gateway, "chat/completions", SCOPE, client.receive, client.send)
    return client


def decided(gateway: Gateway, client: Client) -> Decision:
    decision = gateway.store.get(client.headers["x-tierway-exchange-id"])
    assert decision is not None
    return decision


def says(*words: str, sure: float = SURE) -> ScriptedBackend:
    return recite("model", words or WORDS, logprob=sure)


def fails(fault: BackendFault) -> ScriptedBackend:
    return ScriptedBackend(lambda _call: [fault])


def changed(backend: ScriptedBackend, change: Callable[[list[Any]], Script]) -> ScriptedBackend:
    """The same words, with the script changed."""
    return ScriptedBackend(lambda call: change(list(backend._play(call))))


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
