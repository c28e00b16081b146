"""Do keys of the store work for clients, on every replica and worker, and end where the operator ends them?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import ALICE, ROOT, Gateway, Reply, Stack, ask, wait_until
from tests.servers.redis import RedisServer, running_redis

ADMIN_KEY = "the-admin-key-of-this-test"
_PATIENCE_S = 3.0
"""A change is known after half a second and a round trip; the rest is for a machine that does other things too."""


class Replicas:
    """Gateways over one Redis; the first has two workers, each has an admin API."""

    def __init__(self, stack: Stack, redis: RedisServer) -> None:
        self.redis = redis
        config = stack.config(server={"admin": {"port": 0, "key": {"from": "env", "name": "ADMIN_KEY"}}})
        config["teams"] = ["red"]
        config["state"] = {
            "kind": "redis",
            "addresses": [f"127.0.0.1:{redis.port}"],
            "password": {"from": "env", "name": "REDIS_PASSWORD"},
            "timeout": "500ms",
            "keys_valid_for": "3s",
        }
        environment = {"ADMIN_KEY": ADMIN_KEY, "REDIS_PASSWORD": redis.password}
        self.gateways = [
            Gateway(config, stack.folder, *options, environment=environment) for options in (["--workers", "2"], [])
        ]
        self.admin_ports = [
            int(one.process.find(r"admin API is on http://127\.0\.0\.1:(\d+)")) for one in self.gateways
        ]

    def admin(self, method: str, path: str, body: Any = None, *, replica: int = 0) -> Reply:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return ask(self.admin_ports[replica], method, f"/admin/keys{path}", body, headers)

    def create(self, name: str, **fields: Any) -> str:
        reply = self.admin("POST", "", {"name": name, **fields})
        assert reply.status == 201, reply
        key: str = reply.json()["key"]
        return key

    def answers(self, key: str) -> list[Reply]:
        """Ask every replica for its models, often enough that each worker is met."""
        return [one.get("/v1/models", key) for one in self.gateways for _ in range(8)]

    def all_say(self, key: str, true: Callable[[Reply], bool], limit_s: float = _PATIENCE_S) -> bool:
        return wait_until(lambda: all(map(true, self.answers(key))), limit_s)


@pytest.fixture(scope="module")
def replicas(session_stack: Stack) -> Iterator[Replicas]:
    session_stack.reset()
    with running_redis() as redis:
        replicas = Replicas(session_stack, redis)
        try:
            yield replicas
        finally:
            for gateway in replicas.gateways:
                gateway.process.stop()


def served(reply: Reply) -> bool:
    return reply.status == 200


def refused(word: str) -> Callable[[Reply], bool]:
    return lambda reply: reply.status == 401 and word in reply.error["message"]


def test_a_key_that_was_just_made_is_served_everywhere_at_once(replicas: Replicas) -> None:
    key = replicas.create("gina", models=["auto", "small"])
    assert all(map(served, replicas.answers(key)))
    assert {one["id"] for one in replicas.answers(key)[0].json()["data"]} == {"auto", "gpt-4o", "small"}
    reply = replicas.gateways[1].post(
        "/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}, key
    )
    assert reply.status == 200
    assert replicas.gateways[1].decision(reply, key)["key"] == "gina"
    not_theirs = replicas.gateways[0].post(
        "/v1/chat/completions", {"model": "large", "messages": [{"role": "user", "content": "Hi"}]}, key
    )
    assert not_theirs.status == 404


def test_a_disabled_key_is_refused_everywhere_soon(replicas: Replicas) -> None:
    key = replicas.create("hugo")
    assert all(map(served, replicas.answers(key)))
    assert replicas.admin("PATCH", "/hugo", {"disabled": True}, replica=1).status == 200
    assert replicas.all_say(key, refused("disabled"))
    assert replicas.admin("PATCH", "/hugo", {"disabled": False}).status == 200
    assert replicas.all_say(key, served)
    assert replicas.admin("DELETE", "/hugo").status == 200
    assert replicas.all_say(key, refused("not known"))


def test_after_a_rotation_the_old_key_is_served_until_its_grace_ends(replicas: Replicas) -> None:
    old = replicas.create("carol")
    assert all(map(served, replicas.answers(old)))
    new = replicas.admin("POST", "/carol/rotate", {"grace": "4s"}).json()["key"]
    ends_s = time.monotonic() + 4
    assert all(map(served, replicas.answers(new)))
    assert all(map(served, replicas.answers(old)))
    assert time.monotonic() < ends_s, "too slow a machine for this to show anything"
    assert replicas.all_say(old, refused("replaced"), 4 + _PATIENCE_S)
    assert all(map(served, replicas.answers(new)))


def test_the_shell_makes_a_key_that_works(replicas: Replicas, tmp_path: Path) -> None:
    words = ["create", "dave", "--team", "red", "--url", f"http://127.0.0.1:{replicas.admin_ports[0]}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "keys", *words],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TIERWAY_ADMIN_KEY": ADMIN_KEY},
        timeout=30,
    )
    key = json.loads(done.stdout)["key"]
    assert all(map(served, replicas.answers(key)))


def test_while_the_store_is_frozen_known_keys_are_believed_for_their_time_and_strange_ones_not_denied(
    replicas: Replicas,
) -> None:
    key = replicas.create("erin")
    for _ in range(4):  # until both workers have surely met it
        assert all(map(served, replicas.answers(key)))
    os.kill(replicas.redis.pid, signal.SIGSTOP)
    try:
        assert all(map(served, replicas.answers(key)))
        strange = replicas.gateways[1].get("/v1/models", "tw-nobody")
        assert (strange.status, strange.error["code"]) == (503, "keys_unavailable")
        assert replicas.admin("GET", "", replica=1).status == 503
        assert replicas.all_say(key, lambda reply: reply.status == 503, 10)
        assert all(map(served, replicas.answers(ALICE))), "keys of the configuration need no store"
    finally:
        os.kill(replicas.redis.pid, signal.SIGCONT)
    assert replicas.all_say(key, served, 5)
    assert replicas.all_say("tw-nobody", refused("not known"), 5)


def test_no_key_is_in_any_log(replicas: Replicas) -> None:
    key = replicas.create("frank")
    assert all(map(served, replicas.answers(key)))
    for replica in (0, 1):
        replicas.admin("GET", f"/{key}", replica=replica)
    replicas.gateways[0].get("/v1/models", key[:-1])
    for gateway in replicas.gateways:
        assert wait_until(lambda gateway=gateway: "refused" in gateway.process.said())  # type: ignore[misc]
        said = gateway.process.said()
        assert key[:-1] not in said
        assert ADMIN_KEY not in said
        assert "Traceback" not in said
