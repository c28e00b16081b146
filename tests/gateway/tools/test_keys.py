"""Can an operator do everything with keys from a shell? `tierway keys` against a real admin API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cli import main
from tests.gateway.admin_server import ADMIN_KEY, AdminServer, running_admin
from tests.servers.redis import free_port

_FILE = """\
backends: {one: {kind: scripted, model: m, tokens: [a]}}
tiers: [{name: small, backends: [one], price: {input: 1, output: 2}}]
"""


@pytest.fixture(scope="module")
def admin() -> Iterator[AdminServer]:
    with running_admin(None) as server:
        yield server


@pytest.fixture
def shell(admin: AdminServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration whose admin API is running, and the admin key in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPERATORS_KEY", ADMIN_KEY)
    monkeypatch.delenv("TIERWAY_ADMIN_KEY", raising=False)
    server = {"admin": {"port": admin.port, "key": {"from": "env", "name": "OPERATORS_KEY"}}}
    (tmp_path / "gateway.yaml").write_text(f"{_FILE}server: {json.dumps(server)}\n")
    return tmp_path


class Shell:
    """What a command said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.status = main(["keys", *words])
        said = capsys.readouterr()
        self.out, self.err = said.out, said.err

    @property
    def key(self) -> str:
        found = re.findall(r"tw-[A-Za-z0-9_-]{43}", self.out)
        assert len(found) == 1, self.out
        key: str = found[0]
        return key


def test_the_life_of_a_key(shell: Path, admin: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--team",
        "red",
        "--models",
        "auto,small",
        "--tag",
        "ci",
        "--metadata",
        "cost-centre=17",
        "--priority",
        "-5",
    ]
    made = Shell(capsys, "create", "alice", *words)
    assert made.status == 0, made.err
    assert admin.caller(made.key) == "alice"
    shown = Shell(capsys, "show", "alice")
    assert made.key not in shown.out
    for line in (
        "state      active",
        "team       red",
        "models     auto, small",
        "metadata   cost-centre=17",
        "priority   -5",
    ):
        assert line in shown.out
    rotated = Shell(capsys, "rotate", "alice", "--grace", "1h")
    assert rotated.key != made.key
    assert "older keys one until" in rotated.out
    assert admin.caller(made.key) == admin.caller(rotated.key) == "alice"
    assert Shell(capsys, "disable", "alice").status == 0
    assert "disabled" in admin.caller(rotated.key)
    assert "state      active" in Shell(capsys, "enable", "alice").out
    assert admin.caller(rotated.key) == "alice"
    assert "state      expired" in Shell(capsys, "expire", "alice").out
    assert "expired" in admin.caller(rotated.key)
    assert "expires    2099-01-01T00:00:00Z" in Shell(capsys, "expire", "alice", "--at", "2099-01-01T00:00:00Z").out
    assert "expires    never" in Shell(capsys, "expire", "alice", "--at", "never").out
    assert Shell(capsys, "delete", "alice").out == "The key alice is deleted.\n"
    assert "not known" in admin.caller(rotated.key)


def test_all_keys_are_listed_however_many(shell: Path, admin: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(510):
        admin.create(f"many-{number:03}", team="blue")
    table = Shell(capsys, "list").out.splitlines()
    assert table[0].split() == ["NAME", "STATE", "TEAM", "USER", "EXPIRES", "KEPT", "IN"]
    names = [line.split()[0] for line in table[1:]]
    assert len(names) == 512
    assert names == sorted(names)
    assert {"conf-a", "conf-z", "many-000", "many-509"} <= set(names)
    lines = [json.loads(line) for line in Shell(capsys, "list", "--json", "--team", "red").out.splitlines()]
    assert [(one["name"], one["source"]) for one in lines] == [("conf-a", "config")]


def test_machines_read_json(shell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(Shell(capsys, "create", "robot", "--json").out)
    assert made["key"].startswith("tw-")
    assert json.loads(Shell(capsys, "show", "robot", "--json").out)["name"] == "robot"
    assert json.loads(Shell(capsys, "delete", "robot", "--json").out)["deleted"] is True


def test_what_the_gateway_refuses_is_said_and_fails(shell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in [
        (["create", "conf-a"], "already"),
        (["create", "eve", "--team", "rde"], "did you mean `red`"),
        (["create", "a b"], "expected a name"),
        (["show", "nobody/../x?y"], "no key of this name"),
        (["rotate", "nobody"], "no key of this name"),
        (["disable", "conf-a"], "configuration"),
    ]:
        said = Shell(capsys, *words)
        assert said.status == 1
        assert said.err.startswith("tierway keys: refused: ")
        assert says in said.err
        assert said.out == ""


def test_address_and_key_can_be_given_without_a_file(
    admin: AdminServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIERWAY_ADMIN_KEY", ADMIN_KEY)
    assert Shell(capsys, "show", "conf-a", "--url", f"{admin.url}/").status == 0
    monkeypatch.setenv("TIERWAY_ADMIN_KEY", "wrong")
    assert "not the admin key" in Shell(capsys, "show", "conf-a", "--url", admin.url).err
    assert "no address" in Shell(capsys, "show", "conf-a", "--url", "127.0.0.1:8081").err


def test_what_is_missing_is_said(
    shell: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPERATORS_KEY")
    assert "`OPERATORS_KEY` is not set" in Shell(capsys, "list").err
    (shell / "gateway.yaml").write_text(_FILE + "keys: [{name: a, sha256: " + "a" * 64 + "}]\n")
    assert "no server.admin" in Shell(capsys, "list").err
    monkeypatch.setenv("TIERWAY_ADMIN_KEY", ADMIN_KEY)
    port = free_port()
    said = Shell(capsys, "list", "--url", f"http://127.0.0.1:{port}").err
    assert f"127.0.0.1:{port} cannot be asked: Connection refused" in said
    assert ADMIN_KEY not in said
