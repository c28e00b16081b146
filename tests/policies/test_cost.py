"""Is every bill exact to the nano-dollar?"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import Cost, Price, cost_of, divided, most_nusd, sum_of, usd


class Used(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


tokens = st.integers(0, 10**9)
nusd_per_million = st.integers(0, 10**13)
prices = st.builds(Price, input_nusd=nusd_per_million, cached_input_nusd=nusd_per_million, output_nusd=nusd_per_million)
usages = st.builds(Used, prompt_tokens=tokens, cached_prompt_tokens=tokens, completion_tokens=tokens)


def price(input_nusd: int = 0, cached_input_nusd: int = 0, output_nusd: int = 0) -> Price:
    return Price(input_nusd=input_nusd, cached_input_nusd=cached_input_nusd, output_nusd=output_nusd)


@pytest.mark.parametrize(
    ("used_tokens", "nusd", "expected"),
    [
        (0, 10**9, 0),
        (1, 10**6, 1),
        (1, 499_999, 0),
        (1, 500_000, 0),  # a half goes to the even neighbour: down here
        (1, 500_001, 1),
        (3, 500_000, 2),  # and up here
        (5, 500_000, 2),
        (7, 500_000, 4),
        (1, 1_500_000, 2),
        (1, 2_500_000, 2),
        (1_000_000, 150_000_000, 150_000_000),  # 15 cents a million
    ],
)
def test_a_part_is_rounded_half_to_even(used_tokens: int, nusd: int, expected: int) -> None:
    assert cost_of(price(output_nusd=nusd), Used(completion_tokens=used_tokens)).output_nusd == expected


def test_every_part_is_rounded_before_they_are_added() -> None:
    used = Used(prompt_tokens=2, cached_prompt_tokens=1, completion_tokens=1)
    cost = cost_of(price(input_nusd=600_000, cached_input_nusd=600_000, output_nusd=400_000), used)
    assert cost == Cost(input_nusd=1, cached_input_nusd=1, output_nusd=0)
    assert cost.total_nusd == 2


def test_cached_tokens_are_part_of_the_prompt_and_have_their_own_price() -> None:
    used = Used(prompt_tokens=1_000_000, cached_prompt_tokens=400_000, completion_tokens=10)
    cost = cost_of(price(input_nusd=1_000_000_000, cached_input_nusd=100_000_000, output_nusd=10**6), used)
    assert cost == Cost(input_nusd=600_000_000, cached_input_nusd=40_000_000, output_nusd=10)


def test_more_cached_than_prompt_tokens_bill_the_whole_prompt_as_cached() -> None:
    used = Used(prompt_tokens=10, cached_prompt_tokens=11)
    assert cost_of(price(input_nusd=10**9, cached_input_nusd=10**6), used) == Cost(cached_input_nusd=10)


@given(prices, usages)
def test_a_cost_is_what_decimal_arithmetic_says(paid: Price, used: Used) -> None:
    def part(count: int, nusd: int) -> int:
        return int((Decimal(count) * nusd / 10**6).quantize(Decimal(1), ROUND_HALF_EVEN))

    cached_tokens = min(used.cached_prompt_tokens, used.prompt_tokens)
    assert cost_of(paid, used) == Cost(
        input_nusd=part(used.prompt_tokens - cached_tokens, paid.input_nusd),
        cached_input_nusd=part(cached_tokens, paid.cached_input_nusd),
        output_nusd=part(used.completion_tokens, paid.output_nusd),
    )


@given(prices, usages)
def test_the_total_is_the_sum_of_the_parts_and_never_negative(paid: Price, used: Used) -> None:
    cost = cost_of(paid, used)
    assert cost.total_nusd == cost.input_nusd + cost.cached_input_nusd + cost.output_nusd
    assert min(cost.input_nusd, cost.cached_input_nusd, cost.output_nusd) >= 0


@given(prices, usages, st.integers(1, 1000))
def test_more_tokens_never_cost_less(paid: Price, used: Used, more: int) -> None:
    longer = msgspec.structs.replace(used, completion_tokens=used.completion_tokens + more)
    assert cost_of(paid, longer).total_nusd >= cost_of(paid, used).total_nusd


@given(prices, usages)
def test_on_a_gpu_the_same_is_time_of_the_server(paid: Price, used: Used) -> None:
    time = cost_of(msgspec.structs.replace(paid, gpu=True), used)
    assert time == Cost(gpu_nusd=cost_of(paid, used).total_nusd)


@given(prices, usages, tokens, tokens)
def test_nothing_costs_more_than_the_most(paid: Price, used: Used, more_prompt: int, more_answer: int) -> None:
    most = most_nusd(paid, used.prompt_tokens + more_prompt, used.completion_tokens + more_answer)
    assert most >= cost_of(paid, used).total_nusd
    assert most >= cost_of(msgspec.structs.replace(paid, gpu=True), used).total_nusd


def test_both_parts_of_a_prompt_can_be_rounded_up() -> None:
    paid = price(input_nusd=500_001, cached_input_nusd=500_001)
    assert cost_of(paid, Used(prompt_tokens=2, cached_prompt_tokens=1)).total_nusd == 2 <= most_nusd(paid, 2, 0)


@given(st.lists(st.tuples(prices, usages, st.booleans())))
def test_the_costs_of_attempts_add_up_part_by_part(attempts: list[tuple[Price, Used, bool]]) -> None:
    costs = [cost_of(msgspec.structs.replace(paid, gpu=gpu), used) for paid, used, gpu in attempts]
    total = sum_of(costs)
    for part in Cost.__struct_fields__:
        assert getattr(total, part) == sum(getattr(one, part) for one in costs)
    assert total.total_nusd == sum(one.total_nusd for one in costs)
    assert sum_of([sum_of(costs[:2]), *costs[2:]]) == total


@given(st.integers(-(10**20), 10**20), st.integers(1, 10**12))
def test_a_division_is_rounded_once_half_to_even(amount: int, by: int) -> None:
    assert divided(amount, by) == round(Fraction(amount, by))


@given(st.integers(-(10**20), 10**20))
def test_a_half_goes_to_the_even_neighbour(whole: int) -> None:
    assert divided(2 * whole + 1, 2) == whole + whole % 2


@pytest.mark.parametrize(
    ("nusd", "shown"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (12_000, "0.000012"),
        (10**9, "1"),
        (100 * 10**9, "100"),
        (1_500_000_000, "1.5"),
        (10**9 + 1, "1.000000001"),
        (-1, "-0.000000001"),
        (-2_000_000_000, "-2"),
        (-1_250_000_000, "-1.25"),
        (123_456_789_012_345_678, "123456789.012345678"),
    ],
)
def test_dollars_are_written_out(nusd: int, shown: str) -> None:
    assert usd(nusd) == shown


@given(st.integers(-(10**30), 10**30))
def test_dollars_are_exact_without_an_exponent_or_a_surplus_zero(nusd: int) -> None:
    shown = usd(nusd)
    whole, _, rest = shown.removeprefix("-").partition(".")
    assert int(whole) * 10**9 + int(rest.ljust(9, "0")) == abs(nusd)
    assert shown.startswith("-") == (nusd < 0)
    assert not rest.endswith("0")
    assert len(rest) <= 9
    assert "." not in shown or rest
