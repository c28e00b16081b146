"""What does a bill look like in a test? Made up, but whole."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from gateway.ledger.contract import Store
from gateway.ledger.rows import AnyRow, AttemptRow, Bill, DecisionInputRow, ExchangeRow, OpenRow, PriceRow

AT_MS = 1_760_000_000_000
PRICE = PriceRow(
    version="small@1",
    at_ms=AT_MS,
    tier="small",
    backend="small-0",
    kind="tokens",
    input_nusd=50_000_000,
    cached_input_nusd=25_000_000,
    output_nusd=150_000_000,
    hour_nusd=None,
)


def id_of(number: int) -> str:
    return f"tw00-{AT_MS + number:012x}{number:020x}"


def bill_of(number: int, *, lost: bool = False, attempts: int = 1, output: int = 90, inputs: bool = False) -> Bill:
    """A bill whose exchange costs what its attempts cost; `output` is what each costs."""
    exchange_id = id_of(number)
    exchange = ExchangeRow(
        exchange_id=exchange_id,
        at_ms=AT_MS + number,
        settled_ms=AT_MS + number + 800,
        key_name="key-1",
        team="red",
        user_name=None,
        user_digest="00ff",
        tags='["chat"]',
        metadata="{}",
        asked="auto",
        route="auto",
        endpoint="chat/completions",
        streamed=1,
        tier="small",
        backend="small-0",
        model="a/model",
        model_version=None,
        outcome="lost" if lost else "answered",
        error=None,
        degraded=0,
        calls=attempts,
        served=attempts,
        estimated=int(lost),
        prompt_tokens=12 * attempts,
        cached_prompt_tokens=0,
        completion_tokens=7 * attempts,
        reasoning_tokens=0,
        counted=0,
        input_nusd=0,
        cached_input_nusd=0,
        output_nusd=output * attempts,
        gpu_nusd=0,
        wasted_nusd=0,
        baseline_nusd=1000,
        baseline_tier="large",
        queued_us=0,
        first_token_us=90_000,
        decided_us=700_000,
        confidence=0.875,
        confidence_kind="confidence",
        config="9f8e7d6c",
        request_id=exchange_id,
        instance="here",
    )
    return Bill(
        exchange=exchange,
        attempts=tuple(_attempt(exchange, one + 1, output) for one in range(attempts)),
        prices=(PRICE,),
        inputs=_inputs(exchange) if inputs else None,
    )


def _attempt(exchange: ExchangeRow, number: int, output: int) -> AttemptRow:
    return AttemptRow(
        exchange_id=exchange.exchange_id,
        number=number,
        role="answer",
        tier="small",
        backend="small-0",
        model="a/model",
        model_version=None,
        outcome="lost" if exchange.estimated else "accepted",
        fault=None,
        estimated=exchange.estimated,
        prompt_tokens=12,
        cached_prompt_tokens=0,
        completion_tokens=7,
        reasoning_tokens=0,
        counted=0,
        price_version=PRICE.version,
        input_nusd=0,
        cached_input_nusd=0,
        output_nusd=output,
        gpu_nusd=0,
        started_ms=exchange.at_ms,
        waited_us=0,
        first_token_us=90_000,
        ended_ms=exchange.at_ms + 700,
        confidence=0.875,
        doubt_below=0.7,
    )


def _inputs(exchange: ExchangeRow) -> DecisionInputRow:
    return DecisionInputRow(
        exchange_id=exchange.exchange_id,
        at_ms=exchange.at_ms,
        feature_version="1",
        features=b"\x01\xff\x00",
        facts="{}",
        scores="[]",
        fleet="{}",
        thresholds="{}",
        propensity=1.0,
        artefacts="[]",
    )


def rows_of(bill: Bill) -> list[AnyRow]:
    inputs = () if bill.inputs is None else (bill.inputs,)
    return [*bill.prices, bill.exchange, *bill.attempts, *inputs]


def open_row(number: int, *, instance: str = "dead", seen_ms: int = AT_MS, output: int = 40) -> OpenRow:
    bill = bill_of(number, lost=True, output=output)
    return OpenRow(
        exchange_id=id_of(number), instance=instance, seen_ms=seen_ms, bill=msgspec.json.encode(bill).decode()
    )


def billed(store: Store) -> dict[str, tuple[str, int]]:
    """Outcome and cost of every exchange in the ledger."""
    sql = "SELECT exchange_id, outcome, input_nusd + cached_input_nusd + output_nusd + gpu_nusd FROM exchanges"
    with store.reading() as reading:
        return {str(one): (str(outcome), int(cost or 0)) for one, outcome, cost in reading.rows(sql)}


def contents(store: Store, tables: Iterable[str]) -> dict[str, list[tuple[object, ...]]]:
    """All that stands in these tables."""
    with store.reading() as reading:
        return {name: sorted(reading.rows(f"SELECT * FROM {name}"), key=repr) for name in tables}


def left_open(store: Store) -> set[str]:
    with store.reading() as reading:
        return {str(one) for (one,) in reading.rows("SELECT exchange_id FROM open_exchanges")}
