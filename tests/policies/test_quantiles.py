"""Do the quantiles of recent observations say what sorting all of them would?"""

from __future__ import annotations

from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.quantiles import RecentQuantile

observations = st.lists(st.one_of(st.integers(-5, 5), st.floats(allow_nan=False)), max_size=40)


@given(observations, st.integers(1, 10), st.floats(0, 1))
def test_a_quantile_is_the_least_of_the_recent_that_enough_of_them_do_not_exceed(
    values: list[float], most: int, q: float
) -> None:
    seen = RecentQuantile(most)
    for number, value in enumerate(values, start=1):
        seen.add(value)
        recent = values[max(0, number - most) : number]
        enough = [one for one in recent if sum(other <= one for other in recent) >= q * len(recent)]
        assert seen.quantile(q) == min(enough)
        assert len(seen) == len(recent)


def test_there_is_no_quantile_of_nothing() -> None:
    assert RecentQuantile().quantile(0.5) is None


def test_the_ends_are_the_smallest_and_the_largest() -> None:
    seen = RecentQuantile(4)
    for value in (9.0, 3.0, 1.0, 4.0, 1.0):
        seen.add(value)
    assert [seen.quantile(q) for q in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 1, 3, 4]


def test_what_is_no_number_is_refused_and_changes_nothing() -> None:
    seen = RecentQuantile(2)
    seen.add(1.0)
    with pytest.raises(ValueError, match="number"):
        seen.add(nan)
    assert len(seen) == 1
    assert seen.quantile(1) == 1.0
