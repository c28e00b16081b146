"""Are the shares of all replicas together never more than the whole?"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.accounts import LARGEST_RATE, LARGEST_SUM, Budget, Concurrency, Rate, Rolling, Rule
from policies.shares import begun_with, share_of, still_used

COUNTS = st.integers(1, 10_000)
PERIODS = st.sampled_from([1_000, 60_000, 3_600_000, 86_400_000]) | st.integers(1, 86_400_000)
RATES = st.builds(Rate, st.integers(1, LARGEST_RATE), PERIODS, st.integers(1, LARGEST_RATE))
SUMS = st.integers(1, LARGEST_SUM)
EXACT = 2**53


def all_shares(rule: Rule, count: int, used: int = 0) -> list[Rule]:
    # Ranks far from each other that cover both kinds of shares, each as often as it occurs.
    shares = (share_of(rule, count=count, rank=rank, used=used) for rank in range(count))
    return [share for share in shares if share is not None]


@given(RATES, st.integers(1, 300))
def test_rates_together_let_no_more_through_at_once_or_over_time(rule: Rate, count: int) -> None:
    shares = all_shares(rule, count)
    assert all(isinstance(share, Rate) for share in shares)
    rates = [share for share in shares if isinstance(share, Rate)]
    assert sum(share.burst for share in rates) <= rule.burst
    speed = sum((Fraction(share.limit, share.period_ms) for share in rates), Fraction(0))
    assert speed <= Fraction(rule.limit, rule.period_ms)
    if count <= rule.burst:
        assert sum(share.burst for share in rates) == rule.burst
        assert speed >= Fraction(rule.limit, rule.period_ms) * Fraction(99, 100) or rule.period_ms * count < 10_000_000


@given(RATES, COUNTS, st.none() | st.integers(0, 9_999))
def test_a_share_of_a_rate_stays_within_what_a_double_holds(rule: Rate, count: int, rank: int | None) -> None:
    share = share_of(rule, count=count, rank=rank)
    if isinstance(share, Rate):
        assert share.limit > 0
        assert share.burst * share.period_ticks < EXACT
        assert share.limit * share.period_ticks < EXACT
        assert share.tick_ms == 1 or share.period_ms % 1000 == 0 or share.period_ms == rule.period_ms


@given(SUMS, st.integers(1, 300), SUMS)
def test_sums_together_are_what_was_left(limit: int, count: int, used: int) -> None:
    for rule in (Budget(limit), Rolling(limit, 60_000)):
        shares = all_shares(rule, count, used)
        assert sum(share.limit for share in shares) == max(0, limit - used)
    assert sum(share.limit for share in all_shares(Concurrency(limit), count, used)) == limit


@given(RATES | st.builds(Budget, SUMS) | st.builds(Concurrency, SUMS), COUNTS, st.data())
def test_who_does_not_know_its_rank_takes_no_more_than_anybody(rule: Rule, count: int, data: st.DataObject) -> None:
    unknown = share_of(rule, count=count)
    known = share_of(rule, count=count, rank=data.draw(st.integers(0, count - 1)))
    if unknown is None:
        return
    assert known is not None
    assert unknown.limit <= known.limit
    if isinstance(unknown, Rate) and isinstance(known, Rate):
        assert unknown.burst <= known.burst


def test_a_share_may_be_nothing() -> None:
    assert [share_of(Concurrency(2), count=3, rank=rank) for rank in range(3)] == [Concurrency(1), Concurrency(1), None]
    assert share_of(Concurrency(2), count=3) is None
    assert share_of(Budget(100), count=2, rank=0, used=100) is None
    assert share_of(Rate(60, 60_000, 1), count=2, rank=1) is None


def test_the_only_replica_has_everything() -> None:
    for rule in (Rate(7, 1000, 3), Budget(5), Rolling(5, 60_000), Concurrency(2)):
        assert share_of(rule, count=1, rank=0) == share_of(rule, count=1) == rule


@pytest.mark.parametrize(
    ("rule", "now_ms", "left"),
    [
        (Rate(60, 60_000, 60), 0, 50),
        (Rate(60, 60_000, 60), 20_000, 30),
        (Rate(60, 60_000, 60), 90_000, 0),
        (Rate(60, 60_000, 60), -5_000, 50),
        (Budget(100), 10**12, 50),
        (Budget(100, (-1_000, 0, 5_000)), 4_999, 50),
        (Budget(100, (-1_000, 0, 5_000)), 5_000, 0),
        (Rolling(100, 60_000), 60_000, 50),
        (Rolling(100, 60_000), 62_000, 0),
        (Concurrency(100), 0, 0),
    ],
)
def test_what_was_seen_ages_as_its_rule_says(rule: Rule, now_ms: int, left: int) -> None:
    assert still_used(rule, 50, 0, now_ms) == left


@given(RATES, st.integers(0, LARGEST_RATE), COUNTS)
def test_all_replicas_together_begin_with_at_least_what_was_used(rule: Rate, used: int, count: int) -> None:
    assert begun_with(rule, used, count=count) * count >= used
