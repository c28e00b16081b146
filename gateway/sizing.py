"""How large is this request? What it needs of every limit, from what can be known before anybody is asked.

Prompt tokens come from an upper bound on its bytes, and are counted where that bound comes near a limit or a context
window: a flood is not tokenized. Answer tokens are what answers of this route usually take, or the most that the
client, the operator and the context window allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import msgspec

from gateway.body import Asked, Body
from gateway.counting import Count, TokenCounter
from gateway.errors import Refusal
from policies.cost import Price
from policies.limits import Need
from policies.quantiles import RecentQuantile
from routing.envelope import Reach, bound
from routing.ladder import Route, Rung

_OUTPUT_QUANTILE = 0.9
_UNKNOWN_OUTPUT_TOKENS = 512
_MOST_OUTPUT_TOKENS = 4096
"""Where neither the client, nor the operator, nor the server says how long an answer can be."""
_LARGEST_ANSWER_TOKENS = 10_000_000
"""No answer is longer, whatever a client asks for: sums stay where a double counts exactly."""
_NEAR = 0.8


_FREE = Price(input_nusd=0, cached_input_nusd=0, output_nusd=0)
"""For those who ask for tokens alone."""

Counts = Mapping[str, Count]
"""What is known of a prompt, by tier."""
Prices = Mapping[str, Price]
"""What tokens cost, by tier."""

_UNCOUNTED: Counts = MappingProxyType({})


class TierSize(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says of a tier."""

    context_tokens: int | None = None
    max_output_tokens: int | None = None


class Sizes:
    """What is known of tiers, and learned of routes. `context_tokens` tells what a backend says of itself."""

    def __init__(
        self,
        tiers: Mapping[str, TierSize],
        counter: TokenCounter,
        context_tokens: Callable[[str], int | None],
    ) -> None:
        self._tiers = tiers
        self._counter = counter
        self._context_tokens = context_tokens
        self._outputs: dict[str, RecentQuantile] = {}

    def most_answer_tokens(self, route: Route, tier: str, asked: Asked, *, strict: bool) -> int | None:
        """Return what to limit one answer to, None where nothing has to be said.

        That is the operator's bound. Where a limit is strict it is what was reserved, because servers know other words
        for `max_tokens`; but not the context window, which they keep themselves, the prompt included.
        """
        most = self._tiers[tier].max_output_tokens
        if not strict:
            return most
        reach = [
            self._reach(route, rung, asked, None, _FREE).most_answer_tokens for rung in route.rungs if rung.tier == tier
        ]
        windows = [self._window(rung) for rung in route.rungs if rung.tier == tier]
        return most if max(reach) == windows[0] else max(reach)

    def prompt_estimate(self, model: str, asked: Asked) -> int:
        """Return how many tokens the prompt most likely has."""
        return self._counter.estimate(model, asked)

    def window(self, tier: str, backend: str) -> int | None:
        """Return the context window of a backend's model; None where nobody says."""
        return self._tiers[tier].context_tokens or self._context_tokens(backend)

    def need(self, route: Route, asked: Asked, prices: Prices, *, most: bool, counts: Counts = _UNCOUNTED) -> Need:
        """Return what a request on `route` needs at the `prices` of its tiers; with `most` also the most.

        From its bytes, for tiers of which no count is given.
        """
        reach = [
            self._reach(route, rung, asked, counts.get(rung.tier), prices[rung.tier], most=most) for rung in route.rungs
        ]
        return bound(reach, choices=asked.sequences, most=most)

    def need_of_attempt(self, route: Route, tier: str, asked: Asked, price: Price, counts: Counts = _UNCOUNTED) -> Need:
        """Return what an attempt on one tier needs, and the most."""
        reach = [self._reach(route, rung, asked, counts.get(tier), price) for rung in route.rungs if rung.tier == tier]
        return bound(reach, choices=asked.sequences)

    async def count(self, route: Route, body: Body) -> Counts:
        """Count the prompt for every tier, as well as can be. Raises `Refusal` where it fits none of them."""
        asked = body.asked
        found = await asyncio.gather(
            *(self._counter.exact(rung.seats[0].backend, rung.seats[0].model, body) for rung in route.rungs)
        )
        counts = {rung.tier: count for rung, count in zip(route.rungs, found, strict=True) if count is not None}
        windows = {rung.tier: self._window(rung) for rung in route.rungs}
        if all(
            window is not None and (count := counts.get(tier)) is not None and count.exact and count.tokens >= window
            for tier, window in windows.items()
        ):
            largest = max(window for window in windows.values() if window is not None)
            fewest = min(count.tokens for count in counts.values())
            raise Refusal(
                "context_length_exceeded",
                f"The prompt has {fewest} tokens; the largest model that may answer reads {largest}, answer included.",
                param="messages" if asked.endpoint == "chat/completions" else "prompt",
            )
        return counts

    def near_window(self, route: Route, asked: Asked) -> bool:
        """Whether a prompt may be too long for every tier, so that it is worth counting."""
        windows = [self._window(rung) for rung in route.rungs]
        if not all(windows):
            return False
        tokens = self._counter.bound(route.rungs[-1].seats[0].model, asked)
        return tokens > _NEAR * max(window for window in windows if window is not None)

    def learn(self, route: Route, model: str, asked: Asked, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Learn from what a server reported."""
        self._counter.learn(model, asked, prompt_tokens)
        outputs = self._outputs.get(route.name)
        if outputs is None:
            outputs = self._outputs[route.name] = RecentQuantile()
        outputs.add(completion_tokens / asked.choices)

    async def open(self, models: Iterable[str]) -> None:
        """Make ready to count for `models`."""
        await self._counter.open(models)

    async def close(self) -> None:
        """Count no more."""
        await self._counter.close()

    def _reach(
        self, route: Route, rung: Rung, asked: Asked, count: Count | None, price: Price, *, most: bool = True
    ) -> Reach:
        tier = self._tiers[rung.tier]
        model = rung.seats[0].model
        bounds = [one for one in (tier.max_output_tokens, self._window(rung)) if one is not None]
        fallback = _MOST_OUTPUT_TOKENS if asked.max_tokens is None else asked.max_tokens
        longest = min(asked.limited_to(min(bounds, default=fallback)), _LARGEST_ANSWER_TOKENS)
        outputs = self._outputs.get(route.name)
        usual = None if outputs is None else outputs.quantile(_OUTPUT_QUANTILE)
        likely = _UNKNOWN_OUTPUT_TOKENS if usual is None else max(1, round(usual))
        if count is not None and count.exact:
            least_tokens = prompt_tokens = most_prompt_tokens = count.tokens
        else:
            least_tokens = 0
            prompt_tokens = self._counter.bound(model, asked) if count is None else count.tokens
            most_prompt_tokens = self._counter.bound(model, asked, hard=True) if most else prompt_tokens
        return Reach(
            tier=rung.tier,
            price=price,
            least_prompt_tokens=least_tokens,
            prompt_tokens=prompt_tokens,
            most_prompt_tokens=most_prompt_tokens,
            answer_tokens=min(longest, likely),
            most_answer_tokens=longest,
        )

    def _window(self, rung: Rung) -> int | None:
        configured = self._tiers[rung.tier].context_tokens
        if configured is not None:
            return configured
        known = [self._context_tokens(seat.backend) for seat in rung.seats]
        return max((one for one in known if one is not None), default=None) if all(known) else None
