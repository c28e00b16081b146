"""What a request can come to."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import Price, cost_of
from policies.limits import Amounts
from routing.envelope import Reach, bound


class Tokens(msgspec.Struct, frozen=True):
    """What an attempt used."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


SMALL = Price(input_nusd=20_000_000, cached_input_nusd=20_000_000, output_nusd=40_000_000)
LARGE = Price(input_nusd=500_000_000, cached_input_nusd=50_000_000, output_nusd=1_000_000_000)


def reach(price: Price, prompt: int = 10, most_prompt: int = 100, answer: int = 20, most_answer: int = 200) -> Reach:
    return Reach(
        tier="t",
        price=price,
        prompt_tokens=prompt,
        most_prompt_tokens=most_prompt,
        answer_tokens=answer,
        most_answer_tokens=most_answer,
    )


def test_an_estimate_is_the_dearest_tiers() -> None:
    need = bound([reach(SMALL), reach(LARGE)], choices=1)
    assert need.estimate == Amounts(input_tokens=10, output_tokens=20, spend_nusd=5_000 + 20_000 + 1)


def test_the_most_is_every_tier_at_full_length() -> None:
    need = bound([reach(SMALL), reach(LARGE)], choices=1)
    assert need.most_shown == Amounts(input_tokens=100, output_tokens=200, spend_nusd=250_001)
    assert need.most_of_all == Amounts(input_tokens=200, output_tokens=400, spend_nusd=250_001 + 10_001)


def test_choices_multiply_the_answer_and_not_the_prompt() -> None:
    need = bound([reach(SMALL)], choices=3)
    assert (need.estimate.input_tokens, need.estimate.output_tokens) == (10, 60)
    assert need.most_shown is not None
    assert (need.most_shown.input_tokens, need.most_shown.output_tokens) == (100, 600)


def test_a_cached_token_that_is_dearer_is_reckoned_with() -> None:
    odd = Price(input_nusd=1_000_000, cached_input_nusd=3_000_000, output_nusd=0)
    assert bound([reach(odd)], choices=1).estimate.spend_nusd == 31


_TOKENS = st.integers(0, 10**6)
_PRICES = st.builds(Price, input_nusd=_TOKENS, cached_input_nusd=_TOKENS, output_nusd=_TOKENS)


@given(st.lists(st.tuples(_PRICES, _TOKENS, _TOKENS, st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4))
def test_no_climb_costs_more_than_the_most(
    rungs: list[tuple[Price, int, int, float, float]],
) -> None:
    need = bound(
        [reach(price, most_prompt=prompt, most_answer=answer) for price, prompt, answer, _, _ in rungs], choices=1
    )
    spent = sum(
        cost_of(price, Tokens(int(prompt * used), int(prompt * used * cached), answer)).total_nusd
        for price, prompt, answer, used, cached in rungs
    )
    assert need.most_of_all is not None
    assert spent <= need.most_of_all.spend_nusd


def test_the_most_is_only_reckoned_where_it_is_wanted() -> None:
    need = bound([reach(SMALL)], choices=1, most=False)
    assert (need.most_shown, need.most_of_all) == (None, None)
    assert need.estimate == bound([reach(SMALL)], choices=1).estimate
