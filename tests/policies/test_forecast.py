"""Is a forecast near what comes, and does it say how near? On made-up series whose end is known."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from policies.forecast import forecast

DAY = 24
WEEK = 7 * DAY


def series(hours: int, *, noise: float = 0.0, seed: int = 1, first_hour: int = 0) -> list[int]:
    """Days busier than nights, weekends quiet."""
    rng = random.Random(seed)
    found = []
    for number in range(first_hour, first_hour + hours):
        weekend = number // DAY % 7 in (5, 6)
        shape = (1.2 + math.sin((number % DAY - 8) / DAY * 2 * math.pi)) * (0.3 if weekend else 1.0)
        found.append(round(1_000_000 * shape * math.exp(rng.gauss(0, noise) - noise * noise / 2)))
    return found


def test_nothing_to_go_by_is_what_is_spent() -> None:
    made = forecast([], first_hour=0, spent_nusd=0, ahead=600)
    assert (made.expected_nusd, made.low_nusd, made.high_nusd, made.hours) == (0, 0, 0, 0)


def test_nothing_spent_stays_nothing() -> None:
    made = forecast([0] * 300, first_hour=5, spent_nusd=0, ahead=400)
    assert (made.low_nusd, made.expected_nusd, made.high_nusd) == (0, 0, 0)


def test_at_the_end_there_is_nothing_more_to_come() -> None:
    made = forecast(series(500), first_hour=0, spent_nusd=77, ahead=0)
    assert (made.low_nusd, made.expected_nusd, made.high_nusd) == (77, 77, 77)


def test_an_even_rate_goes_on() -> None:
    made = forecast([10] * 72, first_hour=7, spent_nusd=720, ahead=100.5)
    assert made.expected_nusd == 720 + 1005
    assert made.low_nusd == made.high_nusd == made.expected_nusd


def test_one_day_gives_the_run_rate_and_admits_that_it_is_one_day() -> None:
    past = series(DAY)
    made = forecast(past, first_hour=0, spent_nusd=sum(past), ahead=4 * DAY)
    assert made.expected_nusd == pytest.approx(5 * sum(past), rel=0.01)
    assert made.low_nusd == sum(past)
    assert made.high_nusd == pytest.approx(9 * sum(past), rel=0.01)


def test_weekends_are_known_after_some_weeks() -> None:
    """On a Friday evening the run rate would be far too high for the two days to come."""
    hours = 4 * WEEK + 5 * DAY
    past = series(hours)
    made = forecast(past, first_hour=0, spent_nusd=0, ahead=2 * DAY)
    truth = sum(series(2 * DAY, first_hour=hours))
    run_rate = sum(past) / len(past) * 2 * DAY
    assert made.expected_nusd == pytest.approx(truth, rel=0.4)
    assert abs(made.expected_nusd - truth) < 0.4 * abs(run_rate - truth)


def test_a_month_to_come_is_near_the_truth() -> None:
    past = series(4 * WEEK, noise=0.5)
    made = forecast(past, first_hour=0, spent_nusd=0, ahead=30 * DAY)
    assert made.expected_nusd == pytest.approx(sum(series(30 * DAY, first_hour=4 * WEEK)), rel=0.1)


def test_the_interval_holds_about_four_times_of_five() -> None:
    """Days differ by a factor of their own, hours by another; whole weeks come, so that only chance is left."""
    held = 0
    for seed in range(100):
        rng = random.Random(seed)
        days = [math.exp(rng.gauss(0, 0.3)) for _ in range(35)]
        truth = [round(day * hour) for day in days for hour in series(DAY, noise=0.2, seed=rng.randrange(10**6))]
        past, rest = truth[: 21 * DAY], truth[21 * DAY :]
        made = forecast(past, first_hour=0, spent_nusd=0, ahead=len(rest))
        held += made.low_nusd <= sum(rest) <= made.high_nusd
    assert 65 <= held <= 92


def test_one_mistake_is_not_repeated_every_week() -> None:
    past = series(3 * WEEK)
    usual = forecast(past, first_hour=0, spent_nusd=0, ahead=WEEK)
    past[200] = 1000 * max(past)
    assert forecast(past, first_hour=0, spent_nusd=0, ahead=WEEK).expected_nusd < 1.1 * usual.expected_nusd


def test_gaps_are_hours_of_nothing() -> None:
    past = series(2 * WEEK)
    gap = past[:100] + [0] * 48 + past[148:]
    made = forecast(gap, first_hour=0, spent_nusd=0, ahead=WEEK)
    assert made.expected_nusd == pytest.approx(sum(gap) / 2, rel=0.1)


@given(
    past=st.lists(st.integers(0, 10**15), max_size=400),
    first_hour=st.integers(0, 10**6),
    spent=st.integers(0, 10**17),
    ahead=st.floats(0, 750),
)
def test_it_is_never_below_what_is_spent(past: list[int], first_hour: int, spent: int, ahead: float) -> None:
    made = forecast(past, first_hour=first_hour, spent_nusd=spent, ahead=ahead)
    assert spent <= made.low_nusd <= made.expected_nusd <= made.high_nusd
