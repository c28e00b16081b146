"""Who waits for room, and who gets it first? Requests that would fit once others have given back what they hold.

Everyone waits for one account: the one that had no room. Of those only the first in turn tries again, when something
was given back in this process and every so often, because other replicas give back too. Whoever comes later and asks
`busy` first passes nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, TypeVar

import msgspec

from policies.turns import Turns

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.25
_TRUSTED_AFTER = 8
_WEIGHT = 0.2

_T = TypeVar("_T")


class StillFull(msgspec.Struct, frozen=True):
    """There is no room yet in this account."""

    account: str


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """Whose turn it is to be, until when it may wait (monotonic seconds), and behind how many at most."""

    priority: int = 0
    team: str = ""
    until_s: float
    most_waiting: int = 1000


class _Waiter(Generic[_T]):
    def __init__(self, ticket: Ticket, attempt: Callable[[], Awaitable[_T | StillFull]], account: str) -> None:
        self.ticket = ticket
        self.attempt = attempt
        self.account = account
        self.result: asyncio.Future[_T | None] = asyncio.get_running_loop().create_future()

    def give_up(self) -> None:
        if not self.result.done():
            self.result.set_result(None)


class _Line(Generic[_T]):
    """Those who wait for one account, and how fast they have been let in of late."""

    def __init__(self) -> None:
        self.turns: Turns[_Waiter[_T]] = Turns()
        self.woken = asyncio.Event()
        self.usher: asyncio.Task[None] | None = None
        self.interval_s = 0.0
        self._let_in = 0
        self._last_s = monotonic()

    def add(self, waiter: _Waiter[_T]) -> None:
        self.turns.add(waiter, priority=waiter.ticket.priority, team=waiter.ticket.team)

    def let_one_in(self) -> None:
        now_s = monotonic()
        took_s, self._last_s = now_s - self._last_s, now_s
        self._let_in += 1
        weight = max(_WEIGHT, 1 / self._let_in)
        self.interval_s += weight * (took_s - self.interval_s)

    def expected_s(self, priority: int) -> float:
        if self._let_in < _TRUSTED_AFTER:
            return 0.0
        return self.interval_s * (self.turns.ahead_of(priority) + 1)


class WaitingRoom(Generic[_T]):
    """All who wait in this process, `size` at most. `undo` gives back what was got for one who has left by then."""

    def __init__(self, *, size: int, undo: Callable[[_T], None]) -> None:
        self._size = size
        self._undo = undo
        self._lines: dict[str, _Line[_T]] = {}
        self.waiting = 0

    def busy(self, account: str) -> bool:
        """Whether somebody waits for this account already."""
        return account in self._lines

    def expected_s(self, account: str, priority: int) -> float:
        """Return how long one that came now would wait; 0 where that is not known."""
        line = self._lines.get(account)
        return 0.0 if line is None else line.expected_s(priority)

    async def wait(self, account: str, ticket: Ticket, attempt: Callable[[], Awaitable[_T | StillFull]]) -> _T | None:
        """Wait for room in `account` and return what `attempt` gets then; None when the time is over.

        `attempt` is only called while it is this one's turn, and what it raises is raised here. None comes at once
        where too many wait, or where the wait would take longer than the ticket allows.
        """
        left_s = ticket.until_s - monotonic()
        line = self._lines.get(account)
        ahead = 0 if line is None else len(line.turns)
        if left_s <= 0 or self.waiting >= self._size or ahead >= ticket.most_waiting:
            return None
        if self.expected_s(account, ticket.priority) > left_s:
            return None
        waiter = _Waiter(ticket, attempt, account)
        timer = asyncio.get_running_loop().call_later(left_s, waiter.give_up)
        self.waiting += 1
        self._enter(waiter)
        try:
            return await waiter.result
        except asyncio.CancelledError:
            if waiter.result.done() and not waiter.result.cancelled() and (got := waiter.result.result()) is not None:
                self._undo(got)
            raise
        finally:
            self.waiting -= 1
            timer.cancel()
            line = self._lines.get(waiter.account)
            if line is not None:
                line.turns.leave(waiter, served=False)
                line.woken.set()

    def freed(self) -> None:
        """Something was given back: whoever is first tries again."""
        for line in self._lines.values():
            line.woken.set()

    def close(self) -> None:
        """Let nobody in any more."""
        for line in self._lines.values():
            if line.usher is not None:
                line.usher.cancel()

    def _enter(self, waiter: _Waiter[_T]) -> None:
        line = self._lines.get(waiter.account)
        if line is None:
            line = self._lines[waiter.account] = _Line()
            line.usher = asyncio.create_task(self._let_in(waiter.account, line))
        line.add(waiter)

    async def _let_in(self, account: str, line: _Line[_T]) -> None:
        """Let the first in turn try, one after the other, until nobody waits."""
        pause_s = _FIRST_PAUSE_S
        while (waiter := line.turns.first()) is not None:
            line.woken.clear()
            moved = await self._try(waiter, line)
            if moved:
                pause_s = _FIRST_PAUSE_S
                continue
            try:
                async with asyncio.timeout(pause_s):
                    await line.woken.wait()
            except TimeoutError:
                pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)
        del self._lines[account]

    async def _try(self, waiter: _Waiter[_T], line: _Line[_T]) -> bool:
        """Let one try; return whether the turn is another's now."""
        try:
            got = await waiter.attempt()
        except Exception as error:  # noqa: BLE001 - it is raised where the waiter waits
            if not waiter.result.done():
                waiter.result.set_exception(error)
            line.turns.leave(waiter, served=False)
            return True
        if isinstance(got, StillFull):
            if got.account == waiter.account or waiter.result.done():
                return False
            # Here there is room, but another account has none: wait for that, and hold up nobody here.
            line.turns.leave(waiter, served=False)
            waiter.account = got.account
            self._enter(waiter)
            return True
        line.turns.leave(waiter, served=True)
        line.let_one_in()
        if waiter.result.done():
            self._undo(got)
        else:
            waiter.result.set_result(got)
        return True
