"""Does a running gateway bill what it served, and does everybody who asks hear the same? Over HTTP, and by its commands."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.running import ALICE, BOB, HELLO, OPERATOR, Gateway, Reply, Stack, ask, wait_until

ROOT = Path(__file__).resolve().parents[2]
ADMIN = "tw-admin-of-this-test"
JSON = {"content-type": "application/json"}


@pytest.fixture
def gateway(session_stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    session_stack.reset()
    config = session_stack.config(
        server={"admin": {"port": 0, "key": {"from": "env", "name": "ADMIN_KEY"}}},
        ledger={"store": {"kind": "sqlite", "path": str(tmp_path / "ledger.db")}},
    )
    # The commands read the same file.
    (tmp_path / "gateway.yaml").write_text(json.dumps(config))
    with Gateway(config, session_stack.folder, environment={"ADMIN_KEY": ADMIN}) as running:
        yield running


def tierway(folder: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", *words, "--config", str(folder / "gateway.yaml")],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={"ADMIN_KEY": ADMIN},
    )
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode()


def admin(gateway: Gateway, path: str, key: str = ADMIN) -> Reply:
    port = int(gateway.process.find(r"admin API is on http://127\.0\.0\.1:(\d+)"))
    return ask(port, "GET", path, headers={"authorization": f"Bearer {key}"})


def test_everybody_who_asks_hears_the_same(gateway: Gateway, tmp_path: Path) -> None:
    replies = [gateway.chat(stream=stream) for stream in (False, True, False)]
    replies.append(gateway.chat(model="large"))
    assert {reply.status for reply in replies} == {200}
    costs = [Decimal(gateway.decision(reply)["cost_usd"]) for reply in replies]
    report: dict[str, Any] = json.loads(tierway(tmp_path, "cost", "--by", "key", "--format", "json"))
    assert (report["total"]["exchanges"], Decimal(report["total"]["cost_usd"])) == (4, sum(costs))
    over_http = admin(gateway, "/admin/costs?by=key")
    assert over_http.status == 200
    assert over_http.json()["total"] == report["total"]
    assert admin(gateway, "/admin/costs", key=OPERATOR).status == 401
    usage = gateway.get(f"/v1/usage?start_time={int(time.time()) - 3600}", ALICE).json()
    (result,) = (result for bucket in usage["data"] for result in bucket["results"])
    assert result["num_model_requests"] == 4
    nobody = gateway.get(f"/v1/usage?start_time={int(time.time()) - 3600}", BOB).json()
    assert not [result for bucket in nobody["data"] for result in bucket["results"]]
    assert gateway.get("/v1/usage").status == 401


def test_the_bill_is_that_of_the_decision_and_of_the_header(gateway: Gateway, tmp_path: Path) -> None:
    reply = gateway.chat()
    decision = gateway.decision(reply)
    assert reply.headers["x-tierway-cost-usd"] == decision["cost_usd"]
    report = json.loads(tierway(tmp_path, "cost", "--by", "model", "--format", "json"))
    assert report["total"]["cost_usd"] == decision["cost_usd"]
    assert decision["baseline"]["tier"] == "large"
    assert Decimal(report["total"]["baseline_usd"]) == Decimal(decision["baseline"]["cost_usd"])


def test_a_ledger_is_in_order_and_says_so(gateway: Gateway, tmp_path: Path) -> None:
    for model in ("auto", "small", "nothing-of-the-kind"):
        gateway.chat(model=model)
    findings = json.loads(tierway(tmp_path, "ledger", "verify", "--json"))
    assert len(findings) == 10
    assert [one["check"] for one in findings if one["wrong"]] == []
    assert findings[1]["looked_at"] == 2


def test_an_answer_under_way_is_billed_when_its_gateway_is_killed(session_stack: Stack, tmp_path: Path) -> None:
    session_stack.reset()
    config = session_stack.config(ledger={"store": {"kind": "sqlite", "path": str(tmp_path / "ledger.db")}})
    (tmp_path / "gateway.yaml").write_text(json.dumps(config))
    session_stack.large.script(interval_ms=20, tokens=1000)
    first = Gateway(config, session_stack.folder)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", first.port, timeout=10)) as connection:
        asked = json.dumps({"model": "large", "messages": HELLO, "stream": True})
        connection.request("POST", "/v1/chat/completions", asked, {"authorization": f"Bearer {ALICE}"} | JSON)
        answer = connection.getresponse()
        seen = 0
        while seen < 30:
            seen += answer.readline().startswith(b"data: ")
        assert wait_until(lambda: "lost" in still_open(tmp_path / "ledger.db"))
        first.process.kill()
    with Gateway(config, session_stack.folder):
        report = json.loads(tierway(tmp_path, "cost", "--by", "outcome", "--format", "json"))
    (line,) = report["data"]
    assert (line["outcome"], line["exchanges"], line["estimated"]) == ("lost", 1, 1)
    assert line["completion_tokens"] > 0
    assert still_open(tmp_path / "ledger.db") == ""


def still_open(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return "".join(bill for (bill,) in db.execute("SELECT bill FROM open_exchanges"))


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ({"kind": "sqlite", "path": "garbage.db"}, "is not a file of SQLite. Nothing was changed"),
        ({"kind": "sqlite", "path": "nowhere/ledger.db"}, "the folder .*/nowhere is not there"),
        ({"kind": "postgres", "dsn": {"from": "env", "name": "DSN"}}, "cannot be read as one of PostgreSQL"),
        (
            {"kind": "postgres", "dsn": {"from": "env", "name": "DSN"}, "spool": "nowhere/spool.db"},
            "ledger.store.spool: the folder .*/nowhere is not there",
        ),
    ],
    ids=["garbage", "no folder", "no address", "no folder for the spool"],
)
def test_a_ledger_that_cannot_be_used_stops_the_start(
    session_stack: Stack, tmp_path: Path, store: dict[str, Any], said: str
) -> None:
    (tmp_path / "garbage.db").write_bytes(b"not a database " * 600)
    (tmp_path / "gateway.yaml").write_text(json.dumps(session_stack.config(ledger={"store": store})))
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "serve", "--port", "0", "--config", str(tmp_path / "gateway.yaml")],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={"DSN": "garbage garbage"},
        timeout=30,
    )
    assert done.returncode == 2
    assert re.search(said, done.stderr.decode())
    assert b"Traceback" not in done.stderr


def test_who_cannot_bill_is_not_ready(session_stack: Stack, tmp_path: Path) -> None:
    session_stack.reset()
    path = tmp_path / "ledger.db"
    config = session_stack.config(ledger={"store": {"kind": "sqlite", "path": str(path)}})
    with Gateway(config, session_stack.folder) as gateway:
        assert gateway.chat(model="small").status == 200
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            refused = gateway.chat(model="small")
            assert (refused.status, refused.error["code"]) == (503, "ledger_unavailable")
            assert gateway.get("/readyz").json() == {"status": "the ledger cannot be written"}
            assert "tierway_ledger_unwritable 1" in gateway.get("/metrics").body.decode()
            other.execute("ROLLBACK")
        assert wait_until(lambda: gateway.get("/readyz").status == 200, 15, 0.1)
        assert gateway.chat(model="small").status == 200
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT outcome, error FROM exchanges ORDER BY at_ms").fetchall()
    assert rows == [("answered", None), ("broken", "ledger_unavailable"), ("answered", None)]
