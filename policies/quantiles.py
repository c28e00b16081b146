"""What were recent observations like? Quantiles of the last few hundred, exactly.

For lengths of answers by route and tokens per byte by model: what is learned follows the traffic, and what was long ago
is forgotten.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil


class RecentQuantile:
    """The last `most` observations, in any unit. Adding one takes a few microseconds at 256, asking less than one."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Take in an observation; the oldest falls out where there are enough. Raises ValueError for NaN."""
        if value != value:  # noqa: PLR0124 - NaN alone is not itself, and would break the order for good
            raise ValueError("an observation must be a number")
        if len(self._sorted) == self._most:
            oldest = self._arrived.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._arrived.append(value)
        insort(self._sorted, value)

    def quantile(self, q: float) -> float | None:
        """Return the smallest observation that at least the share `q` of all do not exceed; None of none.

        0 gives the smallest of all, 1 the largest: the inverse of the empirical distribution (Hyndman and Fan, type 1).
        """
        if not self._sorted:
            return None
        return self._sorted[max(0, ceil(q * len(self._sorted)) - 1)]
