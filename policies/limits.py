"""Which limits apply to this request, and what does it need of each? Facts in, entries of a reservation out.

A limit has a scope (which requests it counts together) and meters (what it counts). Each meter of each limit that
applies is one account; its name says the limit, the measure and whom it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from datetime import tzinfo
from typing import Literal

import msgspec

from policies.accounts import Budget, Concurrency, Entry, Rate, Rolling, Rule
from policies.calendar import Period, window_starts

Dimension = Literal["key", "team", "user", "route", "model", "tier"]
Measure = Literal["requests", "tokens", "input_tokens", "output_tokens", "concurrent", "spend"]
WhenDown = Literal["open", "closed", "share"]

EACH = "each"
"""In a scope: every one apart."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a scope can look at. `user` is a digest, of one length whatever the client sends; None where there is none.

    `tier` is None for the request as a whole, and the tier's name for one attempt.
    """

    key: str
    team: str | None = None
    user: str | None = None
    route: str
    model: str
    tier: str | None = None


class Calendar(msgspec.Struct, frozen=True, kw_only=True):
    """A sum by calendar windows: the rule it stands for depends on the time."""

    limit: int
    period: Period
    zone: tzinfo

    def rule(self, now_ms: int) -> Budget:
        """Return the rule with the windows around `now_ms`."""
        return Budget(self.limit, window_starts(now_ms, self.period, self.zone))


class Meter(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a limit counts, and how. `span` tells periods of one measure apart in the names of accounts."""

    measure: Measure
    rule: Rule | Calendar
    span: str = ""


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """One limit of the configuration. `scope` is ordered by dimension; a value is a name or `each`.

    `strict` reserves the most a request can come to instead of an estimate; `all_attempts` counts the tokens of doubted
    attempts too. Of limits with a `rank` only those of the highest one apply to a request. Nobody waits for a limit
    without `max_wait_s`; for another `most_waiting` may, in each process.
    """

    name: str
    scope: tuple[tuple[Dimension, str], ...] = ()
    meters: tuple[Meter, ...]
    strict: bool = False
    all_attempts: bool = False
    rank: int | None = None
    shadow: bool = False
    when_down: WhenDown = "share"
    max_wait_s: float | None = None
    most_waiting: int = 1000

    def counts_by(self, dimensions: AbstractSet[Dimension]) -> bool:
        """Whether it counts any of these apart."""
        return any(dimension in dimensions for dimension, _ in self.scope)

    @property
    def of_attempts(self) -> bool:
        """Whether it counts attempts on tiers and not requests."""
        return any(dimension == "tier" for dimension, _ in self.scope)

    def matched(self, facts: Facts) -> str | None:
        """Return whom it counts this request for, such as `key=alice|route=auto`; None where it does not apply."""
        parts: list[str] = []
        for dimension, wanted in self.scope:
            value: str | None = getattr(facts, dimension)
            if value is None:
                # Nobody slips out of a limit by leaving the user out: all who do are one.
                if dimension != "user":
                    return None
                value = ""
            if wanted not in (EACH, value):
                return None
            parts.append(f"{dimension}={_plain(value)}")
        return "|".join(parts)


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, and nano-dollars."""

    input_tokens: int = 0
    output_tokens: int = 0
    spend_nusd: int = 0

    def of(self, measure: Measure) -> int:
        """Return the amount of one measure. Requests and concurrent ones are counted, not measured."""
        if measure == "tokens":
            return self.input_tokens + self.output_tokens
        if measure == "input_tokens":
            return self.input_tokens
        if measure == "output_tokens":
            return self.output_tokens
        return self.spend_nusd if measure == "spend" else 0


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What is reserved for a request: an estimate, and the most: of the answer shown, and of all attempts together.

    `least` is what is sure to be used if it is answered at all. The most is None where no limit is strict.
    """

    least: Amounts = Amounts()
    estimate: Amounts
    most_shown: Amounts | None = None
    most_of_all: Amounts | None = None

    @classmethod
    def nothing(cls) -> Need:
        """Return the need of nothing."""
        return _NOTHING

    def of(self, limit: Limit, meter: Meter) -> int:
        """Return what a limit reserves. An estimate alone never says that a request cannot fit at all."""
        measure = meter.measure
        if not limit.strict:
            return max(self.least.of(measure), min(self.estimate.of(measure), capacity(meter.rule)))
        most = self.most_of_all if limit.all_attempts or measure == "spend" else self.most_shown
        if most is None:
            raise ValueError(f"the limit {limit.name} is strict, but the most that is needed was not asked for")
        return most.of(measure)


