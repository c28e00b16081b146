"""What does a token cost, where and when? Prices of the configuration in, one consistent list for a moment out.

An exchange takes the list of the moment when it came and keeps to it: what it reserves, what its headers say and what
its bill says are the same price.

A GPU costs by the hour, so what a token on it costs is provisional: worked out elsewhere from the work it has lately
done, and told here by `set_provisional`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from math import inf
from types import MappingProxyType
from typing import Literal
from weakref import WeakValueDictionary

import msgspec

from gateway.config import model as noun
from gateway.config.prices_meaning import moment_s
from gateway.ledger.rows import PriceRow
from gateway.price_list import LiteLlmPrices
from policies.cost import Price, divided

_MILLION = 1_000_000
_HOUR_S = 3600

START_COMPLETION_TOKENS_PER_S = 1_000
START_PROMPT_TOKENS_PER_S = 10_000
"""What a server is taken to do before anything of it was measured.

A model of 7 to 8 billion parameters on one data centre GPU, or one of 70 billion on four or eight of them, writes one
to three thousand tokens a second when it is busy, and reads prompts about ten times as fast. This is the low end, for a
whole server whatever its number of GPUs: until something is known, budgets rather hold too much than too little.
"""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a price says: nano-dollars per million tokens; of a GPU they are provisional, and its hour has the price."""

    kind: Literal["tokens", "gpu", "litellm"]
    input_nusd: int
    cached_input_nusd: int
    output_nusd: int
    hour_nusd: int | None = None


Schedule = Sequence[tuple[float, Terms]]
"""Prices and from when on each applies, seconds since the epoch; ascending, the first for ever before."""


class PriceList(msgspec.Struct, frozen=True):
    """The prices of one moment, by backend and by tier. That of a tier is the dearest of its backends, in each part.

    `rows` are what the ledger keeps of those of the backends, by version.
    """

    backends: Mapping[str, Price]
    tiers: Mapping[str, Price]
    rows: Mapping[str, PriceRow] = MappingProxyType({})

    @classmethod
    def of(cls, tiers: Mapping[str, Mapping[str, Price]], rows: Iterable[PriceRow] = ()) -> PriceList:
        """Build from the price of every backend of every tier."""
        return cls(
            {backend: price for prices in tiers.values() for backend, price in prices.items()},
            {tier: dearest(prices.values()) for tier, prices in tiers.items()},
            {row.version: row for row in rows},
        )


class HourPrice(msgspec.Struct, frozen=True, kw_only=True):
    """What a server costs for an hour. `row` names the price in the ledger, whatever its tokens cost provisionally."""

    tier: str
    backend: str
    hour_nusd: int
    row: PriceRow


def dearest(prices: Iterable[Price]) -> Price:
    """Return a price that is in no part below any of these."""
    prices = tuple(prices)
    if len(prices) == 1:
        return prices[0]
    return Price(
        input_nusd=max(one.input_nusd for one in prices),
        cached_input_nusd=max(one.cached_input_nusd for one in prices),
        output_nusd=max(one.output_nusd for one in prices),
        gpu=all(one.gpu for one in prices),
    )


