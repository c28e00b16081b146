"""What do clients see of a server that is killed in the middle of traffic? Mixed traffic, SIGKILL and a restart."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import msgspec

from tests.prove.clients import Answer, ask, chat
from tests.prove.proof import Figures, Size
from tests.running import Stack, Upstream, running_stack


def run(seed: int, size: Size) -> Figures:
    """Kill the servers of the two lower tiers by turns, under load."""
    random = Random(seed)
    users, rounds = (24, 6) if size == "full" else (8, 2)
    answers: list[Answer] = []
    with running_stack() as stack:
        for upstream in stack.upstreams:
            _pace(upstream)
        asyncio.run(_traffic(stack, random, users, rounds, answers))
        assert stack.gateway.process.running
        assert "Traceback" not in stack.gateway.process.said()
        assert stack.gateway.all_up()
        assert all(upstream.idle() for upstream in stack.upstreams)
    endings = Counter(answer.ending for answer in answers)
    statuses = Counter(answer.status for answer in answers)
    tiers = Counter(answer.headers.get("x-tierway-tier", "none") for answer in answers)
    # The large tier lives all the time and takes any request: there is no excuse for an error status.
    assert set(statuses) == {200}, f"clients saw {dict(statuses)}"
    assert endings["silent"] == 0, f"{endings['silent']} answers were cut without a word"
    for answer in answers:
        _check(answer)
    assert tiers["large"] + tiers["medium"] > 0
    return {
        "requests": float(len(answers)),
        "kills": float(2 * rounds),
        **{f"answered by {tier}": float(tiers[tier]) for tier in ("small", "medium", "large")},
        "error events": float(endings["error"]),
        "error statuses": 0.0,
        "bad endings": 0.0,
    }


def _pace(upstream: Upstream) -> None:
    upstream.script(interval_ms=8, tokens=40)


async def _traffic(stack: Stack, random: Random, users: int, rounds: int, answers: list[Answer]) -> None:
    over = asyncio.Event()
    seeds = [random.getrandbits(32) for _ in range(users)]
    crowd = asyncio.gather(*(_user(stack.gateway.port, Random(one), over, answers) for one in seeds))
    for _ in range(rounds):
        for upstream in (stack.small, stack.medium):
            await asyncio.sleep(0.2 + random.random() * 0.4)
            upstream.kill()
            await asyncio.sleep(0.2 + random.random() * 0.6)
            # In this thread, whose end the process is bound to; the users wait for it as long as for a busy machine.
            upstream.start()
            _pace(upstream)
    over.set()
    await crowd


async def _user(port: int, random: Random, over: asyncio.Event, answers: list[Answer]) -> None:
    while not over.is_set():
        await asyncio.sleep(random.random() * 0.03)
        # A third of the answers is doubted by every tier that may doubt.
        doubtful = {"user": 'script:{"logprob": -1.2}'} if random.random() < 0.33 else {}
        answers.append(await ask(port, chat("auto", stream=random.random() < 0.6, **doubtful)))


def _check(answer: Answer) -> None:
    """Raise AssertionError for an answer that is not what its ending says."""
    if not answer.streamed:
        assert msgspec.json.decode(answer.body)["choices"][0]["finish_reason"] == "stop"
        return
    body = answer.body
    ended = body.count(b'"finish_reason":"stop"')
    assert body.count(b'"role":"assistant"') == 1
    if answer.ending == "done":
        assert (ended, body.count(b"data: [DONE]")) == (1, 1)
    else:
        assert (ended, body.count(b"[DONE]"), body.count(b'"code":"stream_broken"')) == (0, 0, 1), body[-500:]
