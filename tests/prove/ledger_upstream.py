"""What did the models really do, and what must it cost? An upstream that also fails, and its books, rated once more.

The rating rule is worked out here anew, with fractions: the gateway is not its own witness.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import msgspec

from loadtests.playing import Programme
from loadtests.transcript import Asked, Script
from tests.prove.limits_upstream import Metered, Plan, Served

SMALL, LARGE = "tiny-1b", "big-7b"
TIERS = {"small": SMALL, "large": LARGE}
PRICES: Mapping[str, Mapping[str, Any]] = {
    SMALL: {"input": 0.0725, "cached_input": 0.0201, "output": 0.3105},
    LARGE: {"input": 1.0005, "cached_input": 0.333333, "output": 2.5},
}
"""Dollars per million tokens; most are no whole number of nano-dollars a token, and half of one where it can be told."""

How = Literal["status", "close", "reset", "error"]
_TROUBLE = re.compile(rb"\(\(([\w-]+) (status|close|reset|error) (\d+)\)\)")
_CACHED = re.compile(rb"\(\(cached (\d+)\)\)")


class Trouble(msgspec.Struct, frozen=True):
    """How a model fails: with a status, or by `how` after so many tokens (0: before the head of its answer)."""

    model: str
    how: How
    number: int


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks of the models: a plan, how much of its prompt is cached, and who fails."""

    plan: Plan
    cached_tokens: int = 0
    troubles: tuple[Trouble, ...] = ()

    @property
    def text(self) -> str:
        """The prompt that says so."""
        troubles = "".join(f"(({one.model} {one.how} {one.number}))" for one in self.troubles)
        return f"{self.plan.text}((cached {self.cached_tokens})){troubles}"


class Troubled(Metered):
    """A metered upstream that fails where its prompt says so."""

    def programme(self, asked: Asked) -> Programme:
        programme = super().programme(asked)
        messages = bytes(asked.messages)
        changes: dict[str, Any] = {}
        for model, how, number in _TROUBLE.findall(messages):
            if model.decode() != asked.model:
                continue
            if how == b"status":
                changes["status"] = int(number)
            else:
                changes |= {"fail": how.decode(), "fail_after": int(number) or None}
        if (cached := _CACHED.search(messages)) is not None and int(cached[1]):
            changes["cached_tokens"] = int(cached[1])
        if not changes:
            return programme
        fields = msgspec.to_builtins(programme.script) | changes
        return type(programme)(msgspec.convert(fields, Script))


class Cost(NamedTuple):
    """What tokens cost, in nano-dollars: each part rounded once, half to even."""

    input_nusd: int
    cached_input_nusd: int
    output_nusd: int


def rate(model: str, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Cost:
    """Apply the price of a model."""
    price = PRICES[model]

    def part(tokens: int, name: str) -> int:
        return round(Fraction(tokens) * Fraction(str(price[name])) * 1000)

    return Cost(
        part(prompt_tokens - cached_tokens, "input"),
        part(cached_tokens, "cached_input"),
        part(completion_tokens, "output"),
    )


class Books:
    """What was served, by the number of the request and by model. A call that was sent again counts as its last."""

    def __init__(self, served: list[Served]) -> None:
        self._calls: dict[int, dict[str, list[Served]]] = {}
        for one in served:
            self._calls.setdefault(one.number, {}).setdefault(one.model, []).append(one)

    def of(self, number: int) -> dict[str, Served]:
        """Return the calls of one request, the last one of each model."""
        return {model: calls[-1] for model, calls in self._calls.get(number, {}).items()}
