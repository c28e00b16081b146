"""Does the doctor tell a store that answers from one that does not, and say why?"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from gateway.config.load import Loaded, load
from gateway.tools import doctor
from tests.gateway.litellm_package import install
from tests.servers.redis import RedisServer, free_port, running_redis

GOOD = (Path(__file__).parents[1] / "config" / "good.yaml").read_text()


def loaded_with(folder: Path, port: int, password: str) -> Loaded:
    file = folder / "gateway.yaml"
    (folder / "password").write_text(password)
    state = f'kind: redis, addresses: ["127.0.0.1:{port}"], timeout: 1s, password: {{from: file, path: password}}'
    file.write_text(f"{GOOD}state: {{{state}}}\n")
    return load(file)


def look(loaded: Loaded) -> doctor.Finding:
    (finding,) = asyncio.run(doctor.stores(loaded))
    return finding


def command(server: RedisServer, *words: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        for said in (("AUTH", server.password), words):
            parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in said)
            link.sendall(f"*{len(said)}\r\n{parts}".encode())
            assert link.recv(100) == b"+OK\r\n"


def test_a_store_that_answers_is_told_with_its_version(tmp_path: Path) -> None:
    with running_redis() as server:
        finding = look(loaded_with(tmp_path, server.port, server.password))
    assert finding.ok
    assert "answers in" in finding.detail


def test_a_wrong_password_is_told_and_not_shown(tmp_path: Path) -> None:
    with running_redis() as server:
        finding = look(loaded_with(tmp_path, server.port, "sesame"))
    assert finding.ok is False
    assert finding.detail.startswith("cannot be asked: WRONGPASS")
    assert "sesame" not in finding.detail


def test_a_store_that_forgets_when_full_is_bad(tmp_path: Path) -> None:
    with running_redis() as server:
        command(server, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        finding = look(loaded_with(tmp_path, server.port, server.password))
    assert finding.ok is False
    assert finding.detail.endswith("forgets when it is full: set noeviction")


def test_nobody_there_is_bad(tmp_path: Path) -> None:
    finding = look(loaded_with(tmp_path, free_port(), "x"))
    assert finding.ok is False
    assert finding.detail.startswith("cannot be asked: ")


def test_a_frozen_store_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LONGEST_LOOK_S", 0.05)
    with running_redis() as server:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            finding = look(loaded_with(tmp_path, server.port, server.password))
        finally:
            os.kill(server.pid, signal.SIGCONT)
    assert finding == doctor.Finding(f"state 127.0.0.1:{server.port}", ok=False, detail="does not answer within 0.05 s")


def test_memory_is_told(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(GOOD)
    assert look(load(file)) == doctor.Finding("state", ok=None, detail="in memory")


def test_prices_of_litellm_are_told_with_what_is_not_billed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    file = tmp_path / "gateway.yaml"
    small, large = "price: {input: 0.02, output: $0.04}", "price: {input: 0.1 USD, output: 1}"
    file.write_text(
        GOOD.replace(small, "price: {litellm: gpt-4o-mini}")
        .replace("tokens: [a]", "tokens: [a], price: {litellm: gpt-4o-mni}")
        .replace(large, "price: {litellm: dashscope/qwen-turbo}")
    )
    wrong, told, *_ = sorted(doctor.prices(load(file)), key=lambda finding: finding.ok is True)
    assert (wrong.what, wrong.ok) == ("price gpt-4o-mni", False)
    assert wrong.detail == "no model `gpt-4o-mni` in LiteLLM's price list; did you mean `gpt-4o-mini`?"
    assert told == doctor.Finding(
        "price dashscope/qwen-turbo",
        ok=True,
        detail=(
            "$0.05 in, $0.05 cached, $0.20 out (litellm 1.109.1); nothing is billed by its "
            "output_cost_per_reasoning_token"
        ),
    )
    file.write_text(GOOD)
    assert doctor.prices(load(file)) == []
