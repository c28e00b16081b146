"""Is this hour's spending unlike the same hour of past weeks? Hourly sums in, a verdict in words out.

Amounts are compared by their logarithms, because spending doubles rather than grows by a dollar, and by medians,
because an hour that was unlike the others must not become what is expected. What is expected is the median of the same
hour of the last eight weeks; with fewer than four of them partly, and at first wholly, that of the same hour of the
last fourteen days. The hour before and the one after are looked at too, so that summer time, or a job that starts a
little early, is no anomaly.

How far from that is far is learned from the series: the median absolute deviation (times 1.4826: the standard deviation
where the noise is normal) of that hour over the weeks, that of the hours of the last week from what was expected of
them, and what a few dear requests more or less can make; the greatest counts. An hour is a spike only if it is far
away by that, *and* at least twice as much, *and* dearer by `least_nusd`, *and* further away than all but one hour of
the last two weeks: of bursts that come now and then nobody knows when the next one is due. It is a drop only if next to
nothing is left of much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log, sqrt
from statistics import median
from typing import Literal

import msgspec
from msgspec.structs import replace

Word = Literal["usual", "spike", "drop", "unknown"]

DAY = 24
WEEK = 7 * DAY
WEEKS = 8
HOURS = WEEKS * WEEK + 1
"""As many hours before are looked at."""

QUIET_HOURS = 6
"""An anomaly is over when it was usual for so long."""

_DAYS = 14
_LEAST_DAYS = 7
_TRUSTED_WEEKS = 4
_FAR = 3.0
_TWICE = 2.0
_NOTHING = 0.1
_MUCH = 10
_FEW_REQUESTS = 20
_MAD = 1.4826
_LEAST_SPREAD = 0.15
_UNKNOWN_SPREAD = 0.5
_PRIOR_HOURS = 8
_STEP = 5
"""Not a divisor of a day: every hour of the day has its turn."""
_FURTHER = 0.2
_NUSD = 1e9


class Past(msgspec.Struct, frozen=True):
    """What was spent in successive hours, in nano-dollars, and by how many requests. Both as long.

    Hours before the first that has spent anything are no history.
    """

    nusd: Sequence[int]
    requests: Sequence[int]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How an hour compares. `score` is how many times `spread` the logarithms are apart; positive where it was more.

    `expected_nusd` is what it was compared with; `spread` is in natural logarithms, 0.7 being a factor of two.
    `unknown` has neither, and 0 in their place.
    """

    word: Word
    observed_nusd: int
    expected_nusd: int = 0
    spread: float = 0.0
    score: float = 0.0
    reason: str


def judge(past: Past, at: int, *, least_nusd: int) -> Verdict:
    """Compare the hour at index `at` with those before it.

    The more was spent in it, the higher its score, and a spike stays one: an hour that is not over yet may be judged by
    what it has come to so far, and what is found then is true of the whole of it. Only a drop has to wait.
    Raises IndexError where there is no such hour.
    """
    observed = past.nusd[at]
    first = _first(past, at)
    days = _hours(at, DAY, _DAYS, first)
    if len(days) < _LEAST_DAYS:
        known = (at - first) // DAY if first < at else 0
        reason = f"not enough history: {known} days of it, and {_LEAST_DAYS} are needed"
        return Verdict(word="unknown", observed_nusd=observed, reason=reason)
    weeks = _hours(at, WEEK, WEEKS, first)
    of = _Compared(past, first, least_nusd)
    centre = of.expected(at)
    near = of.expected(at, -1), of.expected(at, 1)
    drift, residual = of.last_week(at) if len(weeks) >= 3 else (0.0, _UNKNOWN_SPREAD)
    requests = median(past.requests[i] for i in (weeks or days))
    spread = max(residual, of.spread(weeks or days, residual), of.chance(at, weeks or days))
    # Neighbours count less: of three medians one is always the highest.
    high = max(centre, max(near) - residual) + max(0.0, drift)
    low = min(centre, min(near) + residual) + min(0.0, drift)
    value = log(observed + least_nusd)
    # Between the two it is as usual as can be, and nothing says by which it should be measured.
    nearest = min(max(value, low), high)
    expected = max(0, round(exp(nearest)) - least_nusd)
    score = (value - nearest) / spread
    whence = f"{len(weeks)} weeks" if len(weeks) >= _TRUSTED_WEEKS else f"{len(days)} days"
    said = f"{_usd(observed)} where {_usd(expected)} was expected by {whence}"
    usual = Verdict(
        word="usual", observed_nusd=observed, expected_nusd=expected, spread=spread, score=score, reason=said
    )
    if score >= _FAR and observed >= _TWICE * expected and observed - expected >= least_nusd:
        if value - nearest < of.second_furthest(at) - max(0.0, drift) + _FURTHER:
            return replace(usual, reason=f"{said}, but an hour so unlike the others is not new here")
        times = f"{observed / expected:.1f} times as much, " if expected else ""
        return replace(usual, word="spike", reason=f"{said}: {times}{score:.1f} spreads above")
    if (
        score <= -_FAR
        and len(weeks) >= _TRUSTED_WEEKS
        and observed <= _NOTHING * expected
        and expected >= _MUCH * least_nusd
        and requests >= _FEW_REQUESTS
        and observed < sorted(past.nusd[i] for i in weeks)[1]
    ):
        return replace(usual, word="drop", reason=f"{said}: {-score:.1f} spreads below. Is something down?")
    return usual


