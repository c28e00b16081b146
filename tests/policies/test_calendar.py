"""When calendar windows begin, in zones with and without summer time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import get_args
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.calendar import Period, window_starts

_ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "America/Santiago"]


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.mark.parametrize(
    ("now", "period", "zone", "starts"),
    [
        ("2026-11-21T15:30:00Z", "hour", "UTC", ["2026-11-21T14:00:00Z", "2026-11-21T15:00:00Z"]),
        ("2026-11-21T15:10:00Z", "hour", "Asia/Kolkata", ["2026-11-21T13:30:00Z", "2026-11-21T14:30:00Z"]),
        ("2026-11-21T23:30:00Z", "day", "Europe/Berlin", ["2026-11-20T23:00:00Z", "2026-11-21T23:00:00Z"]),
        # The day of a change has 23 or 25 hours.
        ("2026-03-29T12:00:00Z", "day", "Europe/Berlin", ["2026-03-27T23:00:00Z", "2026-03-28T23:00:00Z"]),
        ("2026-03-30T12:00:00Z", "day", "Europe/Berlin", ["2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"]),
        ("2026-10-26T12:00:00Z", "day", "Europe/Berlin", ["2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"]),
        # In Santiago summer time begins at midnight: that day begins at one o'clock.
        ("2026-09-06T12:00:00Z", "day", "America/Santiago", ["2026-09-05T04:00:00Z", "2026-09-06T04:00:00Z"]),
        ("2027-01-01T00:00:00Z", "month", "UTC", ["2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"]),
        ("2027-01-01T00:00:00Z", "month", "America/New_York", ["2026-11-01T04:00:00Z", "2026-12-01T05:00:00Z"]),
    ],
)
def test_the_window_before_and_the_present_one(now: str, period: Period, zone: str, starts: list[str]) -> None:
    assert window_starts(ms(now), period, ZoneInfo(zone))[:2] == tuple(map(ms, starts))


@given(
    st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2090, 1, 1)),  # noqa: DTZ001 - made aware below
    st.sampled_from(get_args(Period)),
    st.sampled_from(_ZONES),
)
def test_now_lies_in_the_second_of_four_windows(now: datetime, period: Period, zone: str) -> None:
    now_ms = int(now.replace(tzinfo=UTC).timestamp() * 1000)
    starts = window_starts(now_ms, period, ZoneInfo(zone))
    assert starts[0] < starts[1] <= now_ms < starts[2] < starts[3]
    longest = {"hour": timedelta(hours=1), "day": timedelta(hours=25), "month": timedelta(days=31, hours=1)}[period]
    assert all(later - sooner <= longest / timedelta(milliseconds=1) for sooner, later in pairwise(starts))