class Pricing:
    """The price list as it is now, from the schedule of every backend of every tier; a `Price` is one for ever.

    `hours` and `hours_of` may be asked from any thread, the rest is for the event loop alone.
    """

    def __init__(self, tiers: Mapping[str, Mapping[str, Schedule | Price]]) -> None:
        self._tiers: Mapping[str, Mapping[str, Schedule]] = {
            tier: {name: _always(one) if isinstance(one, Price) else one for name, one in backends.items()}
            for tier, backends in tiers.items()
        }
        changes = {at_s for backends in self._tiers.values() for one in backends.values() for at_s, _ in one}
        self._changes = sorted(changes - {-inf})
        self._provisional: dict[str, Terms] = {}
        # A row lives as long as a list with it: an exchange that is still open finds that of its price.
        self._rows: WeakValueDictionary[str, PriceRow] = WeakValueDictionary()
        self._list = PriceList.of({})
        self._from_s = self._until_s = inf

    def at(self, now_s: float) -> PriceList:
        """Return the prices at a time, seconds since the epoch. Cheap: the same object until something changes.

        Where the clock goes back behind a change, the older prices apply again.
        """
        if not self._from_s <= now_s < self._until_s:
            self._turn(now_s)
        return self._list

    def row(self, version: str) -> PriceRow | None:
        """Return what the ledger keeps of a price; None for one that is in no list that anybody still holds."""
        return self._rows.get(version)

    def set_provisional(
        self, backend: str, *, input_nusd: int, cached_input_nusd: int, output_nusd: int, now_s: float
    ) -> None:
        """Say what tokens of a GPU's backend cost from now on: a price of a version of its own.

        Where the hour's price changes later, they change with it. Nothing happens where the backend's price is not a
        GPU's at that time. Raises ValueError for a negative price.
        """
        if min(input_nusd, cached_input_nusd, output_nusd) < 0:
            raise ValueError("a price must not be negative")
        for schedules in self._tiers.values():
            terms = in_force(schedules[backend], now_s) if backend in schedules else None
            if terms is not None and terms.hour_nusd is not None:
                found = msgspec.structs.replace(
                    terms, input_nusd=input_nusd, cached_input_nusd=cached_input_nusd, output_nusd=output_nusd
                )
                if found != self._provisional.get(backend):
                    self._provisional[backend] = found
                    self._from_s = self._until_s = inf  # made anew when it is asked for: several change at a time

    def hours(self, now_s: float) -> Mapping[str, HourPrice]:
        """Return what a whole hour of every GPU's backend costs at the price of that moment, by backend."""
        return {
            backend: HourPrice(
                tier=tier, backend=backend, hour_nusd=terms.hour_nusd, row=row_of(tier, backend, terms, now_s)
            )
            for tier, schedules in self._tiers.items()
            for backend, schedule in schedules.items()
            for terms in (in_force(schedule, now_s),)
            if terms.hour_nusd is not None
        }

    def hours_of(self, hour: int) -> Mapping[str, HourPrice]:
        """Return what an hour (they count since the epoch) of every backend cost that was a GPU's in a part of it.

        Where the price changed within the hour, it is each price for its time, rounded once; the row is that of the
        last one. The configuration is believed about the past too: a new price belongs into `later_prices`.
        """
        found = {}
        for tier, schedules in self._tiers.items():
            for backend, schedule in schedules.items():
                parts = [(s, terms) for s, terms in _parts(schedule, hour * _HOUR_S) if terms.hour_nusd is not None]
                if parts:
                    found[backend] = HourPrice(
                        tier=tier,
                        backend=backend,
                        hour_nusd=divided(sum(s * (terms.hour_nusd or 0) for s, terms in parts), _HOUR_S),
                        row=row_of(tier, backend, parts[-1][1], hour * _HOUR_S),
                    )
        return found

    def _turn(self, now_s: float) -> None:
        """Make the list of a time and note how long it is good for."""
        i = bisect_right(self._changes, now_s)
        self._from_s, self._until_s = [-inf, *self._changes, inf][i : i + 2]
        tiers: dict[str, dict[str, Price]] = {}
        rows = []
        for tier, schedules in self._tiers.items():
            prices = tiers[tier] = {}
            for backend, schedule in schedules.items():
                terms = self._terms(backend, in_force(schedule, now_s))
                made = row_of(tier, backend, terms, now_s)
                row = self._rows.setdefault(made.version, made)
                rows.append(row)
                prices[backend] = Price(
                    input_nusd=row.input_nusd,
                    cached_input_nusd=row.cached_input_nusd,
                    output_nusd=row.output_nusd,
                    version=row.version,
                    gpu=row.kind == "gpu",
                )
        self._list = PriceList.of(tiers, rows)

    def _terms(self, backend: str, terms: Terms) -> Terms:
        """Return what is billed by: of a GPU what was measured, at the price that its hour has now."""
        measured = self._provisional.get(backend)
        if measured is None or measured.hour_nusd is None or terms.hour_nusd is None:
            return terms
        now_nusd, then_nusd = terms.hour_nusd, measured.hour_nusd
        return msgspec.structs.replace(
            terms,
            input_nusd=divided(measured.input_nusd * now_nusd, then_nusd),
            cached_input_nusd=divided(measured.cached_input_nusd * now_nusd, then_nusd),
            output_nusd=divided(measured.output_nusd * now_nusd, then_nusd),
        )


