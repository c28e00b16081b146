"""Does a report say what the rows say, to the nano-dollar, whatever is asked and whichever database is?"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from gateway.ledger.contract import Store
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.report_query import DIMENSIONS, HOUR_MS, Bucket, Dimension, Filter, Query
from gateway.ledger.reports import Report, TooMuch, read_report
from gateway.ledger.rows import AdjustmentRow, AnyRow, AttemptRow, ClosingRow, ExchangeRow, RefusalRow
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.many_rows import BEGIN_MS, ManyRows
from tests.gateway.ledger.report_oracle import MEASURES, Key, Oracle
from tests.servers.postgres import PostgresServer

DAYS = 4
END_MS = BEGIN_MS + DAYS * 24 * HOUR_MS
ALL = Query(since_ms=BEGIN_MS, until_ms=END_MS)
SCHEMAS = itertools.count()


def rows_of_a_few_days() -> list[AnyRow]:
    """Made-up rows, and what seldom happens: tiers that were full, kept answers, hours closed twice, odd names."""
    rows = list(ManyRows(300, keys=9, days=DAYS).rows())
    exchanges = [row for row in rows if isinstance(row, ExchangeRow)]
    attempts = {(row.exchange_id, row.number): row for row in rows if isinstance(row, AttemptRow)}
    for row in [one for one in exchanges if one.calls > 1 and one.served][:5]:
        _first_was_shown(rows, row, attempts)
    for row in [one for one in exchanges if one.calls == 1][:4] + [one for one in exchanges if one.calls == 2][-4:]:
        # It asked a tier first that was full.
        call = attempts[row.exchange_id, 1]
        zero = dict.fromkeys(("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens"), 0)
        nothing = dict.fromkeys(("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd"), 0)
        rows.append(msgspec.structs.replace(call, number=9, tier="medium", outcome="full", **zero, **nothing))
    first = exchanges[10]
    rows[rows.index(first)] = msgspec.structs.replace(
        first, team=None, user_name="=1+1", tags='["a_b","a-b"]', asked="ALIAS", endpoint="completions"
    )
    for place, one in enumerate(rows):
        if isinstance(one, AdjustmentRow) and one.exchange_id == first.exchange_id:
            rows[place] = msgspec.structs.replace(one, team=None)
    return [*rows, *_closed_again(rows)]


def _first_was_shown(rows: list[AnyRow], row: ExchangeRow, attempts: dict[tuple[str, int], AttemptRow]) -> None:
    """A doubted answer that was kept, and shown because nothing above could answer."""
    shown = attempts[row.exchange_id, 1]
    cost = shown.input_nusd + shown.cached_input_nusd + shown.output_nusd + shown.gpu_nusd
    whole = row.input_nusd + row.cached_input_nusd + row.output_nusd + row.gpu_nusd
    rows[rows.index(row)] = msgspec.structs.replace(
        row, served=1, tier=shown.tier, backend=shown.backend, model=shown.model, wasted_nusd=whole - cost
    )
    for place, one in enumerate(rows):
        if isinstance(one, AdjustmentRow) and one.exchange_id == row.exchange_id:
            rows[place] = msgspec.structs.replace(one, shown=int(one.number == 1))


def _closed_again(rows: list[AnyRow]) -> Iterator[AnyRow]:
    closing = next(row for row in rows if isinstance(row, ClosingRow) and row.attempts > 1)
    told = next(
        row
        for row in rows
        if isinstance(row, AdjustmentRow) and (row.backend, row.hour) == (closing.backend, closing.hour)
    )
    less = told.share_nusd
    yield msgspec.structs.replace(
        closing, revision=2, shares_nusd=closing.shares_nusd - less, idle_nusd=closing.idle_nusd + less
    )
    yield msgspec.structs.replace(told, revision=2, share_nusd=0, change_nusd=-less)


ROWS = rows_of_a_few_days()
ORACLE = Oracle(ROWS)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with made_store(request, tmp_path_factory.mktemp("ledger")) as made:
        made.write(ROWS)
        yield made


@contextlib.contextmanager
def made_store(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    """An empty ledger of the database that a fixture's parameter names."""
    if request.param == "sqlite":
        file = SqliteStore(folder / "ledger.db")
        file.open()
        with contextlib.closing(file):
            yield file
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    schema = f"reports {next(SCHEMAS)}"
    with contextlib.closing(PostgresStore(server.url, schema=schema, timeout_s=20.0)) as database:
        database.write(())
        yield database


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with made_store(request, tmp_path) as made:
        yield made


def said(report: Report) -> dict[Key, dict[str, int]]:
    return {(one.start_ms, one.names): {name: getattr(one, name) for name in MEASURES} for one in report.lines}


