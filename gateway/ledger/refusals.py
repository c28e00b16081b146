"""How many requests were refused, for what, in which hour? Counted in this process, told as rows now and then."""

from __future__ import annotations

from collections import Counter

from gateway.ledger.rows import RefusalRow

_HOUR_S = 3600
# Names of keys and codes are few; should they ever be many, those that come late are counted without the name.
_MOST_SORTS = 10_000
# Counters of so many hours are kept, because a clock may go backwards and they must never begin again.
_KEPT_HOURS = 48

_Sort = tuple[int, str, str]


class Refusals:
    """The counters of one process: each row tells its count of an hour so far."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._counts: Counter[_Sort] = Counter()
        self._untold: set[_Sort] = set()

    def add(self, key: str, code: str, now_s: float) -> None:
        """Count one. `now_s` is the time since the epoch."""
        sort = (int(now_s // _HOUR_S), key, code)
        if sort not in self._counts and len(self._counts) >= _MOST_SORTS:
            sort = (sort[0], "", code)
        self._counts[sort] += 1
        self._untold.add(sort)

    def rows(self) -> list[RefusalRow]:
        """Return the counts that have changed since they were told last."""
        untold, self._untold = self._untold, set()
        rows = [
            RefusalRow(
                hour=hour, instance=self._instance, key_name=key, code=code, requests=self._counts[hour, key, code]
            )
            for hour, key, code in sorted(untold)
        ]
        newest = max((hour for hour, _, _ in untold), default=0)
        for sort in [one for one in self._counts if one[0] < newest - _KEPT_HOURS]:
            del self._counts[sort]
        return rows
