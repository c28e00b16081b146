"""Is each part of a budget passed once, at the amount that it is?"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.accounts import LARGEST_SUM, Budget, Rolling
from policies.thresholds import Window, amount_at, next_amount, passed, window_of

HOUR_MS = 3_600_000
PARTS = st.lists(st.integers(1, 1_000_000).map(lambda part: part / 1_000_000), max_size=6)
LIMITS = st.integers(1, LARGEST_SUM)


@pytest.mark.parametrize(
    ("used", "part"), [(0, None), (49, None), (50, 0.5), (79, 0.5), (80, 0.8), (99, 0.8), (100, 1.0), (250, 1.0)]
)
def test_the_largest_part_that_is_passed_is_told(used: int, part: float | None) -> None:
    assert passed((0.5, 0.8, 1.0), 100, used) == part


def test_a_part_of_an_odd_limit_is_not_passed_a_nano_dollar_early() -> None:
    assert amount_at(0.5, 3) == 2
    assert amount_at(0.1, 9_000_000_000_000_001) == 900_000_000_000_001


def test_of_a_budget_of_nothing_nothing_is_passed_while_nothing_is_used() -> None:
    assert passed((0.5, 1.0), 0, 0) is None
    assert passed((0.5, 1.0), 0, 1) == 1.0


@given(PARTS, LIMITS, st.data())
def test_until_the_next_amount_nothing_else_is_passed_and_with_it_something_is(
    parts: list[float], limit: int, data: st.DataObject
) -> None:
    used = data.draw(st.integers(0, 2 * limit))
    now, due = passed(parts, limit, used), next_amount(parts, limit, used)
    if due is None:
        assert passed(parts, limit, LARGEST_SUM * 2) == now
        return
    assert due > used
    between = data.draw(st.integers(used, due - 1))
    assert passed(parts, limit, between) == now
    later = passed(parts, limit, due)
    assert later is not None
    assert now is None or later > now
    assert due >= Fraction(round(later * 1_000_000), 1_000_000) * limit


def test_the_window_of_a_calendar_budget_is_the_one_around_now() -> None:
    rule = Budget(100, (0, 10, 20, 30))
    assert [window_of(rule, now) for now in (9, 10, 19, 30)] == [
        Window(0, 10),
        Window(10, 20),
        Window(10, 20),
        Window(30, None),
    ]
    assert window_of(Budget(100), 12345) == Window(0, None)


def test_a_rolling_sum_is_told_once_a_period() -> None:
    rule = Rolling(100, HOUR_MS)
    assert window_of(rule, 2 * HOUR_MS + 5) == Window(2 * HOUR_MS, 3 * HOUR_MS)
    assert window_of(rule, 3 * HOUR_MS) == Window(3 * HOUR_MS, 4 * HOUR_MS)
