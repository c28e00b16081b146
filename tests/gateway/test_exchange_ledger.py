"""Is every request billed, once, before its client hears the end? The exchange over a ledger in a list."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from typing import Any

import msgspec
import pytest

from backends.backend import Broken, Unreachable
from backends.scripted import Pause, ScriptedBackend
from gateway.exchange import Gateway, exchange
from gateway.ledger.rows import AttemptRow, Bill, ExchangeRow
from policies.access import Caller
from policies.cost import Price, cost_of
from tests.gateway.plays import (
    HELLO,
    SCOPE,
    UNSURE,
    WORDS,
    Client,
    KeptLedger,
    ask,
    changed,
    fails,
    gateway_over,
    kept,
    says,
)

both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PRICE = Price(input_nusd=10**9, cached_input_nusd=10**9, output_nusd=2 * 10**9)
SUMS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
MONEY = ("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd")


def the_bill(gateway: Gateway) -> Bill:
    (bill,) = kept(gateway).bills.values()
    return bill


def until(there: Callable[[], object]) -> Any:
    async def wait() -> None:
        while not there():
            await asyncio.sleep(0)

    return asyncio.wait_for(wait(), 5)


@both
def test_a_request_has_one_row_and_one_for_each_attempt(stream: bool) -> None:
    gateway = gateway_over(
        small=fails(Unreachable("gone")), medium=says("No", " idea", " at", " all", sure=UNSURE), large=says("Right")
    )
    client = asyncio.run(ask(gateway, stream=stream, user="eve"))
    bill = the_bill(gateway)
    row = bill.exchange
    assert row.exchange_id == client.headers["x-tierway-exchange-id"]
    assert (row.key_name, row.user_name, row.asked, row.route, row.outcome) == (
        "tester",
        "eve",
        "auto",
        "auto",
        "answered",
    )
    assert (row.tier, row.model, row.streamed, row.estimated) == ("large", "model-large", int(stream), 0)
    assert [(one.number, one.tier, one.outcome, one.fault) for one in bill.attempts] == [
        (1, "small", "failed", "Unreachable"),
        (2, "medium", "doubted", None),
        (3, "large", "accepted", None),
    ]
    for name in (*SUMS, *MONEY):
        assert getattr(row, name) == sum(getattr(one, name) for one in bill.attempts), name
    doubted, shown = bill.attempts[1:]
    assert row.wasted_nusd == doubted.input_nusd + doubted.output_nusd > 0
    assert bill.cost_nusd == row.wasted_nusd + shown.input_nusd + shown.output_nusd
    assert (row.baseline_tier, row.baseline_nusd) == ("large", shown.input_nusd + shown.output_nusd)
    for one in bill.attempts:
        assert cost_of(PRICE, one).total_nusd == sum(getattr(one, name) for name in MONEY)


def test_what_the_dearest_tier_alone_would_have_cost_is_the_same_tokens_at_its_price() -> None:
    gateway = gateway_over(small=says(), large=says())
    prices = gateway.pricing.at(0)
    large = Price(input_nusd=7 * 10**9, cached_input_nusd=0, output_nusd=3 * 10**9)
    prices.tiers["large"] = prices.backends["large"] = large  # type: ignore[index]
    asyncio.run(ask(gateway, stream=False))
    row = the_bill(gateway).exchange
    assert (row.baseline_tier, row.tier) == ("large", "small")
    assert row.baseline_nusd == cost_of(large, row).total_nusd > the_bill(gateway).cost_nusd


def test_no_word_of_prompt_or_answer_is_kept() -> None:
    gateway = gateway_over(small=says("Zanzibar", " is", " an", " island"))
    asyncio.run(ask(gateway, stream=True, messages=[{"role": "user", "content": "Where is Xanadu?"}]))
    written = msgspec.json.encode(the_bill(gateway)).lower()
    assert b"zanzibar" not in written
    assert b"xanadu" not in written
    assert the_bill(gateway).inputs is not None


def test_inputs_are_kept_only_where_the_operator_wants_them() -> None:
    gateway = msgspec.structs.replace(gateway_over(small=says()), keep_inputs=False)
    asyncio.run(ask(gateway, stream=False))
    assert the_bill(gateway).inputs is None


@both
def test_the_last_part_waits_for_the_row_and_nothing_else_does(stream: bool) -> None:
    async def play() -> None:
        small = says()
        gateway = gateway_over(small=small)
        ledger = kept(gateway)
        ledger.written.clear()
        client = Client(gateway, {**HELLO, "stream": stream})
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        await until(lambda: small.calls and not small.open_calls)
        for _ in range(50):
            await asyncio.sleep(0)
        if stream:
            assert client.text == "".join(WORDS)
            assert b'finish_reason":"stop' not in client.body
        else:
            assert client.messages == []
        ledger.written.set()
        await asking
        assert client.recorded_before_end
        assert b'"finish_reason":"stop"' in client.body
        assert [(one.delivered, one.exchange_id) for one in ledger.deliveries] == [
            (1, the_bill(gateway).exchange.exchange_id)
        ]

    asyncio.run(play())


def test_a_stream_whose_row_cannot_be_written_ends_with_an_error() -> None:
    gateway = gateway_over(small=says())
    kept(gateway).down = True
    client = asyncio.run(ask(gateway, stream=True))
    assert client.status == 200
    assert b"[DONE]" not in client.body
    assert b'"finish_reason":"stop"' not in client.body
    assert json.loads(client.body.split(b"\n\n")[-2][6:])["error"]["code"] == "ledger_unavailable"
    (bill,) = kept(gateway).later
    assert (bill.exchange.outcome, bill.exchange.error) == ("broken", "ledger_unavailable")
    assert bill.cost_nusd > 0
    assert [one.delivered for one in kept(gateway).deliveries] == [0]


def test_a_whole_answer_whose_row_cannot_be_written_is_503() -> None:
    gateway = gateway_over(small=says())
    kept(gateway).down = True
    client = asyncio.run(ask(gateway, stream=False))
    assert (client.status, json.loads(client.body)["error"]["code"]) == (503, "ledger_unavailable")
    assert client.headers["retry-after"] == "1"


def test_new_work_is_refused_while_no_row_can_be_written() -> None:
    small = says()
    gateway = gateway_over(small=small)
    kept(gateway).accepting = False
    client = asyncio.run(ask(gateway, stream=True))
    assert (client.status, json.loads(client.body)["error"]["code"]) == (503, "ledger_unavailable")
    assert small.calls == []
    assert kept(gateway).refusals == [("tester", "ledger_unavailable")]
    assert kept(gateway).bills == {}


def test_refused_requests_are_counted_and_have_no_row() -> None:
    gateway = gateway_over(small=says())
    asyncio.run(ask(gateway, stream=False, model="none"))
    nobody = Client(gateway, HELLO)
    asyncio.run(exchange(gateway, "chat/completions", {**SCOPE, "headers": []}, nobody.receive, nobody.send))
    assert kept(gateway).refusals == [("tester", "model_not_found"), ("", "invalid_api_key")]
    assert not kept(gateway).bills
    assert not kept(gateway).open


@both
def test_what_failed_altogether_is_billed_as_well(stream: bool) -> None:
    gateway = gateway_over(small=fails(Broken("502")), large=fails(Unreachable("gone")))
    client = asyncio.run(ask(gateway, stream=stream))
    row = the_bill(gateway).exchange
    assert (client.status, row.outcome, row.error, row.tier) == (502, "exhausted", "upstream_error", None)
    assert len(the_bill(gateway).attempts) == 2
    assert [one.delivered for one in kept(gateway).deliveries] == [0]


def test_who_leaves_is_billed_for_what_was_said_until_then() -> None:
    async def play() -> None:
        gateway = gateway_over(small=changed(says(), lambda script: [*script[:-4], Pause(None)]))
        leaves = asyncio.Event()
        client = Client(gateway, HELLO, leaves=leaves)
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        await until(lambda: client.messages and client.text == "The sea is wide")
        leaves.set()
        await asking
        row = the_bill(gateway).exchange
        assert (row.outcome, row.counted) == ("abandoned", 1)
        assert row.completion_tokens >= 4
        assert [one.delivered for one in kept(gateway).deliveries] == [0]
        assert kept(gateway).open == {}

    asyncio.run(play())


def test_the_bill_as_it_stands_is_that_of_a_lost_exchange() -> None:
    async def play() -> None:
        doubted = says("No", " idea", " at", " all", sure=UNSURE)
        gateway = gateway_over(small=doubted, large=changed(says(), lambda script: [*script[:-4], Pause(None)]))
        client = Client(gateway, HELLO)
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        await until(lambda: client.messages and client.text == "The sea is wide")
        (so_far,) = kept(gateway).open.values()
        bill = so_far()
        assert (bill.exchange.outcome, bill.exchange.estimated, bill.exchange.tier) == ("lost", 1, "large")
        assert [(one.outcome, one.estimated) for one in bill.attempts] == [("cancelled", 1), ("lost", 1)]
        assert bill.attempts[1].completion_tokens >= 4
        assert bill.cost_nusd > bill.exchange.wasted_nusd > 0
        assert bill.inputs is None
        asking.cancel()
        await asyncio.wait([asking])

    asyncio.run(play())


def test_a_stream_cut_when_the_server_stops_is_billed_and_told() -> None:
    async def play() -> None:
        gateway = gateway_over(small=changed(says(), lambda script: [*script[:-4], Pause(None)]))
        client = Client(gateway, HELLO)
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        await until(lambda: client.messages and client.text == "The sea is wide")
        asking.cancel()
        await asyncio.wait([asking])
        (bill,) = kept(gateway).later
        assert (bill.exchange.outcome, bill.exchange.error, bill.exchange.estimated) == ("broken", "shutting_down", 0)
        assert bill.exchange.completion_tokens >= 4
        assert kept(gateway).open == {}
        decision = gateway.store.get(bill.exchange.exchange_id)
        assert decision is not None
        assert decision.error == "shutting_down"

    asyncio.run(play())


def test_a_request_that_is_cancelled_before_anybody_was_asked_owes_nothing() -> None:
    async def play() -> None:
        gateway = gateway_over(small=ScriptedBackend(lambda _call: [Pause(None)]))
        client = Client(gateway, HELLO)
        asking = asyncio.create_task(exchange(gateway, "chat/completions", SCOPE, client.receive, client.send))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert not kept(gateway).bills
        assert not kept(gateway).open

    asyncio.run(play())


def test_the_row_carries_whom_to_charge() -> None:
    gateway = gateway_over(small=says())
    caller = Caller(key="red-1", team="red", user="ann", tags=("batch",), metadata=(("cost_centre", "42"),))
    entry = next(iter(gateway.keys._configured.callers.items()))
    gateway.keys._configured = type(gateway.keys._configured)({entry[0]: (entry[1][0], caller)})
    asyncio.run(ask(gateway, stream=False, user="somebody else"))
    row = the_bill(gateway).exchange
    assert (row.key_name, row.team, row.user_name) == ("red-1", "red", "ann")
    assert (json.loads(row.tags), json.loads(row.metadata)) == (["batch"], {"cost_centre": "42"})
    assert row.user_digest is not None


def test_a_bill_can_be_kept_and_read_again() -> None:
    gateway = gateway_over(small=says())
    asyncio.run(ask(gateway, stream=True))
    bill = the_bill(gateway)
    again = msgspec.json.decode(msgspec.json.encode(bill), type=Bill)
    assert again == bill
    assert isinstance(again.exchange, ExchangeRow)
    assert isinstance(again.attempts[0], AttemptRow)


def test_a_ledger_is_told_of_each_request_once() -> None:
    gateway = gateway_over(small=says())

    async def play() -> None:
        await asyncio.gather(*(ask(gateway, stream=number % 2 == 0) for number in range(20)))

    asyncio.run(play())
    ledger = kept(gateway)
    assert isinstance(ledger, KeptLedger)
    assert len(ledger.bills) == len(ledger.deliveries) == 20
    assert ledger.open == {}
    assert ledger.later == []


def test_what_a_fault_of_the_gateway_cuts_is_billed_as_such() -> None:
    async def play() -> None:
        gateway = gateway_over(small=says())
        client = Client(gateway, HELLO)

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body":
                raise RuntimeError("a mistake of ours")

        with pytest.raises(RuntimeError, match="a mistake"):
            await exchange(gateway, "chat/completions", SCOPE, client.receive, send)
        (bill,) = kept(gateway).later
        assert (bill.exchange.outcome, bill.exchange.error) == ("broken", "internal_error")
        assert bill.cost_nusd > 0
        assert kept(gateway).open == {}

    asyncio.run(play())
