"""Exchanges played in process: scripted backends behind, a client in front, no socket between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, MutableMapping
from hashlib import sha256
from typing import Any

from backends.backend import BackendFault
from backends.scripted import Script, ScriptedBackend, recite
from gateway.admission import Admission
from gateway.bodies import BodyReader
from gateway.counting import TokenCounter
from gateway.decision import Decision, DecisionStore
from gateway.exchange import Gateway, exchange
from gateway.fleet import Fleet, Member
from gateway.keys import LiveKeys
from gateway.ledger.contract import LedgerDown
from gateway.ledger.rows import Bill, DeliveryRow
from gateway.limiter import MemoryLimiter
from gateway.log import ExchangeLog
from gateway.metrics import Metrics
from gateway.pricing import Pricing
from gateway.sizing import Sizes, TierSize
from policies.access import Caller, Keyring
from policies.cost import Price
from policies.limits import Limit
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


class KeptLedger:
    """A ledger in a list, and what was said to it, in order. `down` refuses what is to be written."""

    def __init__(self) -> None:
        self.accepting = True
        self.down = False
        self.bills: dict[str, Bill] = {}
        self.later: list[Bill] = []
        self.open: dict[str, Callable[[], Bill]] = {}
        self.deliveries: list[DeliveryRow] = []
        self.refusals: list[tuple[str, str]] = []
        self.written = asyncio.Event()
        self.written.set()

    def begin(self, exchange_id: str, so_far: Callable[[], Bill]) -> None:
        self.open[exchange_id] = so_far

    async def write(self, bill: Bill) -> None:
        await self.written.wait()
        if self.down:
            raise LedgerDown("no room")
        self.bills[bill.exchange.exchange_id] = bill
        del self.open[bill.exchange.exchange_id]

    def write_later(self, bill: Bill) -> None:
        self.later.append(bill)
        self.open.pop(bill.exchange.exchange_id, None)

    def forget(self, exchange_id: str) -> None:
        self.open.pop(exchange_id, None)

    def deliver(self, delivery: DeliveryRow) -> None:
        self.deliveries.append(delivery)

    def refuse(self, key: str, code: str) -> None:
        self.refusals.append((key, code))


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
            self.recorded_before_end = self.headers["x-tierway-exchange-id"] in kept(self._gateway).bills
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


def gateway_over(*limits: Limit, **tiers: ScriptedBackend) -> Gateway:
    """A gateway whose route `auto` climbs the tiers in the order given, each but the last doubted below 0.8."""
    metrics = Metrics()
    prices = {name: Price(input_nusd=10**9, cached_input_nusd=10**9, output_nusd=2 * 10**9) for name in tiers}
    rungs = tuple(
        Rung(name, (Seat(name, f"model-{name}"),), None if name == list(tiers)[-1] else 0.8) for name in tiers
    )
    route = Route(name="auto", rungs=rungs, hold=Hold(tokens=3))
    return Gateway(
        config="c0ffee",
        id_prefix="tw00-",
        max_body_bytes=1_000_000,
        keys=LiveKeys(Keyring.of([(sha256(KEY).hexdigest(), Caller(key="tester"))])),
        ladder=Ladder({"auto": route}),
        pricing=Pricing({name: {name: price} for name, price in prices.items()}),
        sizes=Sizes(
            {name: TierSize(context_tokens=4000) for name in prices},
            TokenCounter(tiers),
            context_tokens=lambda _: None,
        ),
        admission=Admission(MemoryLimiter(), limits, metrics=metrics),
        fleet=Fleet(
            {
                name: Member(name=name, kind="scripted", model=f"model-{name}", tier=name, backend=backend)
                for name, backend in tiers.items()
            }
        ),
        bodies=BodyReader(),
        ledger=KeptLedger(),
        store=DecisionStore(100),
        metrics=metrics,
        log=ExchangeLog(Lines(), format="json", level="info"),
    )


async def ask(gateway: Gateway, *, stream: bool, leaves: asyncio.Event | None = None, **fields: Any) -> Client:
    client = Client(gateway, {**HELLO, "stream": stream, **fields}, leaves=leaves)
    await exchange(gateway, "chat/completions", SCOPE, client.receive, client.send)
    return client


def kept(gateway: Gateway) -> KeptLedger:
    ledger = gateway.ledger
    assert isinstance(ledger, KeptLedger)
    return ledger


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
