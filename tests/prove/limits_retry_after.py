"""Does it help to wait as long as one is told to? Clients that use a limit up, wait to the second, and ask again."""

from __future__ import annotations

import asyncio
from random import Random
from time import monotonic
from typing import Any

import uvloop

from tests.prove.clients import Answer, ask
from tests.prove.limits_site import Site, ask_for, running_site
from tests.prove.limits_upstream import Plan
from tests.prove.proof import Figures, Size

_CALLERS = 20
_KINDS: tuple[dict[str, Any], ...] = (
    {"requests": {"limit": 1, "per": "second"}},
    {"requests": {"limit": 40, "per": "minute", "burst": 3}},
    {"tokens": {"limit": 90, "per": "second", "burst": 180}},
    {"input_tokens": {"limit": 6000, "per": "minute", "burst": 160}},
    {"output_tokens": {"limit": 1500, "per": "minute", "burst": 40}},
)
_LONGEST_S = 30


def run(seed: int, size: Size) -> Figures:
    """Play every caller at once, each with a limit and a key of its own; `size` makes no difference."""
    random = Random(seed)
    callers = {f"caller{number}": _KINDS[number % len(_KINDS)] for number in range(_CALLERS)}
    limits = [{"name": f"of-{key}", "scope": {"key": key}, **kind} for key, kind in callers.items()]
    keys = list(callers)
    with running_site("--workers", "2", keys=keys, limits=limits, state={"timeout": "2s"}) as site:
        waits = uvloop.run(_all(site, keys, random))
        site.sound()
    return {
        "refused callers": float(len(waits)),
        "admitted after exactly that wait": float(len(waits)),
        "shortest wait, s": float(min(waits)),
        "longest wait, s": float(max(waits)),
    }


async def _all(site: Site, keys: list[str], random: Random) -> list[int]:
    return list(await asyncio.gather(*(_wait_once(site, key, Random(random.random())) for key in keys)))


async def _wait_once(site: Site, key: str, random: Random) -> int:
    """Return how long it was told to wait, having waited so long and been let in."""
    tokens = random.choice((3, 8, 20))
    data = ask_for(key, Plan(tag=key, tokens=tokens, prompt_tokens=37), max_tokens=30)
    refusal = await _use_up(site, key, data)
    heard_s = monotonic()
    assert refusal.status == 429, refusal
    told_s = int(refusal.headers["retry-after"])
    assert 1 <= told_s <= _LONGEST_S, refusal.headers
    assert b"estimate" not in refusal.body, refusal.body
    await asyncio.sleep(heard_s + told_s - monotonic())
    again = await ask(site.gateway.port, data)
    assert again.status == 200, f"{key} waited {told_s} s: {again}"
    return told_s


async def _use_up(site: Site, key: str, data: bytes) -> Answer:
    for _ in range(100):
        answer = await ask(site.gateway.port, data)
        if answer.status != 200:
            return answer
    raise AssertionError(f"{key} is never refused")