def check(store: Store, query: Query, *, readers: int = 1) -> Report:
    """Everything that is true of any report."""
    report = read_report(store, query, readers=readers)
    assert said(report) == ORACLE.expected(query)
    whole = ORACLE.expected(msgspec.structs.replace(query, by=(), bucket=None))
    assert [{name: getattr(report.total, name) for name in MEASURES}] == (
        list(whole.values()) or [dict.fromkeys(MEASURES, 0)]
    )
    if "tag" not in query.by:
        assert all(sum(getattr(one, name) for one in report.lines) == getattr(report.total, name) for name in MEASURES)
    return report


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("bucket", [None, "day"])
def test_every_dimension_says_what_the_rows_say(store: Store, dimension: Dimension, bucket: Bucket | None) -> None:
    assert check(store, msgspec.structs.replace(ALL, by=(dimension,), bucket=bucket)).lines


@pytest.mark.parametrize("timezone", ["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Chatham", "Europe/Berlin"])
@pytest.mark.parametrize("bucket", ["hour", "day", "month"])
def test_buckets_are_those_of_the_time_zone(store: Store, timezone: str, bucket: Bucket) -> None:
    """Clocks in New York go back on the second of these days, which has 25 hours."""
    query = msgspec.structs.replace(ALL, by=("key",), bucket=bucket, timezone=timezone)
    check(store, query)
    check(store, msgspec.structs.replace(query, by=("tier",)))


def test_a_day_on_which_clocks_go_back_has_25_hours(store: Store) -> None:
    query = Query(since_ms=BEGIN_MS, until_ms=END_MS, bucket="day", timezone="America/New_York")
    starts = [one.start_ms for one in read_report(store, query).lines]
    assert [(later or 0) - (one or 0) for one, later in itertools.pairwise(starts)] == [
        24 * HOUR_MS, 24 * HOUR_MS, 25 * HOUR_MS, 24 * HOUR_MS,
    ]  # fmt: skip


MOMENTS = st.integers(BEGIN_MS - HOUR_MS, END_MS + HOUR_MS)
VALUES: dict[Dimension, list[str | None]] = {
    "key": ["key-000", "key-003", "no such"],
    "team": ["team-00", None],
    "user": ["=1+1", None, "user-1-3"],
    "tag": ["a_b", "batch", "chat", None],
    "route": ["auto", "fast"],
    "asked": ["ALIAS", "deep"],
    "endpoint": ["completions", "chat/completions"],
    "outcome": ["answered", "lost", "exhausted"],
    "tier": ["small", "large", None],
    "backend": ["gpu-1", "hosted"],
    "model": ["medium-instruct", None],
}
FILTERS = st.sampled_from(DIMENSIONS).flatmap(
    lambda name: st.lists(st.sampled_from(VALUES[name]), min_size=1, max_size=2, unique=True).map(
        lambda values: Filter(name, tuple(values))
    )
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moments=st.lists(MOMENTS, min_size=2, max_size=2, unique=True),
    by=st.lists(st.sampled_from(DIMENSIONS), max_size=3, unique=True),
    bucket=st.sampled_from([None, "hour", "day", "month"]),
    timezone=st.sampled_from(["UTC", "America/New_York", "Asia/Kolkata"]),
    filters=st.lists(FILTERS, max_size=2, unique_by=lambda one: one.dimension),
    readers=st.sampled_from([1, 2, 3]),
)
def test_any_question_is_answered_by_the_rows(
    store: Store,
    *,
    moments: list[int],
    by: list[Dimension],
    bucket: Bucket | None,
    timezone: str,
    filters: list[Filter],
    readers: int,
) -> None:
    since_ms, until_ms = sorted(moments)
    check(
        store,
        Query(
            since_ms=since_ms,
            until_ms=until_ms,
            by=tuple(by),
            bucket=bucket,
            timezone=timezone,
            filters=tuple(filters),
        ),
        readers=readers,
    )


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_every_filter_leaves_what_has_one_of_its_values(store: Store, dimension: Dimension) -> None:
    for value in VALUES[dimension]:
        check(store, msgspec.structs.replace(ALL, filters=(Filter(dimension, (value,)),)))
    check(store, msgspec.structs.replace(ALL, by=("tier",), filters=(Filter(dimension, tuple(VALUES[dimension])),)))


