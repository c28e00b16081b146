"""Does one process keep its limits by itself, and several workers their shares?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gateway.limiter import Clock, MemoryLimiter
from policies.accounts import Concurrency, Entry, Rate
from policies.operations import Charge, Granted, Refused
from tests.gateway.limiting import ask, concurrent, count_granted, granted, item, order, requests, spend, standing


def play(scene: Callable[[MemoryLimiter], Awaitable[None]], **settings: int) -> None:
    async def run() -> None:
        limiter = MemoryLimiter(**settings)  # type: ignore[arg-type]
        await limiter.open()
        await scene(limiter)
        await limiter.close()

    asyncio.run(run())


def test_a_reservation_is_all_or_nothing() -> None:
    async def scene(limiter: MemoryLimiter) -> None:
        assert await granted(limiter, requests(2), concurrent(1)) is not None
        refused = await ask(limiter, order(requests(2), concurrent(1)))
        assert isinstance(refused, Refused)
        assert [(one.index, one.why) for one in refused.short] == [(1, "reserved")]
        assert (await standing(limiter, requests(2))).used == 1

    play(scene)


def test_what_is_settled_or_cancelled_is_given_back_once_and_told() -> None:
    async def scene(limiter: MemoryLimiter) -> None:
        told: list[int] = []
        limiter.subscribe(lambda: told.append(1))
        first, second = [await granted(limiter, spend(100, 50)) for _ in range(2)]
        assert first is not None
        assert second is not None
        limiter.settle(first, (20,))
        limiter.settle(first, (20,))
        limiter.cancel(second)
        limiter.settle(second, (30,))
        found = await standing(limiter, spend(100, 0))
        assert (found.used, found.reserved) == (20, 0)
        assert told

    play(scene)


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_workers_together_give_out_the_limit_and_no_more(workers: int) -> None:
    async def scene() -> None:
        limiters = [MemoryLimiter(rank=rank, count=workers) for rank in range(workers)]
        assert sum([await count_granted(one, 20, requests(10), concurrent(15)) for one in limiters]) == 10

    asyncio.run(scene())


def test_a_worker_without_a_share_says_never() -> None:
    async def scene(limiter: MemoryLimiter) -> None:
        refused = await ask(limiter, order(concurrent(100), concurrent(2)))
        assert isinstance(refused, Refused)
        assert refused.short[0].why == "never"
        assert len(refused.standings) == 2
        nothing = item("concurrent", Concurrency(2))
        assert isinstance(await ask(limiter, order(nothing)), Granted)

    play(scene, rank=2, count=3)


def test_time_goes_on_for_a_rate() -> None:
    async def scene() -> None:
        now_s = [1000.0]
        limiter = MemoryLimiter(clock=Clock(lambda: now_s[0]))
        rate = item("rate", Rate(10, 1000, 1), taken=1)
        assert await count_granted(limiter, 3, rate) == 1
        now_s[0] += 0.1
        assert await count_granted(limiter, 3, rate) == 1

    asyncio.run(scene())


def test_totals_of_others_are_not_known_here() -> None:
    async def scene(limiter: MemoryLimiter) -> None:
        assert not await limiter.seed("deployment", (spend(100, 0).entry,))

    play(scene)


def test_what_was_spent_before_is_shared_out_like_the_limit() -> None:
    told = Charge("start", (Entry("spend", spend(100, 0).entry.rule, taken=7),))
    used = []

    async def scene(limiter: MemoryLimiter) -> None:
        assert [await limiter.tell("deployment", (told,)) for _ in range(2)] == [1, 0]
        used.append((await standing(limiter, spend(100, 0))).used)

    for rank in range(3):
        play(scene, rank=rank, count=3)
    assert used == [3, 2, 2]
