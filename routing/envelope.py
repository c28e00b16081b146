"""What can this request come to? The tiers within reach and their prices in, tokens and nano-dollars out.

The estimate is what a reservation usually holds: the prompt and a likely answer, at the price of the dearest tier. The
most is what cannot be passed: every tier on the way answers at full length.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from policies.cost import Price, most_nusd
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


def bound(reach: Sequence[Reach], *, choices: int, most: bool = True) -> Need:
    """Return what to reserve for a request that may climb `reach`, cheapest tier first, for `choices` answers.

    Without `most` only the estimate is made: nobody wants to know the most where no limit is strict.
    """
    estimate = _largest([_amounts(one.price, one.prompt_tokens, choices * one.answer_tokens) for one in reach])
    # Cached tokens may cost nothing, so no spending is sure.
    least = Amounts(input_tokens=min([one.least_prompt_tokens for one in reach]))
    if not most:
        return Need(least=least, estimate=estimate)
    all_most = [_amounts(one.price, one.most_prompt_tokens, choices * one.most_answer_tokens) for one in reach]
    return Need(least=least, estimate=estimate, most_shown=_largest(all_most), most_of_all=_sum(all_most))


def _amounts(price: Price, prompt_tokens: int, completion_tokens: int) -> Amounts:
    return Amounts(
        input_tokens=prompt_tokens,
        output_tokens=completion_tokens,
        spend_nusd=most_nusd(price, prompt_tokens, completion_tokens),
    )


def _largest(amounts: Sequence[Amounts]) -> Amounts:
    if len(amounts) == 1:
        return amounts[0]
    return Amounts(
        input_tokens=max([one.input_tokens for one in amounts]),
        output_tokens=max([one.output_tokens for one in amounts]),
        spend_nusd=max([one.spend_nusd for one in amounts]),
    )


def _sum(amounts: Sequence[Amounts]) -> Amounts:
    return Amounts(
        input_tokens=sum(one.input_tokens for one in amounts),
        output_tokens=sum(one.output_tokens for one in amounts),
        spend_nusd=sum(one.spend_nusd for one in amounts),
    )
