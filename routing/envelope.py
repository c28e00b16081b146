"""What can this request come to? The tiers within reach and their prices in, tokens and nano-dollars out.

The estimate is what a reservation usually holds: the prompt and a likely answer, at the price of the dearest tier. The
most is what cannot be passed: every tier on the way answers at full length.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from policies.cost import Price, cost_of
from policies.limits import Amounts, Need


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """One tier within reach: its price, and the tokens of the prompt and of one choice, likely and at most.

    `least_prompt_tokens` is more than 0 where they were counted.
    """

    tier: str
    price: Price
    least_prompt_tokens: int = 0
    prompt_tokens: int
    most_prompt_tokens: int
    answer_tokens: int
    most_answer_tokens: int


class _Tokens(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0


def bound(reach: Sequence[Reach], *, choices: int) -> Need:
    """Return what to reserve for a request that may climb `reach`, cheapest tier first, for `choices` answers."""
    likely = [_amounts(one.price, one.prompt_tokens, choices * one.answer_tokens) for one in reach]
    most = [_most(one, choices) for one in reach]
    least = [_amounts(one.price, one.least_prompt_tokens, 0) for one in reach]
    return Need(least=_smallest(least), estimate=_largest(likely), most_shown=_largest(most), most_of_all=_sum(most))


def _amounts(price: Price, prompt_tokens: int, completion_tokens: int) -> Amounts:
    # What a cache would save is not counted on, and a cached token can be the dearer one.
    dearest = msgspec.structs.replace(price, input_nusd=max(price.input_nusd, price.cached_input_nusd))
    return Amounts(
        input_tokens=prompt_tokens,
        output_tokens=completion_tokens,
        spend_nusd=cost_of(dearest, _Tokens(prompt_tokens, completion_tokens)).total_nusd,
    )


def _most(reach: Reach, choices: int) -> Amounts:
    amounts = _amounts(reach.price, reach.most_prompt_tokens, choices * reach.most_answer_tokens)
    # Cached and other tokens of a prompt are billed apart, and both parts may be rounded up.
    return msgspec.structs.replace(amounts, spend_nusd=amounts.spend_nusd + 1)


def _largest(amounts: Sequence[Amounts]) -> Amounts:
    return Amounts(
        input_tokens=max(one.input_tokens for one in amounts),
        output_tokens=max(one.output_tokens for one in amounts),
        spend_nusd=max(one.spend_nusd for one in amounts),
    )


def _smallest(amounts: Sequence[Amounts]) -> Amounts:
    # Cached tokens may cost nothing, so no spending is sure.
    return Amounts(input_tokens=min(one.input_tokens for one in amounts))


def _sum(amounts: Sequence[Amounts]) -> Amounts:
    return Amounts(
        input_tokens=sum(one.input_tokens for one in amounts),
        output_tokens=sum(one.output_tokens for one in amounts),
        spend_nusd=sum(one.spend_nusd for one in amounts),
    )
