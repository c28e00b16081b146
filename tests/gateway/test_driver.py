"""Does every attempt that was started end, whenever it is cancelled?"""

from __future__ import annotations

import asyncio

from backends.backend import Call
from backends.scripted import recite
from gateway.body import Asked
from gateway.driver import Full, Line, Mailbox, Run, drive
from gateway.sinks import make_sink
from gateway.wire import TokenUsage, make_tap
from routing.cascade import Ending, Left, climb
from routing.ladder import Route, Rung, Seat
from routing.plan import PlannedAttempt, make_plan
from tests.gateway.plays import WORDS

ROUTE = Route(name="auto", rungs=(Rung("small", (Seat("one", "m"),)), Rung("large", (Seat("two", "m"),))))


class Gate:
    """A door that is shut for the first `shut` who come, and counts who is inside."""

    def __init__(self, shut: int = 0) -> None:
        self.shut = shut
        self.inside = 0

    async def enter(self, usage: object) -> None:
        await asyncio.sleep(0)
        if self.shut:
            self.shut -= 1
            raise Full("no room", 3)
        self.inside += 1

    def leave(self, usage: TokenUsage) -> None:
        self.inside -= 1


async def driven(mailbox: Mailbox, runs: list[Run], gate: Gate | None = None) -> Ending:
    asked = Asked(endpoint="chat/completions", model="auto", stream=True)

    async def send(_message: object) -> None:
        return None

    def line(attempt: PlannedAttempt) -> Line:
        call = Call(endpoint="chat/completions", body=(b'{"stream":true', b"}"), stream=True)
        tap = make_tap(asked, scored=False, read_tokens=0)
        return Line(recite("m", WORDS), call, tap, lambda _fault: None, gate)

    plan = make_plan(ROUTE, choices=1, down=frozenset(), tie_break=0)
    return await drive(
        climb(plan),
        sink=make_sink(send, [], stream=True),
        mailbox=mailbox,
        runs=runs,
        make_line=line,
        make_head=lambda _run, _commit: [],
    )


def test_an_attempt_that_is_cancelled_before_its_first_step_ends() -> None:
    async def main() -> None:
        mailbox, runs = Mailbox(), list[Run]()
        mailbox.put(Left(0.0))
        ending = await driven(mailbox, runs)
        assert ending.kind == "abandoned"
        assert [one.outcome for one in ending.judged] == ["cancelled"]
        assert runs[0].ended_s is not None

    asyncio.run(asyncio.wait_for(main(), 5))


def test_who_came_in_leaves_and_who_found_it_full_does_not() -> None:
    async def main() -> None:
        gate, runs = Gate(shut=1), list[Run]()
        ending = await driven(Mailbox(), runs, gate)
        assert [one.outcome for one in ending.judged] == ["full", "completed"]
        assert (ending.kind, ending.committed) == ("answered", 2)
        assert gate.inside == 0
        assert runs[0].full is not None
        assert runs[0].full.retry_after_s == 3
        assert runs[0].usage == TokenUsage()

    asyncio.run(asyncio.wait_for(main(), 5))
