"""What will be spent by the end of a period? Hours that have passed in, a sum and an interval for the rest out.

An hour to come is expected to be like the same hour of past weeks, as far as there were such hours: a mean that is
drawn towards that of its hour of the day, which is drawn towards the mean of all hours (empirical-Bayes shrinkage with
a weight of `_PRIOR` observations). So one day of data gives the run rate with a shape of a day, and some weeks give
weeks. An hour far beyond the others counts as the largest usual one, or one mistake would be repeated every week.

The interval is for four cases of five: days vary about what the hours expected of them, and with few days the level
itself is unsure. It never falls below what is spent already.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean

import msgspec

_DAY = 24
_WEEK = 7 * _DAY
_PRIOR = 1.0
_USUAL = 0.95
_FAR = 5.0
_ENOUGH_HOURS = 2 * _DAY
_FOUR_OF_FIVE = 1.28


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Nano-dollars at the end of a period. `spent_nusd` is certain; `low_nusd` to `high_nusd` holds four times of five.

    `hours` is how many hours it was learned from. With none there is nothing to go by and it is what is spent.
    """

    spent_nusd: int
    expected_nusd: int
    low_nusd: int
    high_nusd: int
    hours: int


def forecast(past: Sequence[int], *, first_hour: int, spent_nusd: int, ahead: float) -> Forecast:
    """Return what `spent_nusd` grows to within `ahead` hours, which may have a fraction.

    `past` is what was spent in each hour up to now, in nano-dollars, without gaps: an hour without requests is a 0. Its
    first one has the number `first_hour`; hours of the same number modulo 168 are the same hour of the week.
    """
    if not past or ahead <= 0:
        return Forecast(
            spent_nusd=spent_nusd,
            expected_nusd=spent_nusd,
            low_nusd=spent_nusd,
            high_nusd=spent_nusd,
            hours=len(past),
        )
    usual = _usual(past)
    expect = _Profile(usual, first_hour)
    now = first_hour + len(past)
    whole = int(ahead)
    rest = sum(expect.of(now + one) for one in range(whole)) + (ahead - whole) * expect.of(now + whole)
    spread = _spread(usual, first_hour, expect, ahead)
    return Forecast(
        spent_nusd=spent_nusd,
        expected_nusd=spent_nusd + round(rest),
        low_nusd=spent_nusd + round(max(0.0, rest - spread)),
        high_nusd=spent_nusd + round(rest + spread),
        hours=len(past),
    )


def _usual(past: Sequence[int]) -> list[float]:
    """Return the hours without those that are far beyond the others."""
    busy = sorted(one for one in past if one > 0)
    if len(busy) < _ENOUGH_HOURS:
        return [float(one) for one in past]
    most = _FAR * busy[int(_USUAL * (len(busy) - 1))]
    return [float(min(one, most)) for one in past]


class _Profile:
    """The mean of every hour of the week."""

    def __init__(self, past: Sequence[float], first_hour: int) -> None:
        self._level = fmean(past)
        days: list[list[float]] = [[] for _ in range(_DAY)]
        weeks: list[list[float]] = [[] for _ in range(_WEEK)]
        for number, spent in enumerate(past, first_hour):
            days[number % _DAY].append(spent)
            weeks[number % _WEEK].append(spent)
        self._days = [_drawn(some, self._level) for some in days]
        # With less than a week the days of the week have nothing to say.
        known = len(past) >= _WEEK
        self._weeks = [_drawn(some if known else [], self._days[number % _DAY]) for number, some in enumerate(weeks)]

    def of(self, number: int) -> float:
        """Return what is expected of an hour."""
        return self._weeks[number % _WEEK]


def _drawn(some: Sequence[float], towards: float) -> float:
    return (sum(some) + _PRIOR * towards) / (len(some) + _PRIOR)


def _spread(past: Sequence[float], first_hour: int, expect: _Profile, ahead: float) -> float:
    """Return half the width of the interval for the sum of `ahead` hours."""
    # Days, not hours: what is unusual about one hour is unusual about the next as well.
    ends = range(len(past), 0, -_DAY)
    off = [
        sum(past[number] - expect.of(first_hour + number) for number in range(max(0, end - _DAY), end))
        for end in ends
        if end >= _DAY
    ]
    days = ahead / _DAY
    if len(off) < 2:
        # One day or less says nothing of how days differ: as much again, or nothing at all.
        return sum(past) / len(past) * ahead
    deviation = sqrt(sum(one * one for one in off) / (len(off) - 1))
    return _FOUR_OF_FIVE * deviation * sqrt(days + days * days / len(off))
