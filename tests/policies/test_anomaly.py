"""Is an hour called unlike the others when it is, and left alone when it only looks so?"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.anomaly import DAY, HOURS, WEEK, Past, begins, judge
from tests.policies.spending import (
    KINDS,
    LEAST_NUSD,
    NUSD,
    false_alarms,
    found,
    office,
    raised,
    round_the_clock,
    series,
)

AT = 10 * WEEK + 2 * DAY + 11
"""A Wednesday morning."""


def word(past: Past, at: int) -> str:
    return judge(past, at, least_nusd=LEAST_NUSD).word


def with_hours(past: Past, changes: dict[int, float]) -> Past:
    for at, times in changes.items():
        past = raised(past, at, times)
    return past


OFFICE = series(office, 12, seed=1)
FLAT = series(round_the_clock, 12, seed=1, noise=0.1)


def test_ten_times_as_much_is_a_spike_and_says_what_it_was_compared_with() -> None:
    verdict = judge(raised(OFFICE, AT, 10), AT, least_nusd=LEAST_NUSD)
    assert verdict.word == "spike"
    assert verdict.score > 3
    assert 0.5 < verdict.expected_nusd / OFFICE.nusd[AT] < 2
    assert "by 8 weeks" in verdict.reason
    assert (
        f"${verdict.observed_nusd / NUSD:,.2f} where ${verdict.expected_nusd / NUSD:,.2f} was expected"
        in verdict.reason
    )
    assert word(OFFICE, AT) == "usual"


@pytest.mark.parametrize("hours", [0, 1, 5 * DAY, 6 * DAY + 23])
def test_of_a_few_days_nothing_is_said(hours: int) -> None:
    young = Past([0] * 100 + [*OFFICE.nusd[:hours]] + [10**15], [0] * 100 + [*OFFICE.requests[:hours]] + [10**6])
    verdict = judge(young, 100 + hours, least_nusd=LEAST_NUSD)
    assert verdict.word == "unknown"
    assert "not enough history" in verdict.reason
    assert f"{hours // DAY} days" in verdict.reason


def test_after_a_week_a_large_spike_is_found_by_the_days_before() -> None:
    at = WEEK + 11
    verdict = judge(raised(OFFICE, at, 20), at, least_nusd=LEAST_NUSD)
    assert verdict.word == "spike"
    assert "by 7 days" in verdict.reason


def test_a_team_that_begins_late_is_judged_by_its_own_weeks() -> None:
    late = Past([0] * (3 * WEEK) + [*OFFICE.nusd], [0] * (3 * WEEK) + [*OFFICE.requests])
    for at in range(3 * WEEK, 8 * WEEK, 13):
        assert word(late, at) in ("usual", "unknown")


def test_cents_never_alarm_however_many_times_they_are() -> None:
    small = Past([1_000_000] * HOURS + [900_000_000], [1] * HOURS + [900])
    assert word(small, HOURS) == "usual"
    assert word(raised(small, HOURS, 10), HOURS) == "spike"


def test_a_few_dear_requests_are_no_anomaly_where_chance_makes_them() -> None:
    # $5 a request, one every five hours: an hour with three of them is bound to come.
    nusd = [5 * NUSD if at % 5 == 0 else 0 for at in range(HOURS)] + [15 * NUSD]
    requests = [1 if at % 5 == 0 else 0 for at in range(HOURS)] + [3]
    assert word(Past(nusd, requests), HOURS) == "usual"
    # One every hour, and now three.
    steady = Past([5 * NUSD] * HOURS + [15 * NUSD], [1] * HOURS + [3])
    assert word(steady, HOURS) == "usual"
    many = Past([5 * NUSD] * HOURS + [15 * NUSD], [1000] * HOURS + [3000])
    assert word(many, HOURS) == "spike"


def test_what_has_been_more_for_a_week_is_what_is_expected() -> None:
    more = with_hours(FLAT, dict.fromkeys(range(AT - WEEK, AT + 2 * DAY), 4.0))
    words = [word(more, at) for at in range(AT, AT + 2 * DAY)]
    assert set(words) == {"usual"}
    assert word(more, AT - WEEK) == "spike"
    assert word(raised(more, AT, 4), AT) == "spike"


def test_a_spike_of_the_past_does_not_become_what_is_expected() -> None:
    assert word(with_hours(FLAT, {AT - WEEK: 50, AT: 5}), AT) == "spike"
    assert word(with_hours(FLAT, {AT - WEEK: 50, AT - 4 * WEEK: 50, AT - 5 * WEEK: 50, AT: 5}), AT) == "spike"


def test_bursts_that_come_now_and_then_are_not_new() -> None:
    bursts = {AT - 30: 8.0, AT - 100: 8.0, AT - 200: 8.0}
    assert word(with_hours(FLAT, {**bursts, AT: 7}), AT) == "usual"
    assert word(with_hours(FLAT, {**bursts, AT: 30}), AT) == "spike"


def test_a_job_an_hour_early_or_late_is_no_anomaly() -> None:
    def job(moved: int) -> Past:
        nusd = [30 * NUSD if at % DAY == 2 else NUSD // 10 for at in range(11 * WEEK + DAY)]
        for at in range(11 * WEEK, 11 * WEEK + DAY):
            nusd[at] = 30 * NUSD if at % DAY == 2 + moved else NUSD // 10
        return Past(nusd, [100] * len(nusd))

    for moved in (-1, 0, 1):
        assert {word(job(moved), at) for at in range(11 * WEEK, 11 * WEEK + DAY)} == {"usual"}
    assert word(job(4), 11 * WEEK + 6) == "spike"


def test_nothing_where_much_is_usual_is_a_drop_but_not_in_the_first_month() -> None:
    nothing = raised(OFFICE, AT, 0)
    verdict = judge(nothing, AT, least_nusd=LEAST_NUSD)
    assert verdict.word == "drop"
    assert verdict.score < -3
    young = Past(nothing.nusd[AT - 3 * WEEK :], nothing.requests[AT - 3 * WEEK :])
    assert word(young, 3 * WEEK) == "usual"
    assert word(raised(OFFICE, AT, 0.3), AT) == "usual"


def test_an_anomaly_begins_once_and_again_after_a_quiet_while() -> None:
    changes = {AT + n: 20.0 for n in (0, 1, 2, 4, 7)}
    past = with_hours(FLAT, {**changes, AT + 20: 20.0})
    began = [at for at in range(AT - 3, AT + 30) if begins(past, at, least_nusd=LEAST_NUSD)]
    assert began == [AT, AT + 20]


@settings(max_examples=40, deadline=None)
@given(st.integers(9 * WEEK, 12 * WEEK - 1), st.lists(st.integers(0, 10**14), min_size=2, max_size=6))
def test_the_more_is_spent_the_higher_the_score_and_a_spike_stays_one(at: int, amounts: list[int]) -> None:
    scores, words = [], []
    for nusd in sorted(amounts):
        past = Past([*OFFICE.nusd[:at], nusd], OFFICE.requests[: at + 1])
        verdict = judge(past, at, least_nusd=LEAST_NUSD)
        scores.append(verdict.score)
        words.append(verdict.word)
    assert scores == sorted(scores)
    assert words == sorted(words, key=["drop", "usual", "spike"].index)


@settings(max_examples=40, deadline=None)
@given(st.integers(WEEK, 12 * WEEK - 1), st.integers(2, 10_000), st.sampled_from([0, 1, 3, 30]))
def test_in_another_currency_the_verdict_is_the_same(at: int, rate: int, times: int) -> None:
    past = raised(OFFICE, at, times)
    one = judge(past, at, least_nusd=LEAST_NUSD)
    other = judge(Past([rate * nusd for nusd in past.nusd], past.requests), at, least_nusd=rate * LEAST_NUSD)
    assert other.word == one.word
    assert other.score == pytest.approx(one.score, abs=1e-6)
    assert other.expected_nusd == pytest.approx(rate * one.expected_nusd, abs=rate)


@settings(max_examples=30, deadline=None)
@given(st.integers(HOURS, 11 * WEEK))
def test_what_comes_later_and_what_is_older_than_eight_weeks_makes_no_difference(at: int) -> None:
    old = at - HOURS
    changed = Past(
        [
            *(1 for _ in OFFICE.nusd[:old]),
            *OFFICE.nusd[old : at + 1],
            *(10**15 for _ in OFFICE.nusd[at + 1 :]),
        ],
        OFFICE.requests,
    )
    assert judge(changed, at, least_nusd=LEAST_NUSD) == judge(OFFICE, at, least_nusd=LEAST_NUSD)


@pytest.mark.parametrize("kind", ["office hours", "nightly batch", "cents", "holidays"])
def test_false_alarms_are_rare(kind: str) -> None:
    past = KINDS[kind](13, 3)
    _, alerts = false_alarms(past, 9 * WEEK, 13 * WEEK)
    # Four weeks of hours; the figures of the page are of many more.
    assert alerts <= 2


def test_most_spikes_of_three_times_and_nearly_all_of_ten_are_found_round_the_clock() -> None:
    past = KINDS["round the clock"](12, 5)
    hours = list(range(9 * WEEK, 12 * WEEK, 7))
    assert found(past, hours, 3) > 0.5
    assert found(past, hours, 10) > 0.98
