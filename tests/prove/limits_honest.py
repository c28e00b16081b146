"""Is a caller who keeps to its limits ever refused, and is one let through who does not? Rates, open requests, dollars.

An honest caller has a bucket of its own, a little smaller and a little slower than the one it is measured by, and sends
as soon as that lets it: in clumps as well as one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from time import monotonic
from typing import Any, NamedTuple

import uvloop

from tests.prove.clients import Answer, ask
from tests.prove.limits_reserved import Reserved, watched
from tests.prove.limits_site import Site, ask_for, running_site
from tests.prove.limits_upstream import Plan, Served
from tests.prove.proof import Figures, Size

_SHARE = 0.95
_BURST_SHARE = 0.5
"""Of the burst: the rest is for what a network and two busy cores make of clumps."""
_BUDGET_NUSD = 1_000_000_000
_ASKERS = 8
_MOST_TOKENS = 400
_MOST_PROMPT_TOKENS = 570
_TOKEN_NUSD = 9000
"""No request can come to more than a hundredth of the budget: a prompt of 100 bytes has 100 + 528 tokens at most."""
_SETTLED_WITHIN_S = 0.5


def run(seed: int, size: Size) -> Figures:
    """Ask at 95 % of a rate, then use up a budget that is reserved strictly and one that is estimated."""
    random = Random(seed)
    requests, rate = (10_000, 180) if size == "full" else (300, 150)
    limits: list[dict[str, Any]] = [
        {"name": "rate", "scope": {"key": "honest"}, "requests": {"limit": rate, "per": "second"}, "max_wait": "0s"},
        {"name": "open", "scope": {"key": "busy"}, "concurrent": _ASKERS},
        _budget("strict"),
        _budget("estimate"),
    ]
    keys = ["honest", "busy", "strict", "estimate"]
    with running_site("--workers", "2", keys=keys, limits=limits, state={"timeout": "2s"}, change=_dear) as site:
        figures = uvloop.run(_at_a_rate(site, random, requests, rate))
        figures |= uvloop.run(_open(site, requests // 10))
        for reserve in ("strict", "estimate"):
            with watched(site.store) as reserved:
                asked = uvloop.run(_spend(site, random, reserve))
            figures |= _check_budget(site, reserve, asked, reserved)
        site.sound()
    return figures


def _budget(reserve: str) -> dict[str, Any]:
    noun = {"name": reserve, "scope": {"key": reserve}, "reserve": reserve, "max_wait": "30s"}
    return noun | {"spend": {"usd": f"{_BUDGET_NUSD / 1e9:g}"}}


def _dear(config: dict[str, Any]) -> None:
    usd = _TOKEN_NUSD / 1000
    config["tiers"][0] |= {"price": {"input": usd, "output": usd}, "max_output_tokens": _MOST_TOKENS}


# -- at a rate -------------------------------------------------------------------------------------------------------


async def _at_a_rate(site: Site, random: Random, requests: int, rate: int) -> Figures:
    own = asyncio.Semaphore(64)
    sent: list[asyncio.Task[Answer]] = []
    # What stands in the own bucket, and since when.
    level, at_s = 0.0, monotonic()
    began_s = at_s
    largest = 0
    while len(sent) < requests:
        clump = min(random.choice((1, 1, 2, 5, 20, 60)), requests - len(sent), int(_BURST_SHARE * rate))
        now_s = monotonic()
        level, at_s = max(0.0, level - (now_s - at_s) * _SHARE * rate), now_s
        excess = level + clump - _BURST_SHARE * rate
        if excess > 0:
            await asyncio.sleep(excess / (_SHARE * rate))
            continue
        level += clump
        largest = max(largest, clump)
        sent += [asyncio.create_task(_honest(site, own, len(sent) + number)) for number in range(clump)]
        await asyncio.sleep(0)
    took_s = monotonic() - began_s
    answers = await asyncio.gather(*sent)
    refused = [answer for answer in answers if answer.status != 200]
    assert not refused, f"{len(refused)} of {requests} were refused: {refused[0]}"
    return {
        "requests at 95 % of a rate": float(requests),
        "refused": 0.0,
        "a second": round(requests / took_s),
        "limit, a second": float(rate),
        "largest clump": float(largest),
    }


async def _honest(site: Site, own: asyncio.Semaphore, number: int) -> Answer:
    async with own:
        return await ask(site.gateway.port, ask_for("honest", Plan(tag="honest", number=number, tokens=2)))


# -- open at the same time -------------------------------------------------------------------------------------------


async def _open(site: Site, requests: int) -> Figures:
    """Have as many ask one after the other as may be open at a time: whoever has its answer is open no more."""
    numbers = iter(range(requests))
    waited_ms: list[int] = []

    async def work() -> None:
        for number in numbers:
            answer = await ask(site.gateway.port, ask_for("busy", Plan(tag="busy", number=number, tokens=2)))
            assert answer.status == 200, f"refused with {_ASKERS} that ask: {answer}"
            waited_ms.append(int(answer.headers["x-tierway-queue-ms"]))

    await asyncio.gather(*(work() for _ in range(_ASKERS)))
    return {
        f"requests of {_ASKERS} that may be open": float(requests),
        "of these refused": 0.0,
        "longest wait for what was given back, ms": float(max(waited_ms)),
    }


# -- in dollars ------------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """What came of the requests: the ids by their numbers, and what had been spent when the first was refused."""

    ids: dict[int, str]
    refusals: list[Answer]
    spent_nusd: list[int]


async def _spend(site: Site, random: Random, reserve: str) -> _Asked:
    """Ask, several at a time, until nothing fits any more."""
    numbers = iter(range(1_000_000))
    asked = _Asked({}, [], [])
    await asyncio.gather(
        *(_until_refused(site, Random(random.random()), reserve, numbers, asked) for _ in range(_ASKERS))
    )
    return asked


async def _until_refused(site: Site, random: Random, reserve: str, numbers: Iterator[int], asked: _Asked) -> None:
    for number in numbers:
        plan = Plan(
            tag=reserve,
            number=number,
            tokens=random.choice((1, 50, 200, 390)),
            prompt_tokens=random.choice((50, 400, _MOST_PROMPT_TOKENS)),
            delay_ms=random.choice((0, 2, 10)),
        )
        answer = await ask(
            site.gateway.port,
            ask_for(reserve, plan, max_tokens=random.choice((200, _MOST_TOKENS)), stream=random.random() < 0.3),
        )
        asked.ids[number] = answer.headers["x-tierway-exchange-id"]
        if answer.status != 200:
            asked.refusals.append(answer)
            asked.spent_nusd.append(sum(_cost_nusd(one) for one in site.upstream.of(reserve) if one.whole))
            return


def _check_budget(site: Site, reserve: str, asked: _Asked, reserved: Reserved) -> Figures:
    assert {answer.status for answer in asked.refusals} == {402}, asked.refusals
    assert {answer.headers.get("x-should-retry") for answer in asked.refusals} == {"false"}
    assert site.at_rest([reserve])
    served = site.upstream.of(reserve)
    spent = sum(map(_cost_nusd, served))
    used = next(one.used for one in site.limits(reserve) if one.name == reserve)
    assert used == spent, f"{used} counted, {spent} spent"
    last_s = max(one.began_s for one in served)
    error = largest = 0
    for one in served:
        (held,) = reserved.of(asked.ids[one.number]).values()
        largest = max(largest, held)
        if (one.ended_s or last_s) >= last_s - _SETTLED_WITHIN_S:
            error += max(0, _cost_nusd(one) - held)
    first, over = asked.spent_nusd[0], max(0, spent - _BUDGET_NUSD)
    if reserve == "strict":
        assert largest <= _BUDGET_NUSD / 100
        assert first >= 0.97 * _BUDGET_NUSD, f"refused with {first / _BUDGET_NUSD:.1%} spent"
        assert over == 0, f"{spent / _BUDGET_NUSD:.2%} spent"
    else:
        assert over <= error, f"{spent / _BUDGET_NUSD:.2%} spent"
    figures: Figures = {
        f"{reserve}: requests": float(len(served)),
        f"{reserve}: most reserved for one, % of the budget": round(100 * largest / _BUDGET_NUSD, 2),
        f"{reserve}: spent at the first refusal, %": round(100 * first / _BUDGET_NUSD, 2),
        f"{reserve}: spent in the end, %": round(100 * spent / _BUDGET_NUSD, 2),
    }
    if reserve == "estimate":
        figures["estimate: error of those in flight, %"] = round(100 * error / _BUDGET_NUSD, 2)
    return figures


def _cost_nusd(served: Served) -> int:
    return (served.prompt_tokens + served.tokens) * _TOKEN_NUSD