def test_hours_of_idle_time_begin_when_hours_of_requests_do(store: Store) -> None:
    query = msgspec.structs.replace(ALL, bucket="hour", timezone="Asia/Kolkata", idle="requests")
    assert {(line.start_ms or 0) % HOUR_MS for line in read_report(store, query).lines} == {HOUR_MS // 2}


def test_a_request_with_two_tags_stands_in_two_lines_and_once_in_the_total(store: Store) -> None:
    report = check(store, msgspec.structs.replace(ALL, by=("tag",)))
    assert {"a_b", "a-b"} <= {line.names[0] for line in report.lines}
    assert sum(line.exchanges for line in report.lines) > report.total.exchanges == 300


def test_an_empty_ledger_has_nothing_to_say(empty: Store) -> None:
    report = read_report(empty, msgspec.structs.replace(ALL, by=("team", "tier"), bucket="day"))
    assert report.lines == ()
    assert report.total.cost_nusd == 0
    assert report.total.cost_per_answer_nusd is None
    assert report.servers == ()
    assert report.refused == ()


def test_only_lost_requests_are_no_answers(empty: Store) -> None:
    rows = [row for row in ROWS if isinstance(row, ExchangeRow)][:3]
    empty.write([msgspec.structs.replace(row, outcome="lost", estimated=1) for row in rows])
    total = read_report(empty, ALL).total
    assert (total.exchanges, total.answered, total.failed, total.estimated) == (3, 0, 3, 3)
    assert total.cost_per_answer_nusd is None


# -- servers ----------------------------------------------------------------------------------------------------------


def idle_nusd() -> int:
    last = {(row.backend, row.hour): row.idle_nusd for row in ROWS if isinstance(row, ClosingRow)}
    return sum(last.values())


def test_hours_of_servers_are_shown_as_they_were_closed_last(store: Store) -> None:
    report = read_report(store, ALL)
    assert sum(one.idle_nusd for one in report.servers) == idle_nusd() == report.idle_left_nusd
    assert all(one.shares_nusd + one.idle_nusd + one.outside_nusd == one.hour_nusd for one in report.servers)
    assert report.total.idle_nusd == 0


@pytest.mark.parametrize(
    ("policy", "by"),
    [
        ("teams", ("team",)),
        ("requests", ("team",)),
        ("requests", ("key", "tier")),
        ("requests", ("user",)),
        ("requests", ("tag",)),
        ("requests", ("model", "outcome")),
        ("requests", ()),
    ],
)
@pytest.mark.parametrize("bucket", [None, "day"])
def test_idle_time_is_divided_to_the_nano_dollar(
    store: Store, policy: str, by: tuple[Dimension, ...], bucket: Bucket | None
) -> None:
    query = msgspec.structs.replace(ALL, idle=policy, by=by, bucket=bucket, timezone="America/New_York")
    report = read_report(store, query)
    assert report.total.idle_nusd == idle_nusd()
    assert report.idle_left_nusd == 0
    assert said(report) == ORACLE.expected(query) | {key: said(report)[key] for key in said(report)}
    if "tag" not in by:
        assert sum(line.idle_nusd for line in report.lines) == idle_nusd()


def test_teams_bear_idle_time_by_their_share_of_the_work(store: Store) -> None:
    """The last share of an hour counts, not one of an earlier closing."""
    report = read_report(store, msgspec.structs.replace(ALL, idle="teams", by=("team",)))
    closings = {(row.backend, row.hour): row for row in ROWS if isinstance(row, ClosingRow)}
    shares: dict[tuple[str, int], AdjustmentRow] = {}
    for row in ROWS:
        if isinstance(row, AdjustmentRow):
            shares[row.exchange_id, row.number] = row
    borne: dict[str | None, float] = {}
    for share in shares.values():
        closing = closings[share.backend, share.hour]
        part = closing.idle_nusd * share.share_nusd / closing.shares_nusd
        borne[share.team] = borne.get(share.team, 0.0) + part
    for line in report.lines:
        assert abs(line.idle_nusd - borne.get(line.names[0], 0.0)) <= len(closings)


def test_what_is_filtered_out_bears_its_part_of_idle_time(store: Store) -> None:
    whole = read_report(store, msgspec.structs.replace(ALL, idle="requests", by=("key",)))
    one = whole.lines[0]
    query = msgspec.structs.replace(ALL, idle="requests", by=("key",), filters=(Filter("key", (one.names[0],)),))
    report = read_report(store, query)
    assert [line.idle_nusd for line in report.lines] == [one.idle_nusd]
    assert report.idle_left_nusd == idle_nusd() - one.idle_nusd


# -- refusals, and bounds ---------------------------------------------------------------------------------------------


def test_refusals_are_counted_by_code_and_key(store: Store) -> None:
    counted = [row for row in ROWS if isinstance(row, RefusalRow)]
    assert [(one.code, one.requests) for one in read_report(store, ALL).refused or ()] == [
        ("rate_limit_exceeded", sum(row.requests for row in counted))
    ]
    name = counted[0].key_name
    only = read_report(store, msgspec.structs.replace(ALL, filters=(Filter("key", (name,)),)))
    assert [one.requests for one in only.refused or ()] == [
        sum(row.requests for row in counted if row.key_name == name)
    ]
    assert read_report(store, msgspec.structs.replace(ALL, filters=(Filter("tier", ("small",)),))).refused is None


def test_a_report_with_too_many_lines_says_what_to_ask(store: Store) -> None:
    with pytest.raises(TooMuch, match="larger buckets"):
        read_report(store, msgspec.structs.replace(ALL, by=("user",), bucket="hour"), most_lines=20)
