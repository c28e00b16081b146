"""Does every departure of a client free the backends? Clients that leave at random moments, and what is left open."""

from __future__ import annotations

import asyncio
import contextlib
from random import Random
from time import monotonic

from tests.prove.clients import break_off, chat, connected
from tests.prove.proof import Figures, Size
from tests.running import Stack, running_stack, wait_until

_FREE_WITHIN_S = 1.0


def run(seed: int, size: Size) -> Figures:
    """Have clients leave before the head, after some bytes, in mid-stream; with FIN and RST; whole and streamed."""
    random, clients = Random(seed), 200 if size == "full" else 40
    with running_stack() as stack:
        # Slow enough that nobody is served before having left; small is doubted half of the time.
        stack.small.script(interval_ms=15, tokens=4000, head_delay_ms=120, logprob=-3 if seed % 2 else -0.05)
        for upstream in (stack.medium, stack.large):
            upstream.script(interval_ms=15, tokens=4000, head_delay_ms=60)
        plans = [_Plan(random) for _ in range(clients)]
        left_s = asyncio.run(_all_leave(stack.gateway.port, plans))
        free = wait_until(lambda: _open(stack) == 0, _FREE_WITHIN_S)
        took_s = monotonic() - left_s
        states = [upstream.state() for upstream in stack.upstreams]
        assert free, f"{_open(stack)} requests are open {took_s:.2f} s after the last client left"
        assert took_s < _FREE_WITHIN_S + 0.5
        started, aborted = (sum(state[name] for state in states) for name in ("started", "aborted"))
        assert aborted == started, "an answer went on to its end"
        assert started >= clients / 2, "too few requests reached a backend for this to show anything"
        assert wait_until(lambda: b"tierway_open_exchanges 0\n" in stack.gateway.get("/metrics").body)
        assert stack.gateway.process.running
        assert "Traceback" not in stack.gateway.process.said()
    return {
        "clients": float(clients),
        "upstream requests": float(started),
        "open after 1 s": 0.0,
        "all free after, ms": round(1000 * took_s),
    }


class _Plan:
    """What one client does: how much of its request it sends, how long it stays and how it goes."""

    def __init__(self, random: Random) -> None:
        self.data = chat(random.choice(("auto", "small", "large")), stream=random.random() < 0.5)
        self.sent = random.randrange(len(self.data)) if random.random() < 0.1 else len(self.data)
        self.begins_s = random.random() * 0.5
        self.stays_s = random.random() * 0.8
        self.reset = random.random() < 0.5
        self.leaves_after_bytes = random.randrange(1, 3000) if random.random() < 0.3 else None


async def _all_leave(port: int, plans: list[_Plan]) -> float:
    """Play all plans; return when the last client left."""
    return max(await asyncio.gather(*(_leave(port, plan) for plan in plans)))


async def _leave(port: int, plan: _Plan) -> float:
    await asyncio.sleep(plan.begins_s)
    async with connected(port) as (reader, writer):
        writer.write(plan.data[: plan.sent])
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(plan.stays_s):
                await reader.readexactly(plan.leaves_after_bytes or 1 << 30)
        break_off(writer, reset=plan.reset)
        return monotonic()


def _open(stack: Stack) -> int:
    return sum(upstream.state()["open"] for upstream in stack.upstreams)
