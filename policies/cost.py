"""What does a call cost? Tokens and a price in, integer nano-dollars out.

Prices are integer nano-dollars per *million* tokens, because real price lists have fractions of a nano-dollar per
token. Each part of a cost is rounded once, half to even; after that money only adds up, and adds up exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

_MILLION = 1_000_000
_NUSD_PER_USD = 1_000_000_000


class Usage(Protocol):
    """Anything that can be billed. `prompt_tokens` includes `cached_prompt_tokens`.

    No count is negative: what a server reports is looked at where it is read, and where it cannot be true tokens are
    counted in its place.
    """

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Nano-dollars per million tokens. `version` names this very price in the ledger.

    With `gpu` they are provisional: a server that costs by the hour, over the work it has lately done
    (`policies/gpu.py`), and what they come to is time of that server.
    """

    input_nusd: int
    cached_input_nusd: int
    output_nusd: int
    version: str = ""
    gpu: bool = False


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a cost, in nano-dollars."""

    input_nusd: int = 0
    cached_input_nusd: int = 0
    output_nusd: int = 0
    gpu_nusd: int = 0

    @property
    def total_nusd(self) -> int:
        """The sum of the parts."""
        return self.input_nusd + self.cached_input_nusd + self.output_nusd + self.gpu_nusd


def cost_of(price: Price, usage: Usage) -> Cost:
    """Bill `usage` at `price`. More cached than prompt tokens is a server's slip: all of the prompt was cached then."""
    cached_tokens = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    input_nusd = _part(usage.prompt_tokens - cached_tokens, price.input_nusd)
    cached_input_nusd = _part(cached_tokens, price.cached_input_nusd)
    output_nusd = _part(usage.completion_tokens, price.output_nusd)
    if price.gpu:
        return Cost(gpu_nusd=input_nusd + cached_input_nusd + output_nusd)
    return Cost(input_nusd=input_nusd, cached_input_nusd=cached_input_nusd, output_nusd=output_nusd)


def most_nusd(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    """Return the most that so many tokens can cost, however many of the prompt's are cached."""
    # A cached token can be the dearer one, and the two parts of a prompt may both be rounded up.
    dearest_nusd = max(price.input_nusd, price.cached_input_nusd)
    return _part(prompt_tokens, dearest_nusd) + _part(completion_tokens, price.output_nusd) + 1


def sum_of(costs: Iterable[Cost]) -> Cost:
    """Add costs up, part by part. Exact: every part was rounded before."""
    costs = tuple(costs)
    return Cost(
        input_nusd=sum(one.input_nusd for one in costs),
        cached_input_nusd=sum(one.cached_input_nusd for one in costs),
        output_nusd=sum(one.output_nusd for one in costs),
        gpu_nusd=sum(one.gpu_nusd for one in costs),
    )


def divided(amount: int, by: int) -> int:
    """Divide by a positive number and round once, half to even: `amount / by` as the nearest integer."""
    whole, rest = divmod(amount, by)
    twice = 2 * rest
    return whole + (twice > by or (twice == by and whole % 2 == 1))


def _part(tokens: int, nusd_per_million: int) -> int:
    return divided(tokens * nusd_per_million, _MILLION)


def usd(nusd: int) -> str:
    """Nano-dollars as a decimal number of dollars, exact and without an exponent: `0.000012`."""
    sign, nusd = ("-", -nusd) if nusd < 0 else ("", nusd)
    dollars, rest = divmod(nusd, _NUSD_PER_USD)
    return f"{sign}{dollars}.{rest:09d}".rstrip("0").rstrip(".") if rest else f"{sign}{dollars}"
