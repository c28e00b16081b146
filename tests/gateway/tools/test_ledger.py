"""Can an operator look after a ledger from a shell? `tierway ledger` on real files, with a real Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.cli import main
from gateway.ledger.rows import AnyRow
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import bill_of, rows_of
from tests.servers.redis import RedisServer, say

FILE = """\
backends: {{one: {{kind: scripted, model: m, tokens: [a]}}}}
tiers: [{{name: small, backends: [one], price: {{input: 50, output: 150}}}}]
keys: [{{name: key-1, team: red, sha256: {digest}}}]
limits:
  - {{name: teams, scope: {{team: each}}, spend: {{usd: 10, per: month, timezone: UTC}}}}
  - {{name: all, spend: {{usd: 100}}}}
ledger: {{store: {{kind: sqlite, path: books.db}}}}
"""
DAY_MS = 86_400_000


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteStore]:
    """The ledger of a folder with a configuration: two bills of today, and one of last year."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gateway.yaml").write_text(FILE.format(digest="ab" * 32))
    store = SqliteStore(tmp_path / "books.db")
    now_ms = int(time.time() * 1000)
    for number, at_ms in ((1, now_ms), (2, now_ms), (3, now_ms - 400 * DAY_MS)):
        store.write(rated(number, at_ms))
    yield store
    store.close()


@pytest.fixture
def shared(ledger: SqliteStore, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its budgets are in Redis."""
    monkeypatch.setenv("OF_REDIS", redis_server.password)
    password = {"from": "env", "name": "OF_REDIS"}
    state = {"kind": "redis", "addresses": [f"127.0.0.1:{redis_server.port}"], "password": password, "timeout": "0.5s"}
    with (tmp_path / "gateway.yaml").open("a") as file:
        file.write(f"state: {json.dumps(state)}\n")
    say(redis_server, "FLUSHALL")


def rated(number: int, at_ms: int) -> list[AnyRow]:
    """A bill of 12 tokens in and 7 out, at the price that `bills` has: 600 and 1050 nano-dollars."""
    bill = bill_of(number)
    money = {"input_nusd": 600, "output_nusd": 1050}
    exchange = msgspec.structs.replace(bill.exchange, at_ms=at_ms, settled_ms=at_ms, **money)
    attempts = tuple(msgspec.structs.replace(one, **money) for one in bill.attempts)
    return rows_of(msgspec.structs.replace(bill, exchange=exchange, attempts=attempts))


class Shell:
    """What a command said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.status = main(["ledger", *words])
        said = capsys.readouterr()
        self.out, self.err = said.out, said.err


@pytest.mark.usefixtures("ledger")
def test_a_ledger_in_order_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(capsys, "verify")
    assert (shell.status, shell.err) == (0, "")
    assert "ok  every exchange has its attempts, and is their sum: 3\n" in shell.out
    assert "not looked at: they are in the memory of the gateway" in shell.out


def test_what_is_wrong_is_listed_and_the_status_says_so(
    ledger: SqliteStore, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.change(
        [("UPDATE attempts SET output_nusd = 1051 WHERE exchange_id = ?", (bill_of(2).exchange.exchange_id,))]
    )
    shell = Shell(capsys, "verify")
    assert shell.status == 1
    assert "BAD every cost is that of its tokens at their price: 1 of 3 wrong\n" in shell.out
    as_json = Shell(capsys, "verify", "--json")
    assert as_json.status == 1
    assert sum(one["wrong"] for one in json.loads(as_json.out)) == 2


@pytest.mark.usefixtures("shared")
def test_a_state_store_is_seeded_and_compared(ledger: SqliteStore, capsys: pytest.CaptureFixture[str]) -> None:
    apart = Shell(capsys, "verify")
    assert apart.status == 1, apart.err
    assert "teams/spend:month/team=red: used 0, the ledger has 3300 (-3300 nano-dollars, 0 reserved)" in apart.out
    assert "all/spend:total/: used 0, the ledger has 4950" in apart.out
    seeded = Shell(capsys, "seed")
    assert (seeded.status, seeded.out) == (0, "deployment: told what was spent.\n")
    assert Shell(capsys, "verify").status == 0
    # What the store has not heard of is seen, and put right.
    ledger.write(rated(4, int(time.time() * 1000)))
    assert "(-1650 nano-dollars" in Shell(capsys, "verify").out
    again = Shell(capsys, "seed")
    assert (again.status, again.out[:36]) == (0, "The state store has its totals alrea")
    assert Shell(capsys, "verify").status == 1
    assert Shell(capsys, "seed", "--anew").status == 0
    assert Shell(capsys, "verify").status == 0


def test_old_rows_are_exported_and_deleted(
    ledger: SqliteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys, "export", "--before", "2026-01-01", "--format", "jsonl", "--into", "old")
    assert shell.status == 0
    assert len(list((tmp_path / "old").glob("exchanges-*.jsonl"))) == 1
    assert Shell(capsys, "prune").out == "Deleted 0 exchanges and 0 inputs of decisions.\n"
    assert Shell(capsys, "prune", "--before", "2026-01-01").out.startswith("Deleted 1 exchanges")
    with ledger.reading() as reading:
        assert list(reading.rows("SELECT COUNT(*) FROM exchanges")) == [(2,)]
    assert Shell(capsys, "verify").status == 0


@pytest.mark.usefixtures("ledger")
def test_an_invoice_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    day = time.strftime("%Y-%m-%d", time.gmtime(bill_of(1).attempts[0].ended_ms / 1000))
    bad = f"day,model,total\n{day},b/model,0.5\nno day,a/model,1\n"
    (tmp_path / "invoice.csv").write_text(bad)
    shell = Shell(capsys, "invoice", "invoice.csv")
    assert shell.status == 1
    assert f"only invoiced   {day} b/model: invoice $0.5 (?/?/? tokens): +$0.5\n" in shell.out
    assert "unreadable      line 3, day: 'no day' is no date" in shell.out
    (tmp_path / "invoice.csv").write_text("a,b\n1,2\n")
    refused = Shell(capsys, "invoice", "invoice.csv")
    assert refused.status == 2
    assert "There are a, b" in refused.err


def test_a_ledger_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gateway.yaml").write_text(FILE.format(digest="ab" * 32))
    missing = Shell(capsys, "verify")
    assert missing.status == 2
    assert "There is no ledger" in missing.err
    assert Shell(capsys, "migrate").status == 0
    assert Shell(capsys, "verify").status == 0
