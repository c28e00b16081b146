"""Does the admin port say what was spent, as the command does, and what is wrong with a question?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from gateway.admin import admin_app
from gateway.config.secrets import Secret
from gateway.cost_admin import CostAdmin
from gateway.key_admin import KeyAdmin
from gateway.key_store import MemoryKeys
from gateway.ledger.asking import Desk
from gateway.ledger.contract import LedgerDown, Reading, Store
from gateway.ledger.report_query import HOUR_MS, Query
from gateway.ledger.reports import read_report
from gateway.ledger.sqlite import SqliteStore
from policies.cost import usd
from tests.gateway.ledger.many_rows import BEGIN_MS, fill

NOVEMBER = {"since": "2025-11", "until": "2025-12"}


class Down:
    """A store that cannot be read."""

    def reading(self) -> AbstractContextManager[Reading]:
        raise LedgerDown("its disk is gone")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path_factory.mktemp("ledger") / "books.db")
    made.open()
    fill(made, 200, keys=6)
    yield made
    made.close()


@contextmanager
def client(store: Any) -> Iterator[TestClient]:
    keys = KeyAdmin(MemoryKeys(), configured=(), models=(), teams=())
    app = admin_app(
        keys,
        secret=Secret("admin"),
        config="c0ffee",
        more_routes=CostAdmin(store, now=lambda: BEGIN_MS / 1000 + 20 * 86400).routes(),
    )
    yield TestClient(app, headers={"authorization": "Bearer admin"})


def test_it_says_what_the_command_says(store: Store) -> None:
    with client(store) as admin:
        answer = admin.get("/admin/costs", params={**NOVEMBER, "by": "team,day", "forecast": "true"})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    report = read_report(store, Query(since_ms=BEGIN_MS, until_ms=BEGIN_MS + 720 * HOUR_MS, by=("team",), bucket="day"))
    said = answer.json()
    assert said["total"]["cost_usd"] == usd(report.total.cost_nusd)
    assert [line["cost_usd"] for line in said["data"]] == [usd(line.cost_nusd) for line in report.lines]
    assert said["forecast"]["learned_from_hours"] > 400


def test_filters_may_be_repeated_and_lines_cut(store: Store) -> None:
    with client(store) as admin:
        params: list[tuple[str, str | int | float | bool | None]] = [
            *NOVEMBER.items(),
            ("by", "key,tier"),
            ("filter", "key=key-000"),
            ("filter", "key=key-001"),
            ("top", "2"),
        ]
        said = admin.get("/admin/costs", params=params).json()
    assert len(said["data"]) == 2
    assert {line["key"] for line in said["data"]} <= {"key-000", "key-001"}


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"since": "soon"}, "since"),
        ({"by": "colour"}, "by"),
        ({"timezone": "../x"}, "timezone"),
        ({"filter": "red"}, "filter"),
        ({"top": "0"}, "top"),
        ({"top": "²"}, "top"),
        ({"forecast": "yes"}, "forecast"),
        ({"idle": "me"}, "idle"),
        ({"format": "csv"}, "format"),
    ],
)
def test_a_bad_parameter_is_told_by_its_name(store: Store, params: dict[str, str], param: str) -> None:
    with client(store) as admin:
        answer = admin.get("/admin/costs", params=params)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_nobody_asks_without_the_admin_key(store: Store) -> None:
    with client(store) as admin:
        assert admin.get("/admin/costs", headers={"authorization": "Bearer other"}).status_code == 401


def test_a_ledger_that_is_down_is_told() -> None:
    with client(Down()) as admin:
        answer = admin.get("/admin/costs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")


def test_a_report_with_too_many_lines_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cost_admin._MOST_LINES", 10)
    with client(store) as admin:
        answer = admin.get("/admin/costs", params={**NOVEMBER, "by": "hour,key"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "by")
    assert "shorter period" in answer.json()["error"]["message"]


def test_questions_that_hang_are_given_up_and_never_become_many() -> None:
    async def play() -> None:
        desk = Desk(1, longest_s=0.02)
        go_on = threading.Event()
        asked: list[int] = []
        with pytest.raises(TimeoutError):
            await desk.ask(go_on.wait)
        with pytest.raises(TimeoutError):
            await desk.ask(lambda: asked.append(1))
        assert asked == []
        go_on.set()
        patient = Desk(1, longest_s=10)
        assert await patient.ask(lambda: 5) == 5

    asyncio.run(play())
