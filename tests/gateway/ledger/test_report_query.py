"""Is what was typed understood, and what cannot be told by its name?"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gateway.ledger.report_query import DAY_MS, HOUR_MS, BadOption, Filter, Query, query_of, spans_of

NOW_MS = 1_795_000_000_000  # 2026-11-18T11:06:40Z


def at(iso: str) -> int:
    return query_of({"since": iso, "until": "2030-01-01"}, now_ms=NOW_MS).since_ms


def test_without_words_it_is_the_month_so_far() -> None:
    query = query_of({}, now_ms=NOW_MS)
    assert query.since_ms == at("2026-11-01T00:00:00Z")
    assert query.until_ms == at("2026-11-18T12:00:00Z")
    assert query_of({"timezone": "Europe/Berlin"}, now_ms=NOW_MS).since_ms == at("2026-10-31T23:00:00Z")


@pytest.mark.parametrize(
    ("text", "timezone", "moment"),
    [
        ("2026-11", "UTC", "2026-11-01T00:00:00Z"),
        ("2026-11-03", "Europe/Berlin", "2026-11-02T23:00:00Z"),
        ("2026-11-03T08:00", "Europe/Berlin", "2026-11-03T07:00:00Z"),
        ("2026-11-03T08:00:00+05:30", "Europe/Berlin", "2026-11-03T02:30:00Z"),
        ("7d", "UTC", "2026-11-11T11:00:00Z"),
        ("36h", "UTC", "2026-11-16T23:00:00Z"),
        ("10m", "UTC", "2026-11-18T10:56:40Z"),
    ],
)
def test_a_time_can_be_written_in_several_ways(text: str, timezone: str, moment: str) -> None:
    assert query_of({"since": text, "timezone": timezone}, now_ms=NOW_MS).since_ms == at(moment)


def test_buckets_may_stand_among_the_dimensions() -> None:
    query = query_of({"by": "day, team,tier"}, filters=["team=red", "team=-", "tag=a=b"], now_ms=NOW_MS)
    assert (query.bucket, query.by) == ("day", ("team", "tier"))
    assert query.filters == (Filter("team", ("red", None)), Filter("tag", ("a=b",)))
    assert query.dimensions == ("team", "tier", "tag")


@pytest.mark.parametrize(
    ("words", "filters", "option"),
    [
        ({"since": "yesterday"}, [], "since"),
        ({"since": "2026-13"}, [], "since"),
        ({"since": "0001-01-01"}, [], "since"),
        ({"since": "999999w"}, [], "since"),
        ({"since": "\u0667d"}, [], "since"),
        ({"until": "1d", "since": "1h"}, [], "since"),
        ({"since": "2001-01-01"}, [], "since"),
        ({"until": "9999-12-31T23:59:59-23:59"}, [], "until"),
        ({"timezone": "Mars/Olympus"}, [], "timezone"),
        ({"timezone": "../../etc/passwd"}, [], "timezone"),
        ({"timezone": ""}, [], "timezone"),
        ({"by": "colour"}, [], "by"),
        ({"by": "team,team"}, [], "by"),
        ({"by": "day,hour"}, [], "bucket"),
        ({"bucket": "week"}, [], "bucket"),
        ({}, ["red"], "filter"),
        ({}, ["day=1"], "filter"),
    ],
)
def test_what_cannot_be_understood_is_told_by_its_name(words: dict[str, str], filters: list[str], option: str) -> None:
    with pytest.raises(BadOption) as bad:
        query_of(words, filters=filters, now_ms=NOW_MS)
    assert bad.value.option == option


@given(
    since_ms=st.integers(NOW_MS, NOW_MS + 400 * DAY_MS),
    length_ms=st.integers(1, 400 * DAY_MS),
    timezone=st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kathmandu", "America/New_York"]),
)
def test_spans_are_the_period_and_clocks_do_not_change_within_one(since_ms: int, length_ms: int, timezone: str) -> None:
    query = Query(since_ms=since_ms, until_ms=since_ms + length_ms, timezone=timezone)
    spans = spans_of(query)
    assert [spans[0].since_ms, *(one.until_ms for one in spans)] == [
        *(one.since_ms for one in spans), query.until_ms,
    ]  # fmt: skip
    for span in spans:
        assert span.first_hour * HOUR_MS <= span.since_ms < span.until_ms <= span.end_hour * HOUR_MS
        for moment in (span.since_ms, (span.since_ms + span.until_ms) // 2, span.until_ms - 1):
            (there,) = spans_of(Query(since_ms=moment, until_ms=moment + 1, timezone=timezone))
            assert there.offset_ms == span.offset_ms
    assert sum(not one.whole for one in spans) <= 2 + 2 * 6
