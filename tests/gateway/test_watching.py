"""Does admission say how budgets stand, when something is asked of them and when it is settled?"""

from __future__ import annotations

import asyncio

import pytest

from gateway.admission import Admission, Request, Reservation
from gateway.errors import Refusal
from gateway.limiter import Clock, MemoryLimiter
from gateway.metrics import Metrics
from policies.access import Caller
from policies.accounts import Budget, Concurrency
from policies.limits import Account, Amounts, Facts, Limit, Meter, Need, Use

DAY_MS = 86_400_000
NOW_MS = 20_800 * DAY_MS + 5000


class Desk:
    """An admission with a budget of 1000, and what it says of it."""

    def __init__(self, rule: Budget) -> None:
        self.said: list[tuple[str, int]] = []
        self.now_s = NOW_MS / 1000
        clock = Clock(lambda: self.now_s)
        clock._ahead_s = 0.0
        limits = [
            Limit(name="budget", scope=(("key", "each"),), meters=(Meter(measure="spend", rule=rule),)),
            Limit(name="few", meters=(Meter(measure="concurrent", rule=Concurrency(3)),)),
        ]
        self.admission = Admission(MemoryLimiter(clock=clock), limits, metrics=Metrics(), watching=self._watch)
        self._asked = 0

    def _watch(self, account: Account, used_nusd: int, now_ms: int) -> None:
        self.said.append((account.name, used_nusd))

    async def ask(self, nusd: int) -> Reservation:
        self._asked += 1
        need = Need(estimate=Amounts(spend_nusd=nusd), least=Amounts(spend_nusd=nusd))
        facts = Facts(key="alice", route="auto", model="auto")
        request = Request(id=f"x{self._asked}", caller=Caller(key="alice"), facts=facts, need=need, so_far=Use)
        return await self.admission.admit(request)

    def news(self) -> list[int]:
        said, self.said = self.said, []
        assert {name for name, _ in said} <= {"budget/spend/key=alice"}, "of nothing but spending"
        return [used for _, used in said]


def cost(nusd: int) -> Use:
    return Use(of_all=Amounts(spend_nusd=nusd))


def test_what_is_used_is_said_when_something_is_asked_settled_and_refused() -> None:
    async def run() -> None:
        desk = Desk(Budget(1000))
        one = await desk.ask(400)
        assert desk.news() == [0]
        one.settle(cost(300))
        assert desk.news() == [300], "at once, and not with the next request"
        one.settle(cost(300))
        assert desk.news() == []
        two = await desk.ask(400)
        assert desk.news() == [300]
        two.cancel()
        assert desk.news() == []
        three = await desk.ask(700)
        three.settle(cost(900))
        assert desk.news() == [300, 1200]
        with pytest.raises(Refusal):
            await desk.ask(1)
        assert desk.news() == [1200]

    asyncio.run(run())


def test_what_is_settled_in_another_window_than_it_was_asked_in_is_said_with_the_next_request() -> None:
    async def run() -> None:
        starts = tuple(20_800 * DAY_MS + n * DAY_MS for n in range(-1, 3))
        desk = Desk(Budget(1000, starts))
        first = await desk.ask(400)
        first.settle(cost(400))
        late = await desk.ask(400)
        assert desk.news() == [0, 400, 400]
        desk.now_s += DAY_MS / 1000
        # Somebody else is told the time; what was used today is not what was used yesterday and this.
        other = await desk.ask(1)
        assert desk.news() == [0]
        late.settle(cost(400))
        assert desk.news() == []
        other.settle(cost(1))
        assert desk.news() == [1]
        await desk.ask(1)
        assert desk.news() == [401]

    asyncio.run(run())
