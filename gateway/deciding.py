"""What was done for a request? What an exchange knows in, its Decision out: at its end, or as it stands."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.backend import Endpoint
from gateway.decision import AttemptOutcome, AttemptRecord, Baseline, Decision, Payer
from gateway.driver import Run
from gateway.pricing import PriceList
from policies.cost import cost_of
from routing.cascade import Ending, Judged
from routing.ladder import Route


class Matter(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an exchange before anybody is asked. `started_s` is monotonic, `created_at` since the epoch."""

    exchange_id: str
    request_id: str
    payer: Payer
    endpoint: Endpoint
    asked: str
    streamed: bool
    route: Route
    prices: PriceList
    config: str
    created_at: float
    started_s: float


def decision_of(
    matter: Matter, runs: Sequence[Run], ending: Ending | None, *, error: str | None, queued_s: float, now_s: float
) -> Decision:
    """Build the record. Without an `ending` it is what there would be to say if the process died now."""
    judged = {} if ending is None else {one.id: one for one in ending.judged}
    served = next((run.id for run in runs if run.committed_s is not None), None) if ending is None else ending.committed
    attempts = tuple([_record(matter, run, judged.get(run.id), now_s, served=run.id == served) for run in runs])
    shown = None if served is None else runs[served - 1]
    return Decision(
        exchange_id=matter.exchange_id,
        request_id=matter.request_id,
        payer=matter.payer,
        endpoint=matter.endpoint,
        asked=matter.asked,
        route=matter.route.name,
        streamed=matter.streamed,
        ending="lost" if ending is None else ending.kind,
        error=error,
        degraded=ending is not None and ending.degraded,
        served=served,
        confidence=None if served is None else attempts[served - 1].confidence,
        confidence_kind="raw",
        attempts=attempts,
        created_at=matter.created_at,
        queued_s=queued_s,
        first_byte_s=None if shown is None or shown.committed_s is None else shown.committed_s - matter.started_s,
        total_s=now_s - matter.started_s,
        config=matter.config,
        baseline=None if shown is None else _baseline(matter, attempts[shown.id - 1]),
    )


def _record(matter: Matter, run: Run, judged: Judged | None, now_s: float, *, served: bool) -> AttemptRecord:
    route, attempt, usage = matter.route, run.attempt, run.usage
    confidence = None if judged is None else judged.confidence
    if confidence is None and route.judged:
        confidence = route.estimator.score(run.tap.signals)
    price = matter.prices.backends[attempt.backend]
    return AttemptRecord(
        number=run.id,
        role="answer",
        tier=attempt.tier,
        backend=attempt.backend,
        model=attempt.model,
        outcome=_as_it_stands(run) if judged is None else _outcome(judged, accepted=served),
        fault=None if run.fault is None else type(run.fault).__name__,
        fault_detail=None if run.fault is None else str(run.fault),
        confidence=confidence,
        doubt_below=attempt.doubt_below,
        usage=usage,
        cost=cost_of(price, usage),
        started_s=run.started_s - matter.started_s,
        first_token_s=None if run.first_token_s is None else run.first_token_s - matter.started_s,
        ended_s=(run.ended_s or now_s) - matter.started_s,
        waited_s=run.waited_s,
        model_version=run.tap.model_version,
        price_version=price.version,
    )


def _outcome(judged: Judged, *, accepted: bool) -> AttemptOutcome:
    if judged.outcome in ("failed", "rejected", "full"):
        return judged.outcome
    if accepted:
        return "accepted" if judged.outcome == "completed" else "cancelled"
    return "doubted" if judged.doubted else "cancelled"


def _as_it_stands(run: Run) -> AttemptOutcome:
    if run.full is not None:
        return "full"
    if run.ended_s is None:
        return "lost"
    return "failed" if run.fault is not None else "accepted" if run.committed_s is not None else "cancelled"


def _baseline(matter: Matter, shown: AttemptRecord) -> Baseline:
    # Of the tier that answered its own price: a server's is not always the dearest of its tier.
    costs = {
        rung.tier: cost_of(matter.prices.tiers[rung.tier], shown.usage).total_nusd
        for rung in matter.route.rungs
        if rung.tier != shown.tier
    }
    costs[shown.tier] = shown.cost.total_nusd
    tier = max(costs, key=lambda one: (costs[one], one == shown.tier))
    return Baseline(tier=tier, cost_nusd=costs[tier])