def begins(past: Past, at: int, *, least_nusd: int) -> bool:
    """Tell whether the hour at index `at` is an anomaly and the hours before it were not: who heard of it once knows.

    A function of the past alone, so that replicas and restarts come to the same.
    """
    word = judge(past, at, least_nusd=least_nusd).word
    if word not in ("spike", "drop"):
        return False
    before = range(max(0, at - QUIET_HOURS), at)
    return all(judge(past, i, least_nusd=least_nusd).word != word for i in before)


class _Compared(msgspec.Struct, frozen=True):
    past: Past
    first: int
    least_nusd: int

    def logs(self, hours: Iterable[int]) -> list[float]:
        return [log(self.past.nusd[i] + self.least_nusd) for i in hours]

    def expected(self, at: int, shift: int = 0) -> float:
        """Return the logarithm of what is expected `shift` hours after `at`, by what was known before `at`."""
        weeks = self.logs(_hours(at, WEEK, WEEKS, self.first, shift))
        trust = min(1.0, len(weeks) / _TRUSTED_WEEKS)
        if trust == 1.0:
            return median(weeks)
        days = median(self.logs(_hours(at, DAY, _DAYS, self.first, shift)))
        return trust * median(weeks) + (1 - trust) * days if weeks else days

    def last_week(self, at: int) -> tuple[float, float]:
        """Return how far the last week as a whole was from what was expected of it, and how far its hours from that."""
        hours = [i for i in range(at - _STEP, at - WEEK, -_STEP) if i - WEEK >= self.first]
        off = [
            value - median(self.logs(_hours(i, WEEK, WEEKS, self.first)))
            for i, value in zip(hours, self.logs(hours), strict=True)
        ]
        drift = median(off)
        return drift, max(_LEAST_SPREAD, _MAD * median(abs(one - drift) for one in off))

    def spread(self, hours: Sequence[int], prior: float) -> float:
        """Return how far these hours are apart, drawn towards `prior` where they are few."""
        values = self.logs(hours)
        centre = median(values)
        own = _MAD * median(abs(value - centre) for value in values)
        return sqrt((len(values) * own**2 + _PRIOR_HOURS * prior**2) / (len(values) + _PRIOR_HOURS))

    def chance(self, at: int, hours: Sequence[int]) -> float:
        """Return what chance makes of these hours, if requests come independently and cost as unevenly as waits."""
        recent = slice(max(self.first, at - _DAYS * DAY), at)
        each = sum(self.past.nusd[recent]) / max(1, sum(self.past.requests[recent]))
        requests = max(1.0, median(self.past.requests[i] for i in hours))
        return each * sqrt(2 * requests) / (median(self.past.nusd[i] for i in hours) + self.least_nusd)

    def second_furthest(self, at: int) -> float:
        """Return how far above what was expected the hours of the two weeks before were; the furthest but one.

        Those of the last day are left out: what has begun an hour ago is still new.
        """
        hours = range(max(self.first + DAY, at - _DAYS * DAY), at - DAY)
        return sorted(log(self.past.nusd[i] + self.least_nusd) - self.expected(i) for i in hours)[-2]


def _first(past: Past, at: int) -> int:
    """Return the first hour that counts: what was not there yet did not spend nothing."""
    oldest = max(0, at - HOURS)
    return next((i for i in range(oldest, at) if past.nusd[i]), at)


def _hours(at: int, every: int, most: int, first: int, shift: int = 0) -> list[int]:
    hours = (at - n * every + shift for n in range(1, most + 1))
    return [i for i in hours if i >= first]


def _usd(nusd: int) -> str:
    return f"${nusd / _NUSD:,.2f}"
