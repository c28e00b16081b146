"""Can an operator see from a shell what was spent? `tierway cost` over a ledger in a file, and no gateway running."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from pyarrow import parquet

from gateway.cli import main
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.many_rows import fill

_FILE = """\
backends: {one: {kind: scripted, model: m, tokens: [a]}}
tiers: [{name: small, backends: [one], price: {input: 1, output: 2}}]
keys: [{name: a, sha256: "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}]
"""
NOVEMBER = ("--since", "2025-11", "--until", "2025-12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, and a ledger beside it."""
    made = tmp_path_factory.mktemp("shell")
    (made / "gateway.yaml").write_text(f"{_FILE}ledger: {{store: {{kind: sqlite, path: books.db}}}}\n")
    store = SqliteStore(made / "books.db")
    store.open()
    fill(store, 200, keys=6)
    store.close()
    return made


class Shell:
    def __init__(self, folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
        self._folder = folder
        self._said = capsysbinary

    def __call__(self, *words: str, file: str = "gateway.yaml") -> tuple[int, bytes, str]:
        try:
            status = main(["cost", "--config", str(self._folder / file), *words])
        except SystemExit as left:
            status = int(str(left.code))
        out, err = self._said.readouterr()
        return status, out, err.decode()


@pytest.fixture
def shell(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Shell:
    return Shell(folder, capsysbinary)


def test_a_table_says_who_spent_what(shell: Shell) -> None:
    status, out, err = shell(*NOVEMBER, "--by", "month,team", "--top", "3")
    text = out.decode()
    assert (status, err) == (0, "")
    assert text.startswith("2025-11-01T00:00:00Z to 2025-12-01T00:00:00Z, UTC\n")
    assert "team-00" in text
    assert "more)" in text
    assert "total" in text
    assert "repriced" in text


def test_csv_and_json_say_the_same(shell: Shell) -> None:
    _, out, _ = shell(*NOVEMBER, "--by", "key", "--format", "csv", "--filter", "tier=large")
    rows = list(csv.DictReader(io.StringIO(out.decode())))
    _, out, _ = shell(*NOVEMBER, "--by", "key", "--format", "json", "--filter", "tier=large", "--forecast")
    said = json.loads(out)
    assert [row["cost_usd"] for row in rows] == [line["cost_usd"] for line in said["data"]]
    assert said["forecast"]["spent_usd"] == "0"
    assert len(rows) > 3


def test_parquet_goes_into_a_file(shell: Shell, tmp_path: Path) -> None:
    status, out, _ = shell(*NOVEMBER, "--by", "tier", "--format", "parquet", "--output", str(tmp_path / "a.parquet"))
    assert (status, out) == (0, b"")
    assert parquet.read_table(tmp_path / "a.parquet").num_rows == 4


def test_charges_of_focus(shell: Shell) -> None:
    status, out, _ = shell(*NOVEMBER, "--focus")
    assert status == 0
    assert out.decode().startswith("BilledCost,BillingAccountId,")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--since", "soon"), "--since"),
        (("--by", "colour"), "--by"),
        (("--timezone", "Mars"), "--timezone"),
        (("--filter", "team"), "--filter"),
        (("--format", "csv", "--forecast"), "--forecast"),
        (("--focus", "--format", "json"), "--format"),
        (("--focus", "--by", "team"), "--by"),
        (("--focus", "--filter", "team=red"), "--filter"),
        (("--top", "0"), "--top"),
        (("--bucket", "week"), "--bucket"),
    ],
)
def test_a_bad_option_is_told_by_its_name(shell: Shell, words: tuple[str, ...], option: str) -> None:
    status, out, err = shell(*words)
    assert (status, out) == (2, b"")
    assert option in err


def test_without_a_ledger_it_says_so(shell: Shell, folder: Path, tmp_path: Path) -> None:
    (folder / "none.yaml").write_text(f"{_FILE}ledger: {{store: {{kind: none}}}}\n")
    assert shell(file="none.yaml")[::2] == (
        1,
        "tierway cost: This configuration keeps no ledger (`ledger.store` is of kind `none`): there is nothing to read.\n",
    )
    (folder / "new.yaml").write_text(f"{_FILE}ledger: {{store: {{kind: sqlite, path: {tmp_path}/new.db}}}}\n")
    status, _, err = shell(file="new.yaml")
    assert status == 1
    assert "There is no ledger" in err
    assert not (tmp_path / "new.db").exists()


def test_an_address_that_cannot_be_had_is_not_shown(
    shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "far.yaml").write_text(
        f"{_FILE}ledger: {{store: {{kind: postgres, dsn: {{from: env, name: LEDGER_DSN}}}}}}\n"
    )
    monkeypatch.delenv("LEDGER_DSN", raising=False)
    status, _, err = shell(file="far.yaml")
    assert (status, "LEDGER_DSN" in err) == (1, True)
    monkeypatch.setenv("LEDGER_DSN", "mysql://me:hunter2@host/ledger")
    status, _, err = shell(file="far.yaml")
    assert status == 1
    assert "ledger.store.dsn" in err
    assert "hunter2" not in err
