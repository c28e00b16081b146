"""Whose turn is it? Those who wait for one thing: the highest priority first, then the teams in turn, then by age.

A team that has many waiting gets no more turns than one that has few.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class Turns(Generic[_T]):
    """A bounded line of waiters of any kind; each waits once."""

    def __init__(self) -> None:
        self._lines: dict[int, OrderedDict[str, deque[_T]]] = {}
        self._places: dict[_T, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, waiter: _T, *, priority: int, team: str) -> None:
        """Put a waiter at the end of its team's line."""
        self._places[waiter] = (priority, team)
        self._lines.setdefault(priority, OrderedDict()).setdefault(team, deque()).append(waiter)

    def ahead_of(self, priority: int) -> int:
        """Return how many would be served before one that came now."""
        return sum(len(line) for own, teams in self._lines.items() if own >= priority for line in teams.values())

    def first(self) -> _T | None:
        """Return who is next."""
        if not self._lines:
            return None
        return next(iter(self._lines[max(self._lines)].values()))[0]

    def leave(self, waiter: _T, *, served: bool) -> None:
        """Take a waiter out. Served: the turn of its team is over."""
        place = self._places.pop(waiter, None)
        if place is None:
            return
        priority, team = place
        teams = self._lines[priority]
        line = teams[team]
        line.remove(waiter)
        if not line:
            del teams[team]
        elif served:
            teams.move_to_end(team)
        if not teams:
            del self._lines[priority]
