"""Who asks while the ledger is broken? Users of every kind, all the time, and what each of them has in hand afterwards.

They run in a thread of their own, so that whoever kills and starts servers holds up none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from itertools import count
from random import Random
from time import monotonic
from typing import Any, Literal, Self

import msgspec
import uvloop

from tests.prove.clients import Answer, break_off, connected, read_answer, request
from tests.prove.ledger_upstream import LARGE, SMALL, How, Order, Trouble
from tests.prove.limits_upstream import Plan

Kind = Literal["mixed", "calm", "slow"]
"""Of a calm crowd nobody leaves and no model fails; a slow one is calm, and streams for a second."""
Leaves = Literal["never", "at_finish", "after_bytes", "after_time"]
_FINISH = re.compile(rb'"finish_reason":"')
_PATIENCE_S = 60.0


class Asked(msgspec.Struct, kw_only=True, eq=False):
    """One request and what came of it. Its `number` is its x-request-id too."""

    number: int
    key: str
    order: Order
    model: str
    stream: bool
    choices: int
    leaves: Leaves
    after: float
    """Seconds; who leaves after bytes leaves after ten thousand times as many of them."""
    reset: bool
    began_s: float = 0.0
    ended_s: float | None = None
    answer: Answer = msgspec.field(default_factory=Answer)

    @property
    def complete(self) -> bool:
        """Whether the client has the answer: to its end, or with every `finish_reason` that it waits for."""
        if self.answer.status != 200:
            return False
        if not self.stream:
            return self.answer.whole
        return self.answer.ending == "done" or len(_FINISH.findall(self.answer.body)) >= self.choices

    @property
    def data(self) -> bytes:
        """The request."""
        fields: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": self.order.text}]}
        fields |= {"stream": self.stream, "n": self.choices}
        data = request(msgspec.json.encode(fields), key=secret(self.key))
        return data.replace(b"Host:", f"X-Request-Id: {self.number}\r\nHost:".encode(), 1)


def secret(key: str) -> str:
    """The key itself of the key of that name."""
    return f"tw-secret-of-{key}"


class Crowd:
    """So many users who ask one thing after the other, wherever `port` is at that moment (None: nowhere).

    Crowds that ask at the same time count their requests from different numbers on.
    """

    def __init__(
        self,
        random: Random,
        users: int,
        keys: list[str],
        *,
        pause_s: float = 0.02,
        kind: Kind = "mixed",
        first_number: int = 0,
    ) -> None:
        self.port: int | None = None
        self.asked: list[Asked] = []
        self._seeds = [random.getrandbits(32) for _ in range(users)]
        self._keys = keys
        self._pause_s = pause_s
        self._kind = kind
        self._over = False
        self._whole = False
        self._numbers = count(first_number)
        self._thread = threading.Thread(target=lambda: uvloop.run(self._play()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let everybody finish what they have begun."""
        self._over = True
        self._thread.join(_PATIENCE_S + 10)
        assert not self._thread.is_alive(), "a user waits for ever"
        assert self._whole, "a user has stumbled"

    def answered(self, since_s: float = 0.0) -> int:
        """Return how many answers have been received since then."""
        return sum(one.complete for one in list(self.asked) if one.ended_s is not None and one.ended_s >= since_s)

    async def _play(self) -> None:
        await asyncio.gather(*(self._user(Random(seed)) for seed in self._seeds))
        self._whole = True

    async def _user(self, random: Random) -> None:
        while not self._over:
            await asyncio.sleep(random.random() * 2 * self._pause_s)
            if self.port is None:
                continue
            one = self._next(random)
            try:
                async with connected(self.port) as (reader, writer):
                    self.asked.append(one)
                    one.began_s = monotonic()
                    await _ask(reader, writer, one)
                    one.ended_s = monotonic()
            except OSError:
                one.ended_s = monotonic()  # nobody is there, or no more

    def _next(self, random: Random) -> Asked:
        number = next(self._numbers)
        leaves = random.choices(_LEAVES, (60, 15, 12, 13))[0] if self._kind == "mixed" else "never"
        return Asked(
            number=number,
            key=random.choice(self._keys),
            order=order_of(number, random, self._kind),
            model=random.choices(("auto", "small", "large"), (6, 2, 2))[0],
            stream=random.random() < 0.6 or self._kind == "slow",
            choices=random.choice((1, 1, 1, 2)),
            leaves=leaves,
            after=random.random() * 0.3,
            reset=random.random() < 0.5,
        )


_LEAVES: tuple[Leaves, ...] = ("never", "at_finish", "after_bytes", "after_time")
_HOW: tuple[How, ...] = ("status", "close", "reset", "error")


def order_of(number: int, random: Random, kind: Kind) -> Order:
    """Think of an order."""
    prompt_tokens = random.choice((5, 37, 150, 401))
    slow = kind == "slow"
    plan = Plan(
        tag="asked",
        number=number,
        tokens=40 if slow else random.choice((1, 3, 12, 40)),
        prompt_tokens=prompt_tokens,
        interval_ms=25 if slow else random.choice((0, 0, 1, 4, 15)),
        delay_ms=random.choice((0, 0, 10, 40)),
        doubt=random.choice((0.05, 0.05, 2)),
    )
    cached_tokens = random.choice((0, 0, 1, prompt_tokens // 2, prompt_tokens))
    troubles = _troubles(random) if kind == "mixed" and random.random() < 0.25 else ()
    return Order(plan=plan, cached_tokens=cached_tokens, troubles=troubles)


def _troubles(random: Random) -> tuple[Trouble, ...]:
    models = random.choice(((SMALL,), (SMALL,), (LARGE,), (SMALL, LARGE)))
    hows = [random.choice(_HOW) for _ in models]
    return tuple(
        Trouble(model, how, random.choice((429, 500, 503) if how == "status" else (0, 1, 5)))
        for model, how in zip(models, hows, strict=True)
    )


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one: Asked) -> None:
    leaves = one.leaves != "never"
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
        async with asyncio.timeout(one.after if one.leaves in ("after_time", "after_bytes") else _PATIENCE_S):
            writer.write(one.data)
            if one.leaves == "at_finish":
                await read_answer(reader, one.answer, _counting(one.choices, lambda part: len(_FINISH.findall(part))))
            elif one.leaves == "after_bytes" and one.stream:
                await read_answer(reader, one.answer, _counting(int(one.after * 10_000), len))
            elif one.leaves == "after_bytes":
                await reader.readexactly(int(one.after * 10_000))
            else:
                await read_answer(reader, one.answer)
                leaves = False
    if leaves:
        break_off(writer, reset=one.reset)


def _counting(most: int, amount: Callable[[bytes], int]) -> Callable[[bytes], bool]:
    """Return who says when there is as much in the parts of a stream."""
    seen = 0

    def enough(part: bytes) -> bool:
        nonlocal seen
        seen += amount(part)
        return seen >= most

    return enough
