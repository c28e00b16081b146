"""May the store be asked now? Not after a fault, until it has answered again, so that nobody waits for a dead server.

One fault is enough: each costs somebody the whole wait. It is asked again by one caller at a time, in growing pauses.
"""

from __future__ import annotations

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 0.5
_GROWTH = 1.5


class Breaker:
    """Closed while all is well. Knows no clock: who asks again waits `pause_s()` before."""

    def __init__(self) -> None:
        self.closed = True
        self._pause_s = _FIRST_PAUSE_S

    def failed(self) -> bool:
        """Open it; whether it was closed."""
        was, self.closed = self.closed, False
        return was

    def worked(self) -> None:
        """Close it."""
        self.closed = True
        self._pause_s = _FIRST_PAUSE_S

    def pause_s(self) -> float:
        """Return how long to wait before the store is asked again."""
        pause_s = self._pause_s
        self._pause_s = min(_LONGEST_PAUSE_S, pause_s * _GROWTH)
        return pause_s