def pricing_of(config: noun.Config, litellm: LiteLlmPrices) -> Pricing:
    """Return the prices of a configuration. Raises `PriceUnknownError` where LiteLLM's list is asked in vain.

    A backend's own price goes before its tier's, from when on it has one.
    """
    tiers: dict[str, dict[str, Schedule]] = {}
    for tier in config.tiers:
        shared = _schedule(tier.price, tier.later_prices, litellm)
        schedules = tiers[tier.name] = {}
        for name in tier.backends:
            own = _schedule(config.backends[name].price, config.backends[name].later_prices, litellm)
            own_from_s = own[0][0] if own else inf
            schedules[name] = (*((at_s, terms) for at_s, terms in shared if at_s < own_from_s), *own)
    return Pricing(tiers)


def terms_of(price: noun.Price, litellm: LiteLlmPrices) -> Terms:
    """Return what a price of the configuration says. Raises `PriceUnknownError`."""
    if price.gpu is not None:
        return start_of_gpu(price.gpu.usd_per_hour * price.gpu.count)
    if price.litellm is not None:
        listed = litellm.price_of(price.litellm)
        return Terms(
            kind="litellm",
            input_nusd=listed.input_nusd,
            cached_input_nusd=listed.cached_input_nusd,
            output_nusd=listed.output_nusd,
        )
    if price.input is None or price.output is None:
        raise AssertionError("the configuration was checked")
    cached_nusd = price.input if price.cached_input is None else price.cached_input
    return Terms(kind="tokens", input_nusd=price.input, cached_input_nusd=cached_nusd, output_nusd=price.output)


def start_of_gpu(hour_nusd: int) -> Terms:
    """Return what tokens of a server cost while nothing of it is measured: as if it were busy all the time.

    Tokens from its prefix cache are nothing it works for.
    """
    return Terms(
        kind="gpu",
        input_nusd=divided(hour_nusd * _MILLION, _HOUR_S * START_PROMPT_TOKENS_PER_S),
        cached_input_nusd=0,
        output_nusd=divided(hour_nusd * _MILLION, _HOUR_S * START_COMPLETION_TOKENS_PER_S),
        hour_nusd=hour_nusd,
    )


def in_force(schedule: Schedule, now_s: float) -> Terms:
    """Return what applies at a time."""
    return next(terms for at_s, terms in reversed(schedule) if at_s <= now_s)


def row_of(tier: str, backend: str, terms: Terms, at_s: float) -> PriceRow:
    """Return what the ledger keeps of a price. The same terms at the same place have the same version, anywhere."""
    numbers = (terms.input_nusd, terms.cached_input_nusd, terms.output_nusd, terms.hour_nusd)
    content = msgspec.json.encode((tier, backend, terms.kind, *numbers))
    return PriceRow(
        version=sha256(content).hexdigest()[:16],
        at_ms=int(at_s * 1000),
        tier=tier,
        backend=backend,
        kind=terms.kind,
        input_nusd=terms.input_nusd,
        cached_input_nusd=terms.cached_input_nusd,
        output_nusd=terms.output_nusd,
        hour_nusd=terms.hour_nusd,
    )


def _always(price: Price) -> Schedule:
    terms = Terms(
        kind="gpu" if price.gpu else "tokens",
        input_nusd=price.input_nusd,
        cached_input_nusd=price.cached_input_nusd,
        output_nusd=price.output_nusd,
    )
    return ((-inf, terms),)


def _schedule(
    price: noun.Price | None, later: Iterable[noun.LaterPrice], litellm: LiteLlmPrices
) -> tuple[tuple[float, Terms], ...]:
    first = () if price is None else ((-inf, terms_of(price, litellm)),)
    return (*first, *((moment_s(one.at), terms_of(one.price, litellm)) for one in later))


def _parts(schedule: Schedule, from_s: int) -> list[tuple[int, Terms]]:
    """Return the whole seconds of an hour that each price applied for: changes are at whole seconds."""
    until_s = from_s + _HOUR_S
    ends = [*(at_s for at_s, _ in schedule[1:]), inf]
    clipped = [
        (int(min(max(end_s, from_s), until_s) - min(max(at_s, from_s), until_s)), terms)
        for (at_s, terms), end_s in zip(schedule, ends, strict=True)
    ]
    return [(seconds, terms) for seconds, terms in clipped if seconds > 0]
