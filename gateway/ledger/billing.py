"""What does the ledger keep of a Decision? The one record in, its rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from gateway.decision import AttemptRecord, Decision
from gateway.ledger.rows import AttemptRow, Bill, DecisionInputRow, ExchangeRow, PriceRow
from policies.cost import Cost

_encode = msgspec.json.Encoder().encode


def bill_of(
    decision: Decision,
    *,
    instance: str,
    now_ms: int,
    price_row: Callable[[str], PriceRow | None],
    inputs: DecisionInputRow | None = None,
) -> Bill:
    """Return the rows of a Decision, made at `now_ms`. `price_row` finds the prices that it was rated by."""
    usage, payer, shown = decision.usage, decision.payer, decision.shown
    attempts = decision.attempts
    cost = _sum([attempt.cost for attempt in attempts])
    estimated = int(decision.ending == "lost")
    exchange = ExchangeRow(
        exchange_id=decision.exchange_id,
        at_ms=int(decision.created_at * 1000),
        settled_ms=now_ms,
        key_name=payer.key,
        team=payer.team,
        user_name=payer.user,
        user_digest=payer.user_digest,
        tags=_encode(payer.tags).decode() if payer.tags else "[]",
        metadata=_encode(dict(payer.metadata)).decode() if payer.metadata else "{}",
        asked=decision.asked,
        route=decision.route,
        endpoint=decision.endpoint,
        streamed=int(decision.streamed),
        tier=None if shown is None else shown.tier,
        backend=None if shown is None else shown.backend,
        model=None if shown is None else shown.model,
        model_version=None if shown is None else shown.model_version,
        outcome=decision.ending,
        error=decision.error,
        degraded=int(decision.degraded),
        calls=decision.calls,
        served=decision.served,
        estimated=estimated,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        counted=int(usage.counted),
        input_nusd=cost.input_nusd,
        cached_input_nusd=cost.cached_input_nusd,
        output_nusd=cost.output_nusd,
        gpu_nusd=cost.gpu_nusd,
        wasted_nusd=cost.total_nusd - (0 if shown is None else shown.cost.total_nusd),
        baseline_nusd=0 if decision.baseline is None else decision.baseline.cost_nusd,
        baseline_tier=None if decision.baseline is None else decision.baseline.tier,
        queued_us=round(decision.queued_s * 1e6),
        first_token_us=None if decision.first_byte_s is None else round(decision.first_byte_s * 1e6),
        decided_us=round(decision.total_s * 1e6),
        confidence=decision.confidence,
        confidence_kind=decision.confidence_kind,
        config=decision.config,
        request_id=decision.request_id,
        instance=instance,
    )
    versions = {attempt.price_version for attempt in attempts}
    return Bill(
        exchange=exchange,
        attempts=tuple([_attempt_row(decision, attempt, estimated) for attempt in attempts]),
        prices=tuple([row for version in versions if (row := price_row(version)) is not None]),
        inputs=inputs,
    )


def _attempt_row(decision: Decision, attempt: AttemptRecord, estimated: int) -> AttemptRow:
    usage, cost = attempt.usage, attempt.cost
    first_token_s = attempt.first_token_s
    return AttemptRow(
        exchange_id=decision.exchange_id,
        number=attempt.number,
        role=attempt.role,
        tier=attempt.tier,
        backend=attempt.backend,
        model=attempt.model,
        model_version=attempt.model_version,
        outcome=attempt.outcome,
        fault=attempt.fault,
        estimated=estimated,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        counted=int(usage.counted),
        price_version=attempt.price_version,
        input_nusd=cost.input_nusd,
        cached_input_nusd=cost.cached_input_nusd,
        output_nusd=cost.output_nusd,
        gpu_nusd=cost.gpu_nusd,
        started_ms=int((decision.created_at + attempt.started_s) * 1000),
        waited_us=round(attempt.waited_s * 1e6),
        first_token_us=None if first_token_s is None else round((first_token_s - attempt.started_s) * 1e6),
        ended_ms=int((decision.created_at + attempt.ended_s) * 1000),
        confidence=attempt.confidence,
        doubt_below=attempt.doubt_below,
    )


def _sum(costs: Sequence[Cost]) -> Cost:
    if len(costs) == 1:
        return costs[0]
    return Cost(
        input_nusd=sum(one.input_nusd for one in costs),
        cached_input_nusd=sum(one.cached_input_nusd for one in costs),
        output_nusd=sum(one.output_nusd for one in costs),
        gpu_nusd=sum(one.gpu_nusd for one in costs),
    )


def inputs_of(
    decision: Decision, *, feature_version: str, features: bytes, facts: object, down: Sequence[str]
) -> DecisionInputRow:
    """Return what a Decision was made from. `facts` is the typed view of the request, without any text."""
    scores: list[Mapping[str, object]] = [
        {"number": one.number, "tier": one.tier, "backend": one.backend, "confidence": one.confidence}
        for one in decision.attempts
    ]
    thresholds = {one.tier: one.doubt_below for one in decision.attempts}
    return DecisionInputRow(
        exchange_id=decision.exchange_id,
        at_ms=int(decision.created_at * 1000),
        feature_version=feature_version,
        features=features,
        facts=_encode(facts).decode(),
        scores=_encode(scores).decode(),
        fleet=_encode({"down": down}).decode(),
        thresholds=_encode(thresholds).decode(),
        propensity=1.0,
        artefacts="[]",
    )
