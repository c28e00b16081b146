"""Who waits gets in when there is room, in turn, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any

import pytest

from gateway.waiting import StillFull, Ticket, WaitingRoom


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


class Seats:
    """So many seats by account, and who got one."""

    def __init__(self, **free: int) -> None:
        self.free = free
        self.got: list[str] = []
        self.undone: list[str] = []
        self.room: WaitingRoom[str] = WaitingRoom(size=100, undo=self._undo)

    def _undo(self, name: str) -> None:
        self.undone.append(name)

    def attempt(self, name: str, *accounts: str) -> Callable[[], Awaitable[str | StillFull]]:
        async def attempt() -> str | StillFull:
            await asyncio.sleep(0)
            for account in accounts:
                if not self.free[account]:
                    return StillFull(account)
            for account in accounts:
                self.free[account] -= 1
            self.got.append(name)
            return name

        return attempt

    def give_back(self, account: str) -> None:
        self.free[account] += 1
        self.room.freed()

    async def wait(
        self, name: str, *accounts: str, priority: int = 0, team: str = "", wait_s: float = 60.0, behind: int = 50
    ) -> str | None:
        ticket = Ticket(priority=priority, team=team, until_s=monotonic() + wait_s, most_waiting=behind)
        return await self.room.wait(accounts[0], ticket, self.attempt(name, *accounts))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_first_in_turn_gets_what_is_given_back() -> None:
    async def main() -> None:
        seats = Seats(a=0)
        low, high = (
            asyncio.create_task(seats.wait("low", "a")),
            asyncio.create_task(seats.wait("high", "a", priority=1)),
        )
        await settled()
        assert seats.room.busy("a")
        seats.give_back("a")
        assert await high == "high"
        seats.give_back("a")
        assert await low == "low"
        await settled()
        assert not seats.room.busy("a")
        assert seats.room.waiting == 0

    run(main)


def test_room_that_another_replica_makes_is_found_without_being_told() -> None:
    async def main() -> None:
        seats = Seats(a=0)
        waiting = asyncio.create_task(seats.wait("one", "a"))
        await settled()
        seats.free["a"] = 1
        assert await waiting == "one"

    run(main)


def test_a_wait_ends_with_its_time() -> None:
    async def main() -> None:
        seats = Seats(a=0)
        assert await seats.wait("one", "a", wait_s=0.01) is None
        await settled()
        assert not seats.room.busy("a")

    run(main)


@pytest.mark.parametrize("settings", [{"wait_s": 0.0}, {"behind": 0}])
def test_who_may_not_wait_does_not(settings: dict[str, Any]) -> None:
    async def main() -> None:
        seats = Seats(a=1)
        assert await seats.wait("one", "a", **settings) is None
        assert seats.got == []

    run(main)


def test_who_leaves_makes_room_for_the_next() -> None:
    async def main() -> None:
        seats = Seats(a=0)
        first, second = asyncio.create_task(seats.wait("first", "a")), asyncio.create_task(seats.wait("second", "a"))
        await settled()
        first.cancel()
        await settled()
        seats.give_back("a")
        assert await second == "second"
        assert first.cancelled()
        assert seats.undone == []

    run(main)


def test_what_was_got_for_one_who_has_left_is_given_back() -> None:
    async def main() -> None:
        seats = Seats(a=0)
        gate = asyncio.Event()

        async def slow() -> str | StillFull:
            await gate.wait()
            return "late"

        ticket = Ticket(until_s=monotonic() + 60)
        waiting = asyncio.create_task(seats.room.wait("a", ticket, slow))
        await settled()
        waiting.cancel()
        await settled()
        gate.set()
        await settled()
        assert seats.undone == ["late"]
        assert not seats.room.busy("a")

    run(main)


def test_who_is_cancelled_just_as_it_got_in_gives_back() -> None:
    async def main() -> None:
        seats = Seats(a=1)

        async def at_once() -> str | StillFull:
            waiting.cancel()
            return "just"

        waiting = asyncio.create_task(seats.room.wait("a", Ticket(until_s=monotonic() + 60), at_once))
        await settled()
        assert waiting.cancelled()
        assert seats.undone == ["just"]

    run(main)


def test_one_that_lacks_something_else_holds_up_nobody() -> None:
    async def main() -> None:
        seats = Seats(a=0, b=0)
        both = asyncio.create_task(seats.wait("both", "a", "b"))
        await settled()
        alone = asyncio.create_task(seats.wait("alone", "a"))
        await settled()
        seats.give_back("a")
        assert await alone == "alone"
        seats.free["a"] = 1
        seats.give_back("b")
        assert await both == "both"
        await settled()
        assert not seats.room.busy("a")
        assert not seats.room.busy("b")

    run(main)


def test_what_an_attempt_raises_is_raised_where_it_waits() -> None:
    async def main() -> None:
        seats = Seats(a=0)

        async def broken() -> str | StillFull:
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            await seats.room.wait("a", Ticket(until_s=monotonic() + 60), broken)
        await settled()
        assert not seats.room.busy("a")

    run(main)


def test_who_would_wait_too_long_is_told_at_once() -> None:
    async def main() -> None:
        seats = Seats(a=0)
        served = [asyncio.create_task(seats.wait(f"s{n}", "a")) for n in range(20)]
        await settled()
        for _ in range(10):
            await asyncio.sleep(0.005)
            seats.give_back("a")
            await settled()
        expected_s = seats.room.expected_s("a", 0)
        assert expected_s > 0.02
        assert await seats.wait("late", "a", wait_s=expected_s / 2) is None
        assert not any(task.done() for task in served[10:])
        for task in served:
            task.cancel()
        await settled()

    run(main)
