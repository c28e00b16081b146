"""Is the arithmetic of every rule exact, at every boundary?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.accounts import (
    EMPTY,
    LARGEST_RATE,
    LARGEST_SUM,
    SLOTS,
    Account,
    Budget,
    Concurrency,
    Rate,
    Rolling,
    Rule,
    Short,
    Standing,
    correct,
    hold,
    idle_at_ms,
    room,
    standing,
    take,
)

NOW = 1_800_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000

periods = st.sampled_from([1000, MINUTE, HOUR, DAY])
rates = st.builds(Rate, st.integers(1, LARGEST_RATE), periods, st.integers(1, LARGEST_RATE))
small_rates = st.builds(Rate, st.integers(1, 50), periods, st.integers(1, 50))
budgets = st.builds(
    lambda limit, first, lengths: Budget(limit, tuple(NOW + first + sum(lengths[:i]) for i in range(len(lengths)))),
    st.integers(1, 1000),
    st.integers(-DAY, 1000),
    st.lists(st.integers(1, DAY), max_size=5),
)
rollings = st.builds(Rolling, st.integers(1, 1000), st.sampled_from([MINUTE, HOUR, DAY, 30 * DAY, 7777]))
concurrencies = st.builds(Concurrency, st.integers(1, 1000))
rules: st.SearchStrategy[Rule] = rates | budgets | rollings | concurrencies
# Units, and the milliseconds that pass before they are taken: mostly forward.
takes = st.lists(st.tuples(st.integers(0, 100), st.integers(-2000, DAY) | st.integers(0, 100)), max_size=30)


def filled(rule: Rule, what: list[tuple[int, int]], account: Account = EMPTY) -> tuple[Account, int]:
    now = NOW
    for units, passed in what:
        now += passed
        account = take(account, rule, units, now)
    return account, now


def used(account: Account, rule: Rule, now: int) -> int:
    return standing(account, rule, now).used


def admits(account: Account, rule: Rule, units: int, now: int) -> bool:
    return room(account, rule, units, now, 0) is None


# -- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Rate(10, MINUTE, 10), Budget(10), Rolling(10, HOUR), Concurrency(10)])
def test_what_fits_is_the_limit_and_not_one_more(rule: Rule) -> None:
    assert admits(EMPTY, rule, 10, NOW)
    assert room(EMPTY, rule, 11, NOW, 3) == Short(3, "never", -1)
    held = hold(EMPTY, 4)
    assert admits(held, rule, 6, NOW)
    short = room(held, rule, 7, NOW, 1)
    assert short is not None
    assert short.why == "reserved"


@pytest.mark.parametrize("rule", [Rate(10, MINUTE, 10), Budget(10), Rolling(10, HOUR)])
def test_used_and_reserved_stand_in_the_way_together(rule: Rule) -> None:
    account = take(hold(EMPTY, 4), rule, 5, NOW)
    assert admits(account, rule, 1, NOW)
    assert room(account, rule, 2, NOW, 0) is not None
    assert standing(account, rule, NOW).used == 5
    assert standing(account, rule, NOW).reserved == 4


@pytest.mark.parametrize("rule", [Rate(10, MINUTE, 10), Budget(10), Rolling(10, HOUR)])
def test_nothing_always_fits_even_where_too_much_was_used(rule: Rule) -> None:
    account = take(EMPTY, rule, 1000, NOW)
    assert admits(account, rule, 0, NOW)
    assert not admits(account, rule, 1, NOW)


@given(rules, takes, st.integers(0, 10**9), st.integers(1, 10**9))
def test_why_says_what_is_in_the_way(rule: Rule, what: list[tuple[int, int]], reserved: int, units: int) -> None:
    account, now = filled(rule, what)
    short = room(hold(account, reserved), rule, units, now, 0)
    most = rule.burst if isinstance(rule, Rate) else rule.limit
    if short is None:
        assert admits(account, rule, units, now)
    elif short.why == "never":
        assert units > most
    else:
        assert units <= most
        assert (short.why == "reserved") == admits(account, rule, units, now)


# -- waits ------------------------------------------------------------------------------------------------------------


@given(rules, takes, st.integers(0, 1000), st.integers(1, 1000))
def test_a_wait_is_the_shortest_that_helps(rule: Rule, what: list[tuple[int, int]], reserved: int, units: int) -> None:
    account, now = filled(rule, what)
    # For a `Rate` the promise is about reserved amounts being used now.
    account = take(account, rule, reserved, now) if isinstance(rule, Rate) else hold(account, reserved)
    short = room(account, rule, units, now, 0)
    if short is not None and short.wait_ms >= 0:
        assert short.wait_ms > 0
        assert not admits(account, rule, units, now + short.wait_ms - 1)
        assert admits(account, rule, units, now + short.wait_ms)


@given(rates, takes, st.integers(0, LARGEST_RATE), st.integers(1, LARGEST_RATE))
def test_a_rate_waits_as_if_what_is_reserved_was_used_now(
    rule: Rate, what: list[tuple[int, int]], reserved: int, units: int
) -> None:
    account, now = filled(rule, what)
    short = room(hold(account, reserved), rule, units, now, 0)
    as_used = room(take(account, rule, reserved, now), rule, units, now, 0)
    assert (short and short.wait_ms) == (as_used and as_used.wait_ms)


@given(budgets | rollings, takes, st.integers(0, 1000), st.integers(1, 1000))
def test_where_no_wait_is_known_none_helps(
    rule: Budget | Rolling, what: list[tuple[int, int]], reserved: int, units: int
) -> None:
    account, now = filled(rule, what)
    account = hold(account, reserved)
    short = room(account, rule, units, now, 0)
    if short is not None and short.wait_ms == -1:
        assert not admits(account, rule, units, now + 100 * DAY)


def test_a_rate_by_the_second_lets_one_in_when_its_tick_has_come() -> None:
    rule = Rate(1, DAY, 1)
    account = take(EMPTY, rule, 1, NOW + 999)
    assert room(account, rule, 1, NOW + 1500, 0) == Short(0, "used", DAY - 1500)


# -- rates ------------------------------------------------------------------------------------------------------------


@given(small_rates, st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3000)), max_size=60))
def test_in_any_span_a_rate_lets_through_its_burst_and_what_drains(rule: Rate, what: list[tuple[int, int]]) -> None:
    account, now, passed = EMPTY, NOW, []
    for units, pause in what:
        now += pause
        if admits(account, rule, units, now):
            account = take(account, rule, units, now)
            passed.append((now, units))
    for i, (begin, _) in enumerate(passed):
        total = 0
        for at, units in passed[i:]:
            total += units
            # The grain of its clock may add one tick.
            assert (total - rule.burst) * rule.period_ms <= rule.limit * (at - begin + rule.tick_ms - 1)


@given(small_rates, st.integers(1, 100))
def test_a_rate_is_empty_when_it_says(rule: Rate, units: int) -> None:
    account = take(EMPTY, rule, units, NOW)
    reset_ms = standing(account, rule, NOW).reset_ms
    assert idle_at_ms(account) == NOW + reset_ms
    assert used(account, rule, NOW + reset_ms - 1) == 1
    assert standing(account, rule, NOW + reset_ms) == Standing(0, 0, 0)


def test_a_rate_keeps_its_level_when_its_limit_changes() -> None:
    account = take(EMPTY, Rate(60, MINUTE, 60), 60, NOW)
    assert used(account, Rate(600, MINUTE, 600), NOW) == 60
    assert used(account, Rate(600, MINUTE, 600), NOW + 1000) == 50
    assert used(account, Rate(1, MINUTE, 1), NOW + MINUTE) == 59


@given(rules, takes, st.integers(1, 10 * DAY))
def test_a_clock_that_goes_back_gives_nothing_back(rule: Rule, what: list[tuple[int, int]], back: int) -> None:
    account, now = filled(rule, [(units, abs(passed)) for units, passed in what])
    assert used(account, rule, now - back) >= used(account, rule, now)
    again = take(account, rule, 7, now - back)
    assert used(again, rule, now) >= used(account, rule, now)


# -- windows ----------------------------------------------------------------------------------------------------------


def test_a_budget_begins_anew_with_each_window() -> None:
    rule = Budget(10, (NOW, NOW + HOUR, NOW + 3 * HOUR))
    account = take(hold(EMPTY, 2), rule, 7, NOW + 5)
    assert standing(account, rule, NOW + 5) == Standing(7, 2, HOUR - 5)
    assert room(account, rule, 5, NOW + 5, 0) == Short(0, "used", HOUR - 5)
    assert used(account, rule, NOW + HOUR - 1) == 7
    assert standing(account, rule, NOW + HOUR) == Standing(0, 2, 2 * HOUR)
    assert standing(account, rule, NOW + 5 * HOUR) == Standing(0, 2, -1)


def test_a_budget_without_windows_is_for_ever() -> None:
    account = take(EMPTY, Budget(10), 7, NOW)
    assert standing(account, Budget(10), NOW + 10_000 * DAY) == Standing(7, 0, -1)
    assert room(account, Budget(10), 4, NOW, 0) == Short(0, "used", -1)
    assert idle_at_ms(account) is None


def test_before_its_first_window_a_budget_is_in_it() -> None:
    rule = Budget(10, (NOW, NOW + HOUR))
    account = take(EMPTY, rule, 7, NOW - 5)
    assert standing(account, rule, NOW - 5) == Standing(7, 0, HOUR + 5)
    assert used(account, rule, NOW) == 7


def test_a_budget_never_goes_back_to_an_earlier_window() -> None:
    account = take(EMPTY, Budget(10, (NOW, NOW + HOUR)), 7, NOW + HOUR)
    assert used(account, Budget(10, (NOW, NOW + HOUR)), NOW) == 7
    assert used(account, Budget(10, (NOW,)), NOW + HOUR) == 7


@given(rollings, st.integers(0, DAY))
def test_a_rolling_sum_keeps_each_unit_for_its_period_and_at_most_a_slot_longer(rule: Rolling, offset: int) -> None:
    now = NOW + offset
    account = take(EMPTY, rule, 3, now)
    reset_ms = standing(account, rule, now).reset_ms
    assert rule.period_ms <= reset_ms <= (SLOTS + 1) * rule.slot_ms
    assert used(account, rule, now + reset_ms - 1) == 3
    assert standing(account, rule, now + reset_ms) == Standing(0, 0, 0)
    assert idle_at_ms(account) == now + reset_ms


@given(rollings, takes)
def test_a_rolling_sum_has_few_slots(rule: Rolling, what: list[tuple[int, int]]) -> None:
    account, now = filled(rule, [(units, min(abs(passed), rule.slot_ms)) for units, passed in 5 * what])
    assert len(account.slots) <= SLOTS + 1
    assert used(account, rule, now) <= sum(units for units, _ in 5 * what)


def test_concurrency_uses_nothing() -> None:
    account = take(hold(EMPTY, 2), Concurrency(3), 5, NOW)
    assert standing(account, Concurrency(3), NOW) == Standing(0, 2, 0)
    assert room(account, Concurrency(3), 2, NOW, 0) == Short(0, "reserved", -1)


# -- taking back ------------------------------------------------------------------------------------------------------


@given(rules, takes, st.integers(0, 200), st.integers(0, 200), st.integers(0, DAY))
def test_what_is_taken_back_at_most_undoes_what_was_counted(
    rule: Rule, what: list[tuple[int, int]], units: int, back: int, later: int
) -> None:
    account, now = filled(rule, [(units, abs(passed)) for units, passed in what])
    with_it = take(account, rule, units, now)
    corrected = correct(with_it, rule, min(back, units), now, now + later)
    assert used(account, rule, now + later) <= used(corrected, rule, now + later) <= used(with_it, rule, now + later)


@given(rates | rollings | st.builds(Budget, st.integers(1, 100)), takes, st.integers(1, 200))
def test_taking_back_at_once_undoes_everything(rule: Rule, what: list[tuple[int, int]], units: int) -> None:
    account, now = filled(rule, [(units, abs(passed)) for units, passed in what])
    undone = correct(take(account, rule, units, now), rule, units, now, now)
    assert standing(undone, rule, now) == standing(account, rule, now)


def test_what_has_drained_is_not_given_back_again() -> None:
    rule = Rate(60, MINUTE, 60)
    account = take(EMPTY, rule, 60, NOW)
    account = correct(account, rule, 30, NOW, NOW + 20_000)
    # 20 of the 60 have drained, which may have been 20 of these 30.
    assert used(account, rule, NOW + 20_000) == 30


def test_what_was_counted_in_an_earlier_window_is_not_taken_from_this_one() -> None:
    rule = Budget(10, (NOW, NOW + HOUR))
    account = take(EMPTY, rule, 4, NOW + HOUR)
    assert used(correct(account, rule, 4, NOW + HOUR - 1, NOW + HOUR), rule, NOW + HOUR) == 4
    rolling = Rolling(10, HOUR)
    account = take(take(EMPTY, rolling, 4, NOW), rolling, 5, NOW + MINUTE)
    account = correct(account, rolling, 9, NOW, NOW + MINUTE)
    assert account.slots == ((NOW // MINUTE + 1, 5),)


# -- sizes and changes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [Rate(LARGEST_RATE, HOUR, LARGEST_RATE), Budget(LARGEST_SUM), Rolling(LARGEST_SUM, DAY)]
)
def test_sums_stay_below_what_a_double_holds_exactly(rule: Rule) -> None:
    account = EMPTY
    for _ in range(3):
        account = take(account, rule, LARGEST_SUM - 1, NOW)
    assert max(account.used, *[units for _, units in account.slots], 0) <= LARGEST_SUM < 2**53
    assert not admits(account, rule, 1, NOW)


@given(rules, takes, rules)
def test_under_another_kind_of_rule_nothing_was_used(rule: Rule, what: list[tuple[int, int]], other: Rule) -> None:
    account, now = filled(rule, what)
    same = type(rule) is type(other) and getattr(rule, "period_ms", 0) == getattr(other, "period_ms", 0)
    if not same:
        assert used(account, other, now) == 0
        assert used(take(account, other, 5, now), other, now) in (0, 5)
        assert used(take(take(account, other, 1, now), rule, 2, now), rule, now) in (0, 1, 2) or isinstance(
            other, Concurrency
        )


@pytest.mark.parametrize("rule", [Rate(0, MINUTE, 0), Budget(0), Rolling(0, HOUR), Concurrency(0)])
def test_a_limit_of_nothing_admits_nothing(rule: Rule) -> None:
    assert room(EMPTY, rule, 1, NOW, 0) == Short(0, "never", -1)
    account = take(EMPTY, rule, 1, NOW)
    assert standing(account, rule, NOW).used == (0 if isinstance(rule, Concurrency) else 1)
    assert idle_at_ms(account) is None or not isinstance(rule, Rate)
