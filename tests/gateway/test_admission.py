"""Admission over real books: admitted, refused with the truth, or kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gateway.admission import Admission, Request, Reservation
from gateway.errors import Refusal
from gateway.limiter import MemoryLimiter
from gateway.metrics import Metrics
from policies.access import Caller
from policies.accounts import Budget, Concurrency, Rate
from policies.limits import Amounts, Facts, Limit, Meter, Need, Use

NUSD = 1_000_000_000
HOURLY = 3_600_000


def rate(measure: Any, limit: int, burst: int | None = None) -> Meter:
    return Meter(measure=measure, rule=Rate(limit, HOURLY, burst or limit), span=":hour")


def concurrent(limit: int) -> Meter:
    return Meter(measure="concurrent", rule=Concurrency(limit))


def budget(nusd: int) -> Meter:
    return Meter(measure="spend", rule=Budget(nusd), span=":total")


def limit(*meters: Meter, name: str = "some", **settings: Any) -> Limit:
    return Limit(name=name, meters=meters, **{"scope": (("key", "each"),), **settings})


def need(tokens: int = 10, nusd: int = 100) -> Need:
    amounts = Amounts(input_tokens=0, output_tokens=tokens, spend_nusd=nusd)
    return Need(estimate=amounts, most_shown=amounts, most_of_all=amounts)


def use(tokens: int = 0, nusd: int = 0) -> Use:
    amounts = Amounts(input_tokens=0, output_tokens=tokens, spend_nusd=nusd)
    return Use(shown=amounts, of_all=amounts)


class Desk:
    """An admission with limits, and callers who ask it."""

    def __init__(self, *limits: Limit) -> None:
        self.metrics = Metrics()
        self.admission = Admission(MemoryLimiter(), limits, metrics=self.metrics)
        self._asked = 0

    async def ask(self, key: str = "alice", *, priority: int = 0, wants: Need | None = None) -> Reservation:
        self._asked += 1
        request = Request(
            id=f"x{self._asked}",
            caller=Caller(key=key, priority=priority),
            facts=Facts(key=key, route="auto", model="auto"),
            need=wants or need(),
            so_far=use,
        )
        return await self.admission.admit(request)

    def again(self) -> None:
        """Let the next one come under the id of the last."""
        self._asked -= 1

    async def refused(self, key: str = "alice", wants: Need | None = None) -> Refusal:
        with pytest.raises(Refusal) as raised:
            await self.ask(key, wants=wants)
        return raised.value

    async def standings(self, key: str = "alice") -> list[tuple[str, int, int]]:
        facts = Facts(key=key, route="auto", model="auto")
        return [
            (account.meter.measure, standing.used, standing.reserved)
            for account, standing in await self.admission.standings([facts])
        ]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_without_a_limit_nothing_is_held() -> None:
    async def main() -> None:
        reservation = await Desk().ask()
        assert reservation.headers() == []
        reservation.settle(use(5))

    run(main)


def test_what_was_used_is_counted_and_the_rest_given_back() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("requests", 100), rate("tokens", 1000), concurrent(5), budget(NUSD)))
        reservation = await desk.ask(wants=need(tokens=400, nusd=5000))
        assert await desk.standings() == [
            ("requests", 1, 0),
            ("tokens", 0, 400),
            ("concurrent", 0, 1),
            ("spend", 0, 5000),
        ]
        reservation.settle(use(tokens=30, nusd=700))
        reservation.settle(use(tokens=30, nusd=700))
        assert await desk.standings() == [
            ("requests", 1, 0),
            ("tokens", 30, 0),
            ("concurrent", 0, 0),
            ("spend", 700, 0),
        ]

    run(main)


def test_a_cancelled_reservation_leaves_nothing() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("requests", 100), rate("tokens", 1000)))
        (await desk.ask()).cancel()
        assert await desk.standings() == [("requests", 0, 0), ("tokens", 0, 0)]

    run(main)


def test_an_id_that_was_cancelled_is_refused_and_is_no_fault() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("requests", 100)))
        (await desk.ask()).cancel()
        desk.again()
        refusal = await desk.refused()
        assert (refusal.code, refusal.retry_after_s) == ("rate_limit_exceeded", 1)
        assert await desk.standings() == [("requests", 0, 0)]

    run(main)


def test_a_refused_request_changes_no_counter_and_is_told_the_truth() -> None:
    async def main() -> None:
        desk = Desk(limit(concurrent(5), name="first"), limit(rate("requests", 2), name="second"))
        for _ in range(2):
            (await desk.ask()).settle(use())
        refusal = await desk.refused()
        assert (refusal.code, refusal.status) == ("rate_limit_exceeded", 429)
        assert "Limit 'second' (key=alice) allows 2 requests per hour: 2 requests used" in refusal.message
        assert refusal.retry_after_s is not None
        assert 1799 <= refusal.retry_after_s <= 1800
        headers = dict(refusal.headers())
        assert headers[b"x-ratelimit-limit-requests"] == b"2"
        assert headers[b"x-ratelimit-remaining-requests"] == b"0"
        assert headers[b"retry-after"] == b"%d" % refusal.retry_after_s
        assert await desk.standings() == [("concurrent", 0, 0), ("requests", 2, 0)]
        await desk.ask("bob")

    run(main)


def test_an_exhausted_budget_is_402_and_not_to_be_retried() -> None:
    async def main() -> None:
        desk = Desk(limit(budget(1000), rate("requests", 1)))
        (await desk.ask(wants=need(nusd=1000))).settle(use(nusd=950))
        refusal = await desk.refused(wants=need(nusd=100))
        assert (refusal.code, refusal.status, refusal.kind.type) == ("insufficient_quota", 402, "insufficient_quota")
        assert (b"x-should-retry", b"false") in refusal.headers()
        assert "$0.00000095 used" in refusal.message

    run(main)


def test_what_can_never_fit_is_said_so() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("tokens", 100), strict=True))
        refusal = await desk.refused(wants=need(tokens=101))
        assert (refusal.code, refusal.status) == ("request_exceeds_limit", 400)
        assert "101 tokens" in refusal.message

    run(main)


def test_an_estimate_alone_keeps_nobody_out_for_good() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("tokens", 100)))
        (await desk.ask(wants=need(tokens=5000))).settle(use(tokens=40))
        assert await desk.standings() == [("tokens", 40, 0)]

    run(main)


def test_a_shadow_limit_counts_reports_and_refuses_nothing() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("requests", 1), shadow=True))
        for _ in range(3):
            (await desk.ask()).settle(use())
        assert await desk.standings() == [("requests", 3, 0)]
        assert desk.metrics.snapshot().counters["tierway_limited_total"] == {("some", "requests", "true"): 2}
        assert (await desk.ask()).headers() == []

    run(main)


def test_one_that_would_fit_waits_its_turn() -> None:
    async def main() -> None:
        desk = Desk(limit(concurrent(1), max_wait_s=60))
        first = await desk.ask()
        second = asyncio.create_task(desk.ask())
        urgent = asyncio.create_task(desk.ask(priority=9))
        await settled()
        assert desk.admission.waiting == 2
        first.settle(use())
        reservation = await urgent
        assert reservation.waited_s > 0
        assert not second.done()
        reservation.settle(use())
        (await second).settle(use())
        assert await desk.standings() == [("concurrent", 0, 0)]

    run(main)


def test_nobody_passes_those_who_wait() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("tokens", 100), max_wait_s=60))
        first = await desk.ask(wants=need(tokens=60))
        large = asyncio.create_task(desk.ask(wants=need(tokens=90)))
        await settled()
        small = asyncio.create_task(desk.ask(wants=need(tokens=10)))
        await settled()
        assert not small.done()
        first.settle(use(tokens=0))
        (await large).settle(use(tokens=0))
        await small

    run(main)


def test_a_wait_that_ends_is_refused_with_an_estimate() -> None:
    async def main() -> None:
        desk = Desk(limit(concurrent(1), max_wait_s=0.01))
        await desk.ask()
        refusal = await desk.refused()
        assert refusal.code == "rate_limit_exceeded"
        assert "1 concurrent request" in refusal.message
        assert "an estimate" in refusal.message

    run(main)


def test_without_a_wait_it_is_refused_at_once() -> None:
    async def main() -> None:
        desk = Desk(limit(concurrent(1)))
        await desk.ask()
        assert (await desk.refused()).code == "rate_limit_exceeded"

    run(main)


def test_one_that_used_amounts_keep_out_does_not_wait() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("tokens", 100), max_wait_s=60))
        (await desk.ask(wants=need(tokens=100))).settle(use(tokens=100))
        assert (await desk.refused(wants=need(tokens=50))).code == "rate_limit_exceeded"

    run(main)


def test_who_leaves_the_line_holds_nothing() -> None:
    async def main() -> None:
        desk = Desk(limit(concurrent(1), max_wait_s=60))
        first = await desk.ask()
        waiting = asyncio.create_task(desk.ask())
        await settled()
        waiting.cancel()
        await settled()
        first.settle(use())
        await settled()
        assert await desk.standings() == [("concurrent", 0, 0)]

    run(main)


def test_headers_tell_the_nearest_limit() -> None:
    async def main() -> None:
        desk = Desk(
            limit(rate("requests", 1000), rate("tokens", 100_000), name="wide"),
            limit(rate("requests", 60, 10), name="narrow"),
        )
        headers = dict((await desk.ask(wants=need(tokens=1000))).headers())
        assert headers[b"x-ratelimit-limit-requests"] == b"60"
        assert headers[b"x-ratelimit-remaining-requests"] == b"9"
        assert headers[b"x-ratelimit-reset-requests"] == b"1m0s"
        assert headers[b"x-ratelimit-limit-tokens"] == b"100000"
        assert headers[b"x-ratelimit-remaining-tokens"] == b"99000"
        assert headers[b"x-ratelimit-reset-tokens"] == b"0ms"

    run(main)


def test_a_request_is_near_a_limit_when_it_would_take_most_of_what_is_left() -> None:
    async def main() -> None:
        desk = Desk(limit(rate("tokens", 1000)))
        facts = Facts(key="alice", route="auto", model="auto")
        assert not desk.admission.tight(facts, need(tokens=700))
        assert desk.admission.tight(facts, need(tokens=900))
        (await desk.ask(wants=need(tokens=500))).settle(use(tokens=500))
        assert desk.admission.tight(facts, need(tokens=700))
        # So far above what is left that counting would not help.
        assert not Desk(limit(rate("tokens", 1000), strict=True)).admission.tight(facts, need(tokens=100_000))

    run(main)
