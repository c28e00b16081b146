"""What a request needs of every limit, before anybody is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from backends.scripted import recite
from gateway.body import Body, read_body
from gateway.counting import TokenCounter
from gateway.errors import Refusal
from gateway.sizing import Sizes, TierSize
from policies.cost import Price
from routing.ladder import Route, Rung, Seat

SMALL = Price(input_nusd=10**9, cached_input_nusd=10**9, output_nusd=2 * 10**9)
LARGE = Price(input_nusd=10**10, cached_input_nusd=10**9, output_nusd=2 * 10**10)
PRICES = {"small": SMALL, "large": LARGE}
ROUTE = Route(name="auto", rungs=(Rung("small", (Seat("s", "m-s"),), 0.8), Rung("large", (Seat("l", "m-l"),))))


class Counting:
    """A server that knows how many tokens a prompt has."""

    def __init__(self, tokens: int | None) -> None:
        self._inner = recite("m", ["Hi"])
        self.tokens = tokens
        self.asked = 0

    def open(self, call: Any) -> Any:
        return self._inner.open(call)

    async def probe(self) -> Any:
        return await self._inner.probe()

    async def count_tokens(self, _call: Any) -> int | None:
        self.asked += 1
        return self.tokens


def sizes(*, counted: int | None = None, window: Callable[[str], int | None] = lambda _: None, **large: Any) -> Sizes:
    tiers = {"small": TierSize(), "large": TierSize(**large)}
    return Sizes(tiers, TokenCounter({"s": Counting(counted), "l": Counting(counted)}), context_tokens=window)


def body(**fields: Any) -> Body:
    asked = {"model": "auto", "messages": [{"role": "user", "content": "Hello there"}], **fields}
    return read_body("chat/completions", msgspec.json.encode(asked))


def most_output(size: Sizes, **fields: Any) -> int:
    need = size.need(ROUTE, body(**fields).asked, PRICES, most=True)
    assert need.most_shown is not None
    return need.most_shown.output_tokens


def test_the_most_is_the_least_of_what_bounds_an_answer() -> None:
    assert most_output(sizes(), max_tokens=100) == 100
    assert most_output(sizes(window=lambda _: 2048), max_tokens=10_000) == 2048
    assert most_output(sizes(window=lambda _: 2048)) == 2048
    assert most_output(sizes()) == 4096
    assert most_output(sizes(max_output_tokens=50)) == 4096  # the small tier has no bound
    assert most_output(sizes(), max_tokens=2**31 - 1, n=128) < 2**53 / 10**6


def test_an_estimate_follows_recent_answers_and_never_what_was_not_asked_for() -> None:
    size, asked = sizes(), body(max_tokens=1000).asked
    assert size.need(ROUTE, asked, PRICES, most=False).estimate.output_tokens == 512
    for tokens in range(1, 101):
        size.learn(ROUTE, "m-s", asked, prompt_tokens=20, completion_tokens=tokens)
    assert size.need(ROUTE, asked, PRICES, most=False).estimate.output_tokens == 90
    assert size.need(ROUTE, body(max_tokens=30).asked, PRICES, most=False).estimate.output_tokens == 30
    assert size.need(ROUTE, body(n=4).asked, PRICES, most=False).estimate.output_tokens == 360


def test_the_bytes_of_a_prompt_bound_its_tokens() -> None:
    size = sizes()
    need = size.need(ROUTE, body(messages=[{"role": "user", "content": "x" * 10_000}]).asked, PRICES, most=True)
    assert need.most_shown is not None
    assert need.most_shown.input_tokens >= 10_000
    assert need.least.input_tokens == 0


def test_a_count_of_the_server_is_sure_both_ways() -> None:
    async def main() -> None:
        size = sizes(counted=123)
        counts = await size.count(ROUTE, body())
        need = size.need(ROUTE, body().asked, PRICES, most=True, counts=counts)
        assert need.most_shown is not None
        assert need.least.input_tokens == need.estimate.input_tokens == need.most_shown.input_tokens == 123
        of_one = size.need_of_attempt(ROUTE, "large", body().asked, LARGE, counts)
        assert of_one.most_shown is not None
        assert of_one.most_shown.input_tokens == 123
        await size.close()

    asyncio.run(main())


def test_a_prompt_that_fits_no_window_is_refused_on_an_exact_count_only() -> None:
    async def main() -> None:
        long = sizes(counted=3000, window=lambda _: 2048)
        with pytest.raises(Refusal, match="3000 tokens; the largest model that may answer reads 2048") as raised:
            await long.count(ROUTE, body())
        assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
        await sizes(counted=3000, window=lambda name: 2048 if name == "s" else 4096).count(ROUTE, body())
        await sizes(counted=3000, window=lambda name: 2048 if name == "s" else None).count(ROUTE, body())
        await long.close()

    asyncio.run(main())


def test_only_what_may_be_too_long_is_worth_counting_for_it() -> None:
    long = body(messages=[{"role": "user", "content": "x" * 20_000}]).asked
    assert sizes(window=lambda _: 2048).near_window(ROUTE, long)
    assert not sizes(window=lambda _: 200_000).near_window(ROUTE, long)
    assert not sizes().near_window(ROUTE, long)


def test_a_server_is_told_the_operators_bound_and_where_a_limit_is_strict_what_was_reserved() -> None:
    size = sizes(window=lambda _: 2048, max_output_tokens=700)

    def told(tier: str, *, strict: bool, **fields: Any) -> int | None:
        return size.most_answer_tokens(ROUTE, tier, body(**fields).asked, strict=strict)

    assert told("large", strict=False) == 700
    assert told("small", strict=False, max_tokens=5) is None
    assert told("small", strict=True, max_tokens=5) == 5
    assert told("small", strict=True) is None  # the window: the server keeps it, the prompt included
    assert told("large", strict=True, max_tokens=5) == 5
