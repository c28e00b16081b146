"""What becomes of what a worker held that is killed? Its lease gives it back, and what its streams used stays counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import msgspec
import uvloop

from tests.prove.clients import Answer, ask, look
from tests.prove.limits_site import Site, ask_for, cost_nusd, running_site, secret, shown
from tests.prove.limits_upstream import Plan
from tests.prove.proof import Figures, Size
from tests.running import descendants

_FORGOTTEN = 1 / 3 + 1 / 6
"""Part of the lease: it is renewed after a third of it, at a look that comes every sixth."""
_TOKENS_A_DAY = 1_000_000
_LATE_S = 0.5
"""For a busy machine."""
_KEY = "streamer"
_INTERVAL_S = 0.02
_PROMPT_TOKENS = 40
_OPEN = 12
_LIMITS: list[dict[str, Any]] = [
    {
        "name": "all",
        "scope": {"key": _KEY},
        "concurrent": _OPEN,
        "tokens": {"limit": _TOKENS_A_DAY, "per": "day"},
        "spend": {"usd": 10},
        "max_wait": "0s",
    }
]


def run(seed: int, size: Size) -> Figures:
    """Open streams on every worker, kill one of them without a word, and watch what it held."""
    random = Random(seed)
    workers, lease_s = (4, 2.0) if size == "full" else (2, 1.0)
    state = {"lease": f"{lease_s:g}s", "timeout": "2s"}
    with running_site("--workers", str(workers), keys=[_KEY], limits=_LIMITS, state=state) as site:
        return uvloop.run(_play(site, random, lease_s))


async def _play(site: Site, random: Random, lease_s: float) -> Figures:
    plan = Plan(
        tag=_KEY,
        tokens=int(3 * lease_s / _INTERVAL_S),
        prompt_tokens=_PROMPT_TOKENS,
        interval_ms=1000 * _INTERVAL_S,
    )
    data = ask_for(_KEY, plan, stream=True)
    began_s = monotonic()
    streams = [asyncio.create_task(ask(site.gateway.port, data)) for _ in range(_OPEN)]
    while site.upstream.open(_KEY) < _OPEN:
        assert monotonic() < began_s + 5, [stream.result() for stream in streams if stream.done()]
        await asyncio.sleep(0.01)
    # Later than the first renewal, at no particular time after one.
    await asyncio.sleep(lease_s * (_FORGOTTEN + random.random() / 2))
    assert await _open(site) == _OPEN
    workers = len(_workers(site))
    killed_s = monotonic()
    os.kill(random.choice(_workers(site)), signal.SIGKILL)
    # The kernel breaks its connections; the others go on.
    await asyncio.sleep(0.2)
    left = site.upstream.open(_KEY)
    while (held := await _open(site)) > left:
        late_s = monotonic() - killed_s - lease_s
        assert late_s < _LATE_S, f"{held} are held and {left} open, {late_s:.2f} s after the end of the lease"
        await asyncio.sleep(0.02)
    freed_s = monotonic() - killed_s
    assert held == left, f"{held} are held, but {left} are open: what others hold was given back"
    answers = await asyncio.gather(*streams)
    ended_s = monotonic() - began_s
    figures = _compare(site, answers, lost=_OPEN - left, took_s=ended_s, lease_s=lease_s)
    await _use_again(site, workers)
    return {"lease, s": lease_s, "given back after, s": round(freed_s, 2), **figures}


def _compare(site: Site, answers: Sequence[Answer], *, lost: int, took_s: float, lease_s: float) -> Figures:
    """See that what was generated is counted, but for what the last renewals could not know."""
    whole = sum(answer.ending == "done" for answer in answers)
    assert whole == _OPEN - lost, f"{whole} streams came to their end, {lost} were lost"
    assert site.at_rest([_KEY])
    served = site.upstream.of(_KEY)
    cut = [one for one in served if not one.whole]
    assert len(cut) == lost
    unknown = sum(min(one.tokens, int((_FORGOTTEN * lease_s + _LATE_S) / _INTERVAL_S)) for one in cut)
    generated = sum(one.prompt_tokens + one.tokens for one in served)
    drained = ceil(_TOKENS_A_DAY * took_s / 86_400)
    used = next(one.used for one in site.limits(_KEY) if one.measure == "tokens")
    assert generated - unknown - drained <= used <= generated, f"{used} counted of {generated}, {unknown} unknown"
    cost = sum(map(cost_nusd, served))
    spent = next(one.used for one in site.limits(_KEY) if one.measure == "spend")
    lost_cost = cost - spent
    assert 0 <= lost_cost <= cost_nusd(msgspec.structs.replace(served[0], prompt_tokens=0, tokens=unknown)) + lost
    return {
        "streams": float(_OPEN),
        "of the killed worker": float(lost),
        "their tokens": float(sum(one.tokens for one in cut)),
        "of these not counted, %": round(100 * lost_cost / max(1, sum(map(cost_nusd, cut))), 1),
    }


async def _use_again(site: Site, workers: int) -> None:
    """See that every slot can be used again, and no more than there are."""
    await _all_answer(site, workers)
    again = [ask_for(_KEY, Plan(tag="again", number=n, tokens=4, delay_ms=1000)) for n in range(_OPEN + 4)]
    answers = await asyncio.gather(*(ask(site.gateway.port, one) for one in again))
    assert sorted(answer.status for answer in answers) == [200] * _OPEN + [429] * 4
    assert site.upstream.peaks["again"] == _OPEN
    assert site.at_rest([_KEY])
    site.sound()


async def _all_answer(site: Site, workers: int) -> None:
    """Wait until the successor of the dead one takes its part of the connections."""
    question = look("/healthz", secret(_KEY))
    until_s = monotonic() + 20
    while True:
        assert monotonic() < until_s, f"{len(_workers(site))} of {workers} workers are there"
        asked = [asyncio.create_task(ask(site.gateway.port, question)) for _ in range(8 * workers)]
        _, late = await asyncio.wait(asked, timeout=1)
        for task in late:
            task.cancel()
        if not late and len(_workers(site)) == workers:
            return


async def _open(site: Site) -> int:
    """Return how many slots are taken, as any worker that answers says."""
    question = look("/v1/limits", secret(_KEY))
    while True:
        with contextlib.suppress(TimeoutError):
            # A connection that the dead worker never accepted waits for its successor.
            async with asyncio.timeout(0.1):
                answer = await ask(site.gateway.port, question)
                if answer.whole:
                    return next(one.reserved for one in shown(answer.body) if one.measure == "concurrent")


def _workers(site: Site) -> list[int]:
    return [pid for pid in descendants(site.gateway.pid) if b"gateway.serve" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
