"""How long do large bodies hold up somebody else's stream? The gaps between the events of one, with and without."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

from tests.prove.clients import Answer, ask, chat, request
from tests.prove.proof import Figures, Size
from tests.running import HELLO, Stack, running_stack

_MB = 1024 * 1024
_INTERVAL_MS = 5


def run(seed: int, size: Size) -> Figures:
    """Read a stream of an event every 5 ms while bodies are posted: text, and JSON that takes longest to read."""
    events, times = (1200, 3) if size == "full" else (300, 1)
    figures: Figures = {}
    with running_stack(server={"max_body": "17MiB"}) as stack:
        stack.large.script(interval_ms=_INTERVAL_MS, tokens=events)
        figures["largest gap without, ms"] = asyncio.run(_quiet(stack))
        for name, body, status in _bodies():
            figures[f"with {name}, ms"] = asyncio.run(_beside(stack, body, status, times))
            stack.small.reset()
        assert stack.gateway.process.running
    return figures


def _bodies() -> list[tuple[str, bytes, int]]:
    """Return bodies by name, each with the status of its answer."""
    bodies = []
    for size in (1, 16):
        text = json.dumps(
            {"model": "small", "messages": [{**HELLO[0], "content": "lorem ipsum " * (size * _MB // 12)}]}
        )
        bodies.append((f"{size} MB of text", text.encode(), 200))
        head = json.dumps({"model": "small", "messages": HELLO}).encode()[:-1] + b',"vendor":['
        bodies.append((f"{size} MB of empty lists", head + b",".join([b"[]"] * (size * _MB // 3)) + b"]}", 200))
        bodies.append((f"{size} MB of bad JSON", head + b"[]," * (size * _MB // 3), 400))
    return bodies


async def _quiet(stack: Stack) -> float:
    return _largest_gap_ms(await ask(stack.gateway.port, chat("large", stream=True)))


async def _beside(stack: Stack, body: bytes, status: int, times: int) -> float:
    """Post `body` again and again while a stream is read; return the largest gap of the stream."""
    stream = asyncio.create_task(ask(stack.gateway.port, chat("large", stream=True)))
    await asyncio.sleep(0.1)
    data = request(body)
    for _ in range(times):
        # In a thread: what holds up this process would be taken for a gap.
        answered = await asyncio.to_thread(_post, stack.gateway.port, data)
        assert answered == status, answered
        if stream.done():
            break
    return _largest_gap_ms(await stream)


def _post(port: int, data: bytes) -> int:
    return asyncio.run(ask(port, data)).status


def _largest_gap_ms(answer: Answer) -> float:
    assert answer.ending == "done"
    times = answer.arrivals_s[1:]
    return round(1000 * max(after - before for before, after in pairwise(times)), 1)
