"""What do the limits of a configuration mean to the rules? Nouns in, `policies.limits` out."""

from __future__ import annotations

from collections.abc import Iterator
from zoneinfo import ZoneInfo

from gateway.allowance import user_digest
from gateway.config import model as noun
from policies.accounts import Budget, Concurrency, Rate, Rolling
from policies.limits import EACH, Calendar, Dimension, Limit, Measure, Meter

_SECOND_MS = 1000
_PERIODS_MS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "month": 30 * 86_400}
_DIMENSIONS: tuple[Dimension, ...] = ("key", "team", "user", "route", "model", "tier")
_RATES: tuple[Measure, ...] = ("requests", "tokens", "input_tokens", "output_tokens")


def limits_of(config: noun.Config) -> tuple[Limit, ...]:
    """Return the limits of a configuration, with one for the queue of each tier that has one."""
    return (*map(_limit, config.limits), *_queues(config))


def _limit(limit: noun.Limit) -> Limit:
    scope = ((dimension, getattr(limit.scope, dimension)) for dimension in _DIMENSIONS)
    return Limit(
        name=limit.name,
        scope=tuple((dimension, _named(dimension, value)) for dimension, value in scope if value is not None),
        meters=tuple(_meters(limit)),
        strict=limit.reserve == "strict",
        all_attempts=limit.counted == "all_attempts",
        rank=limit.priority,
        shadow=limit.shadow,
        when_down=limit.when_down,
        max_wait_s=limit.max_wait or None,
    )


def _named(dimension: Dimension, value: str) -> str:
    return user_digest(value) or "" if dimension == "user" and value != EACH else value


def _meters(limit: noun.Limit) -> Iterator[Meter]:
    # What is cheapest to refuse comes first, what stands in headers too.
    for measure in _RATES:
        rate: noun.RateLimit | None = getattr(limit, measure)
        if rate is not None:
            period_ms = _PERIODS_MS[rate.per] * _SECOND_MS
            yield Meter(
                measure=measure,
                rule=Rate(rate.limit, period_ms, rate.limit if rate.burst is None else rate.burst),
                span=f":{rate.per}",
            )
    if limit.concurrent is not None:
        yield Meter(measure="concurrent", rule=Concurrency(limit.concurrent))
    if limit.spend is not None:
        yield _spend(limit.spend)


def _spend(spend: noun.SpendLimit) -> Meter:
    if spend.per is None:
        return Meter(measure="spend", rule=Budget(spend.usd), span=":total")
    if spend.window == "rolling":
        rule = Rolling(spend.usd, _PERIODS_MS[spend.per] * _SECOND_MS)
        return Meter(measure="spend", rule=rule, span=f":rolling-{spend.per}")
    calendar = Calendar(limit=spend.usd, period=spend.per, zone=ZoneInfo(spend.timezone))
    return Meter(measure="spend", rule=calendar, span=f":{spend.per}")


def _queues(config: noun.Config) -> Iterator[Limit]:
    for tier in config.tiers:
        if tier.queue is not None:
            yield Limit(
                name=f"queue of {tier.name}",
                scope=(("tier", tier.name),),
                meters=(Meter(measure="concurrent", rule=Concurrency(tier.queue.concurrent)),),
                max_wait_s=tier.queue.max_wait,
                most_waiting=tier.queue.size,
            )
