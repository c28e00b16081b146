"""Who asks all at once? Seats, each a key with one kind of limit, and a crowd of requests of every kind for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from tests.prove.clients import Answer, break_off, connected, read_answer
from tests.prove.limits_site import ask_for
from tests.prove.limits_upstream import Plan

QUEUED = 6
"""What the queue of the large tier lets through at a time."""


class Seat(msgspec.Struct, kw_only=True):
    """One key, what it is limited by, and how much of it is asked for."""

    key: str
    kind: str
    limit: int
    requests: int
    max_wait: str
    leaves: bool
    users: int = 0

    @property
    def strict(self) -> bool:
        return self.kind.endswith("strict")

    @property
    def measure(self) -> str:
        """What it counts. Of all kinds those with limits of use have two words."""
        return {"users": "requests", "tier": ""}.get(self.kind, self.kind.partition(" ")[0])

    def noun(self) -> dict[str, Any]:
        """Return the limit as it stands in the configuration."""
        scope = {"key": self.key} | ({"user": "each"} if self.users else {})
        noun = {"name": f"of-{self.key}", "scope": scope, "max_wait": self.max_wait}
        if self.measure == "requests":
            return noun | {"requests": {"limit": self.limit, "per": "hour"}}
        if self.measure == "concurrent":
            return noun | {"concurrent": self.limit}
        noun["reserve"] = "strict" if self.strict else "estimate"
        if self.measure == "tokens":
            return noun | {"tokens": {"limit": self.limit, "per": "hour"}}
        return noun | {"spend": {"usd": f"{self.limit / 1e9:.9f}"}}


class Asked(msgspec.Struct, kw_only=True):
    """One request of a crowd, what came of it, and whether it stayed to the end."""

    seat: Seat
    plan: Plan
    data: bytes
    begins_s: float
    leaves_after_bytes: int | None
    leaves_after_s: float | None
    reset: bool
    choices: int
    user: str | None
    answer: Answer = msgspec.field(default_factory=Answer)

    @property
    def stays(self) -> bool:
        return self.leaves_after_s is None


def seats(random: Random, requests: int) -> list[Seat]:
    """Return one seat of each kind, and one more, with so many requests together."""
    kinds = ["requests", "users", "concurrent", "tokens strict", "tokens estimate", "spend strict", "spend estimate"]
    kinds += ["tier", random.choice(("concurrent", "tokens strict", "spend strict", "requests"))]
    random.shuffle(kinds)
    amounts: dict[str, Callable[[], int]] = {
        "requests": lambda: random.randint(3, 40),
        "users": lambda: random.randint(1, 12),
        "concurrent": lambda: random.randint(1, 8),
        "tokens strict": lambda: random.randint(2000, 12_000),
        "tokens estimate": lambda: random.randint(500, 6000),
        "spend strict": lambda: random.randint(200_000, 900_000),
        "spend estimate": lambda: random.randint(300_000, 2_000_000),
        "tier": lambda: QUEUED,
    }
    return [
        Seat(
            key=f"seat{number}",
            kind=kind,
            limit=amounts[kind](),
            requests=requests // len(kinds),
            max_wait=random.choice(("0s", "1s", "5s", "5s")),
            leaves=random.random() < 0.4,
            users=random.randint(2, 5) if kind == "users" else 0,
        )
        for number, kind in enumerate(kinds)
    ]


def crowd(seat: Seat, random: Random) -> list[Asked]:
    """Return the requests of a seat."""
    return [_one(seat, number, random) for number in range(seat.requests)]


def _one(seat: Seat, number: int, random: Random) -> Asked:
    # Few different ones, so that the model has most of its answers ready.
    doubtful = random.random() < 0.2
    plan = Plan(
        tag=seat.key,
        number=number,
        tokens=random.choice((1, 8, 30, 60)),
        prompt_tokens=random.choice((5, 37, 150, 400)),
        interval_ms=random.choice((0, 1, 4)),
        delay_ms=random.choice((0, 20, 60)),
        doubt=2 if doubtful else 0.05,
    )
    fields: dict[str, Any] = {"n": random.choice((1, 1, 1, 2, 3))}
    if random.random() < 0.9:
        fields["max_tokens"] = random.choice((1, 20, 64, 64, 500))
    if random.random() < 0.5:
        fields["stream"] = True
    if fields.get("stream") and random.random() < 0.3:
        fields["stream_options"] = {"include_usage": True}
    user = f"user {random.randrange(seat.users)}" if seat.users else None
    if user is not None:
        fields["user"] = user
    leaves = seat.leaves and random.random() < 0.4
    model = "large" if seat.kind == "tier" else random.choice(("small", "auto"))
    return Asked(
        seat=seat,
        plan=plan,
        data=ask_for(seat.key, plan, model, filler=random.choice((0, 0, 600)), **fields),
        begins_s=random.random() * 0.3,
        leaves_after_bytes=random.randrange(1, 4000) if leaves and random.random() < 0.5 else None,
        leaves_after_s=random.random() * 1.5 if leaves else None,
        reset=random.random() < 0.5,
        choices=fields["n"],
        user=user,
    )


async def play(port: int, crowd: list[Asked]) -> None:
    """Send all of them, and leave where that is planned."""
    await asyncio.gather(*(_send(port, one) for one in crowd))


async def _send(port: int, one: Asked) -> None:
    await asyncio.sleep(one.begins_s)
    async with connected(port) as (reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(one.leaves_after_s or 60):
                writer.write(one.data)
                if one.leaves_after_bytes is None:
                    await read_answer(reader, one.answer)
                else:
                    await reader.readexactly(one.leaves_after_bytes)
        if not one.stays:
            break_off(writer, reset=one.reset)