_NOTHING = Need(estimate=Amounts(), most_shown=Amounts(), most_of_all=Amounts())


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What a request used, or has used so far."""

    shown: Amounts = Amounts()
    of_all: Amounts = Amounts()

    def of(self, limit: Limit, measure: Measure) -> int:
        """Return what a limit counts of it."""
        every_attempt = limit.all_attempts or measure == "spend"
        return (self.of_all if every_attempt else self.shown).of(measure)


class Account(msgspec.Struct, frozen=True):
    """One meter of one limit, for one caller: a line of every reservation it has a part in.

    `whom` is what the scope matched, such as `key=alice|route=auto`.
    """

    limit: Limit
    meter: Meter
    whom: str
    name: str

    @property
    def scope(self) -> dict[str, str]:
        """Whom it counts, by dimension."""
        pairs = (part.partition("=") for part in self.whom.split("|") if part)
        return {dimension: _said(value) for dimension, _, value in pairs}

    def rule(self, now_ms: int) -> Rule:
        """Return its rule as it stands at a time."""
        rule = self.meter.rule
        return rule.rule(now_ms) if isinstance(rule, Calendar) else rule

    def entry(self, need: Need, now_ms: int) -> Entry:
        """Return its line in a reservation."""
        measure = self.meter.measure
        held = 1 if measure == "concurrent" else need.of(self.limit, self.meter)
        return Entry(
            self.name,
            self.rule(now_ms),
            taken=1 if measure == "requests" else 0,
            held=held,
            shadow=self.limit.shadow,
        )

    def used(self, use: Use) -> int:
        """Return what it counts of what was used."""
        return use.of(self.limit, self.meter.measure)


def accounts_of(limits: Iterable[Limit], facts: Facts) -> tuple[Account, ...]:
    """Return the accounts that count a request (or, with `facts.tier`, an attempt), in the order of the limits."""
    found = [(limit, whom) for limit in limits if (whom := limit.matched(facts)) is not None]
    ranks = [limit.rank for limit, _ in found if limit.rank is not None]
    highest = max(ranks, default=0)
    return tuple(
        Account(limit, meter, whom, f"{limit.name}/{meter.measure}{meter.span}/{whom}")
        for limit, whom in found
        if limit.rank is None or limit.rank == highest
        for meter in limit.meters
    )


def remaining(rule: Rule | Calendar, used: int, reserved: int) -> int:
    """Return how much more fits."""
    return max(0, capacity(rule) - used - reserved)


def capacity(rule: Rule | Calendar) -> int:
    """Return the most that fits at once."""
    return rule.burst if isinstance(rule, Rate) else rule.limit


def described(meter: Meter) -> Mapping[str, object]:
    """Say what a meter allows, for people: `{"limit": 60, "per": "minute", "burst": 10}`."""
    rule = meter.rule
    if isinstance(rule, Rate):
        return {"limit": rule.limit, "per": _PERIODS.get(rule.period_ms, f"{rule.period_ms}ms"), "burst": rule.burst}
    if isinstance(rule, Calendar):
        return {"limit": rule.limit, "per": rule.period, "window": "calendar", "timezone": str(rule.zone)}
    if isinstance(rule, Rolling):
        return {"limit": rule.limit, "per": _PERIODS.get(rule.period_ms, "month"), "window": "rolling"}
    if isinstance(rule, Concurrency):
        return {"limit": rule.limit}
    return {"limit": rule.limit, "window": "total"}


_PERIODS = {1000: "second", 60_000: "minute", 3_600_000: "hour", 86_400_000: "day"}


def _plain(value: str) -> str:
    return value.replace("%", "%25").replace("|", "%7C")


def _said(value: str) -> str:
    return value.replace("%7C", "|").replace("%25", "%")
