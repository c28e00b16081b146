"""What was spent in each hour, by each team and on each route? Sums of the ledger, as far back as anomalies look.

The whole is read once, a day at a time; then every reading takes the running hour, and the last day once an hour: rows
can come late, from the spool of a replica. Provisional costs of GPUs are not corrected here; what matters is whether an
hour is like the others. Everything here blocks, and belongs in one thread.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from gateway.ledger.contract import Reading, Store
from policies.anomaly import DAY, HOURS, QUIET_HOURS, Past

Of = Literal["team", "route"]

HOUR_MS = 3_600_000

_KEPT = HOURS + QUIET_HOURS + 2
_MOST_SERIES = 500
_BY_HOUR = """
    SELECT settled_ms / 3600000, team, route,
        CAST(SUM(input_nusd + cached_input_nusd + output_nusd + gpu_nusd) AS BIGINT), COUNT(*)
    FROM exchanges WHERE settled_ms >= ? AND settled_ms < ? GROUP BY 1, 2, 3
"""
_log = logging.getLogger("tierway.alerts")


class Series(msgspec.Struct, frozen=True):
    """Whose spending it is. `name` is None for those without a team."""

    of: Of
    name: str | None


class _Sums:
    """Sums of the last hours, each in the place that is its number modulo how many are kept."""

    def __init__(self) -> None:
        self.nusd = array("q", bytes(8 * _KEPT))
        self.requests = array("q", bytes(8 * _KEPT))

    def clear(self, hour: int) -> None:
        self.nusd[hour % _KEPT] = self.requests[hour % _KEPT] = 0

    def add(self, hour: int, nusd: int, requests: int) -> None:
        self.nusd[hour % _KEPT] += nusd
        self.requests[hour % _KEPT] += requests

    def until(self, hour: int) -> Past:
        """Return the sums of all hours that are kept, the oldest first and `hour`, the newest, last."""
        cut = (hour + 1) % _KEPT
        return Past(self.nusd[cut:] + self.nusd[:cut], self.requests[cut:] + self.requests[:cut])


class HourlySpend:
    """The last eight weeks and a bit. Of more than `most` series those met later are not watched."""

    def __init__(self, store: Store, *, most: int = _MOST_SERIES) -> None:
        self._store = store
        self._most = most
        self._series: dict[Series, _Sums] = {}
        self._newest: int | None = None
        self._left_out = False

    def read(self, now_ms: int, stop: Callable[[], bool] = lambda: False) -> int:
        """Read what has come, and return the running hour. Raises `LedgerDown`.

        Where `stop` says so it ends early, with what it has: the next reading begins anew.
        """
        running = now_ms // HOUR_MS
        newest = self._newest
        if newest is None or not 0 <= running - newest < _KEPT:
            self._series.clear()
            first = running - _KEPT + 1
        elif running > newest:
            first = newest - DAY
        else:
            first = running
        self._newest = None
        with self._store.reading() as reading:
            for begin in range(first, running + 1, DAY):
                if stop():
                    return running
                self._sum_up(reading, begin, min(begin + DAY, running + 1))
        self._newest = running
        self._forget()
        return running

    def _sum_up(self, reading: Reading, begin: int, end: int) -> None:
        for sums in self._series.values():
            for number in range(begin, end):
                sums.clear(number)
        for hour, team, route, nusd, requests in reading.rows(_BY_HOUR, (begin * HOUR_MS, end * HOUR_MS)):
            for series in (Series("team", _text(team)), Series("route", _text(route))):
                found = self._sums(series)
                if found is not None:
                    found.add(_number(hour), _number(nusd), _number(requests))

    def _sums(self, series: Series) -> _Sums | None:
        found = self._series.get(series)
        if found is None and len(self._series) < self._most:
            found = self._series[series] = _Sums()
        if found is None and not self._left_out:
            self._left_out = True
            _log.warning("more than %d teams and routes: the spending of the others is not watched", self._most)
        return found

    def _forget(self) -> None:
        """Make room of those that have spent nothing for long."""
        for series in [one for one, sums in self._series.items() if not any(sums.requests)]:
            del self._series[series]

    def all(self) -> Iterator[tuple[Series, Past]]:
        """Yield every series with its hours, the running one last. Nothing before the first reading."""
        if self._newest is not None:
            for series, sums in self._series.items():
                yield series, sums.until(self._newest)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"a sum of the ledger is {type(value).__name__}, not an integer")
    return value
