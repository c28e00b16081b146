"""Does a caller see what its own key has used, in buckets as OpenAI has them, and nothing of anybody else?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from gateway.errors import Refusal
from gateway.ledger.contract import Store
from gateway.ledger.report_query import HOUR_MS, Filter, Query
from gateway.ledger.reports import read_report
from gateway.ledger.sqlite import SqliteStore
from gateway.usage import Usage
from policies.access import Caller
from policies.cost import usd
from tests.gateway.ledger.many_rows import BEGIN_MS
from tests.gateway.ledger.test_reports import ROWS, made_store
from tests.gateway.test_cost_admin import Down

BEGIN_S = BEGIN_MS // 1000
DAY_S = 86400
KEY = Caller(key="key-000")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with made_store(request, tmp_path_factory.mktemp("usage")) as made:
        made.write(ROWS)
        yield made


def ask(store: Any, question: str, *, caller: Caller = KEY, now_s: int = BEGIN_S + 4 * DAY_S) -> dict[str, Any]:
    request = Request({"type": "http", "headers": [], "query_string": question.encode()})
    answer = asyncio.run(Usage(store, now=lambda: now_s).answer(request, caller))
    said: dict[str, Any] = msgspec.json.decode(bytes(answer.body))
    return said


def refused(store: Any, question: str) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        ask(store, question)
    return refusal.value


def test_days_are_those_of_the_report(store: Store) -> None:
    said = ask(store, f"start_time={BEGIN_S}")
    report = read_report(
        store,
        Query(
            since_ms=BEGIN_MS,
            until_ms=BEGIN_MS + 96 * HOUR_MS,
            bucket="day",
            filters=(Filter("key", ("key-000",)),),
        ),
    )
    assert (said["object"], said["has_more"], said["next_page"]) == ("page", False, None)
    assert [one["start_time"] for one in said["data"]] == [BEGIN_S + day * DAY_S for day in range(4)]
    assert all(one["object"] == "bucket" and one["end_time"] - one["start_time"] == DAY_S for one in said["data"])
    shown = [result for one in said["data"] for result in one["results"]]
    assert [
        (
            one["num_model_requests"],
            one["input_tokens"],
            one["input_cached_tokens"],
            one["output_tokens"],
            one["cost_usd"],
        )
        for one in shown
    ] == [
        (one.exchanges, one.prompt_tokens, one.cached_prompt_tokens, one.completion_tokens, usd(one.cost_nusd))
        for one in report.lines
    ]
    assert shown[0]["object"] == "organization.usage.completions.result"
    assert shown[0]["amount"]["currency"] == "usd"
    assert {one["api_key_id"] for one in shown} == {"key-000"}


@pytest.mark.parametrize(("width", "limit"), [("1m", 1440), ("1h", 96), ("1h", 7), ("1d", 3)])
def test_pages_show_every_request_once(store: Store, width: str, limit: int) -> None:
    question = f"start_time={BEGIN_S + 3601}&end_time={BEGIN_S + 3 * DAY_S + 1800}&bucket_width={width}&limit={limit}"
    page, requests, starts = "", 0, []
    while True:
        said = ask(store, question + page)
        starts += [one["start_time"] for one in said["data"]]
        requests += sum(result["num_model_requests"] for one in said["data"] for result in one["results"])
        if not said["has_more"]:
            break
        page = f"&page={said['next_page']}"
    width_s = {"1m": 60, "1h": 3600, "1d": DAY_S}[width]
    begin_s = (BEGIN_S + 3601) // width_s * width_s
    assert starts == list(range(begin_s, BEGIN_S + 3 * DAY_S + 1800, width_s))
    query = Query(
        since_ms=begin_s * 1000,
        until_ms=(BEGIN_S + 3 * DAY_S + 1800) * 1000,
        filters=(Filter("key", ("key-000",)),),
    )
    assert requests == read_report(store, query).total.exchanges > 10


def test_groups_add_up(store: Store) -> None:
    whole = ask(store, f"start_time={BEGIN_S}&limit=31&bucket_width=1d")
    parts = ask(store, f"start_time={BEGIN_S}&limit=31&bucket_width=1d&group_by=model&group_by[]=user_id")

    def sums(said: dict[str, Any]) -> list[tuple[int, int]]:
        return [
            (
                sum(result["input_tokens"] for result in one["results"]),
                round(sum(float(result["cost_usd"]) for result in one["results"]) * 1e9),
            )
            for one in said["data"]
        ]

    assert sums(parts) == sums(whole)
    assert len({result["model"] for one in parts["data"] for result in one["results"]}) > 2


def test_a_key_sees_itself_alone(store: Store) -> None:
    assert all(not one["results"] for one in ask(store, f"start_time={BEGIN_S}", caller=Caller(key="other"))["data"])
    assert refused(store, f"start_time={BEGIN_S}&api_key_ids=key-001").param == "api_key_ids"
    assert refused(store, f"start_time={BEGIN_S}&group_by=api_key_id").param == "group_by"


@pytest.mark.parametrize(
    ("question", "param"),
    [
        ("", "start_time"),
        ("start_time=x", "start_time"),
        ("start_time=-5", "start_time"),
        (f"start_time={BEGIN_S}&end_time={BEGIN_S}", "end_time"),
        (f"start_time={BEGIN_S}&bucket_width=1w", "bucket_width"),
        (f"start_time={BEGIN_S}&limit=32", "limit"),
        (f"start_time={BEGIN_S}&limit=%C2%B2", "limit"),
        (f"start_time={BEGIN_S}&page=page_7", "page"),
        (f"start_time={BEGIN_S}&page=2", "page"),
    ],
)
def test_a_bad_parameter_is_told_by_its_name(store: Store, question: str, param: str) -> None:
    refusal = refused(store, question)
    assert (refusal.code, refusal.param) == ("invalid_value", param)


def test_a_ledger_that_is_down_is_told_without_its_reason() -> None:
    refusal = refused(Down(), f"start_time={BEGIN_S}")
    assert (refusal.code, "disk" in refusal.message) == ("ledger_unavailable", False)


def test_an_empty_ledger_has_empty_buckets(tmp_path: Path) -> None:
    with contextlib.closing(SqliteStore(tmp_path / "new.db")) as store:
        store.open()
        assert [one["results"] for one in ask(store, f"start_time={BEGIN_S}")["data"]] == [[]] * 4
