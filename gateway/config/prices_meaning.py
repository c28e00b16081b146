"""Can it be billed by these prices? A configuration in, findings out.

As in `gateway.config.meaning` a stand-in is never complained about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from math import inf

import msgspec

from gateway.config.findings import Findings
from gateway.config.model import Config, LaterPrice, Price
from gateway.config.problem import quoted
from gateway.config.shape import Place, spelled
from gateway.config.units import LARGEST_NUSD, render_usd

_WAYS = "a price is `input` and `output`, or `gpu`, or `litellm`"
_OF_TOKENS = ("input", "output", "cached_input")
_WHOLE = ("gpu", "litellm")


class Stated(msgspec.Struct, frozen=True):
    """A price of the file: where it stands, and from when on it applies; `at` is empty for the first one."""

    place: Place
    price: Price
    at: str = ""

    @property
    def from_s(self) -> float:
        """Seconds since the epoch."""
        return moment_s(self.at) if self.at else -inf


def stated(config: Config) -> Iterator[Stated]:
    """Yield every price that stands in a configuration."""
    for i in range(len(config.tiers)):
        yield from _of_tier(config, i)
    for name, backend in config.backends.items():
        place: Place = ("backends", name)
        if backend.price is not None:
            yield Stated((*place, "price"), backend.price)
        yield from _later(place, backend.later_prices)


def moment_s(at: str) -> float:
    """Return a moment in seconds since the epoch. Raises ValueError where the calendar has none."""
    return datetime.fromisoformat(at).timestamp()


class PricesCheck:
    """The checks over the prices of one file: what they find goes to `findings`."""

    def __init__(self, config: Config, findings: Findings) -> None:
        self._config = config
        self._found = findings
        for one in stated(config):
            self._one_way(one)
            self._amounts(one.place, one.price)
        for name, backend in config.backends.items():
            self._in_order(("backends", name), backend.later_prices)
        ordered = [self._in_order(("tiers", i), tier.later_prices) for i, tier in enumerate(config.tiers)]
        for i in range(1, len(config.tiers)):
            if ordered[i - 1] and ordered[i]:
                self._dearer_than_below(i)

    def _one_way(self, one: Stated) -> None:
        found, place = self._found, one.place
        # Where a key is misspelt, it may be the one that is missed.
        unknown = any(fault[:-1] == place and fault not in found.marks for fault in found.broken)
        if place not in found.marks or place in found.broken or unknown:
            return
        written = [key for key in (*_WHOLE, *_OF_TOKENS) if (*place, key) in found.marks]
        if not written:
            found.error(place, f"no price in it; {_WAYS}")
            return
        if written[0] in _WHOLE:
            for key in written[1:]:
                found.error((*place, key), f"not beside {quoted(written[0])}: {_WAYS}")
            return
        for key in ("input", "output"):
            if key not in written:
                found.error(place, f"missing key `{key}`")

    def _amounts(self, place: Place, price: Price) -> None:
        if price.cached_input is not None and price.input is not None and price.cached_input > price.input:
            message = "dearer than `input`: a cache hit should not cost more"
            self._found.warn((*place, "cached_input"), message)
        if price.gpu is not None and price.gpu.usd_per_hour * price.gpu.count > LARGEST_NUSD:
            self._found.error((*place, "gpu"), f"more than {render_usd(LARGEST_NUSD)} an hour together")

    def _in_order(self, place: Place, later: tuple[LaterPrice, ...]) -> bool:
        """Whether prices follow one another in time."""
        last: tuple[float, int] | None = None
        ordered = True
        for k, one in enumerate(later):
            here = (*place, "later_prices", k, "at")
            fault = ""
            try:
                at_s = moment_s(one.at) if one.at else None
            except ValueError:
                at_s, fault = None, f"{quoted(one.at)} is no day or time of the calendar"
            if at_s is not None and last is not None and at_s <= last[0]:
                before = spelled((*place, "later_prices", last[1], "at"))
                fault = f"not after {before}; prices stand in order of time"
            elif at_s is not None:
                last = (at_s, k)
            if fault:
                self._found.error(here, fault)
            ordered = ordered and bool(one.at) and not fault
        return ordered

    def _dearer_than_below(self, i: int) -> None:
        """Warn where tokens of a tier are at any time cheaper than those of the one below it."""
        below, above = list(_of_tier(self._config, i - 1)), list(_of_tier(self._config, i))
        for at_s in sorted({one.from_s for one in (*below, *above)}):
            low, high = _in_force(below, at_s), _in_force(above, at_s)
            for part in ("input", "output"):
                low_nusd: int | None = getattr(low.price, part)
                high_nusd: int | None = getattr(high.price, part)
                if low_nusd is not None and high_nusd is not None and high_nusd < low_nusd:
                    message = f"cheaper than {spelled((*low.place, part))}, but tiers stand cheapest first"
                    self._found.warn((*high.place, part), message)


def _in_force(prices: Sequence[Stated], at_s: float) -> Stated:
    return next(one for one in reversed(prices) if one.from_s <= at_s)


def _of_tier(config: Config, i: int) -> Iterator[Stated]:
    yield Stated(("tiers", i, "price"), config.tiers[i].price)
    yield from _later(("tiers", i), config.tiers[i].later_prices)


def _later(place: Place, later: tuple[LaterPrice, ...]) -> Iterator[Stated]:
    for k, one in enumerate(later):
        yield Stated((*place, "later_prices", k, "price"), one.price, one.at)
