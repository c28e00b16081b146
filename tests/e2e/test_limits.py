"""Do limits hold over workers and HTTP, and do clients understand what they are told?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.running import ALICE, BOB, HELLO, NARROW, OPERATOR, ROOT, Gateway, Reply, Stack, wait_until
from tests.servers.redis import RedisServer, running_redis

_LIMITS: list[dict[str, Any]] = [
    {"name": "alices-hour", "scope": {"key": "alice"}, "requests": {"limit": 40, "per": "hour"}},
    {"name": "bobs-second", "scope": {"key": "bob"}, "requests": {"limit": 1, "per": "second"}},
    {
        "name": "narrow-budget",
        "scope": {"key": "narrow"},
        "spend": {"usd": "0.0005"},
        "reserve": "strict",
        "when_down": "closed",
    },
    {
        "name": "users",
        "scope": {"key": "operator", "user": "each"},
        "tokens": {"limit": 100_000, "per": "day"},
        "concurrent": 2,
        "max_wait": "10s",
    },
]


def _config(stack: Stack, redis: RedisServer) -> Any:
    config = stack.config()
    for tier in config["tiers"]:
        tier["context_tokens"] = 8192
    config["limits"] = _LIMITS
    config["state"] = {
        "kind": "redis",
        "addresses": [f"127.0.0.1:{redis.port}"],
        "password": {"from": "env", "name": "REDIS_PASSWORD"},
        "timeout": "2s",
    }
    return config


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def gateway(session_stack: Stack, redis: RedisServer) -> Iterator[Gateway]:
    session_stack.reset()
    config = _config(session_stack, redis)
    with Gateway(
        config, session_stack.folder, "--workers", "2", environment={"REDIS_PASSWORD": redis.password}
    ) as running:
        yield running


def own_limits(gateway: Gateway, key: str, query: str = "") -> dict[str, dict[str, Any]]:
    reply = gateway.get(f"/v1/limits{query}", key)
    assert reply.status == 200, reply
    return {f"{one['name']}/{one['measure']}": one for one in reply.json()["data"]}


def ask_all(gateway: Gateway, bodies: list[dict[str, Any]], key: str) -> list[Reply]:
    with ThreadPoolExecutor(24) as threads:
        return list(threads.map(lambda body: gateway.post("/v1/chat/completions", body, key), bodies))


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": HELLO, **fields}


def test_a_burst_over_two_workers_gets_exactly_the_limit(gateway: Gateway) -> None:
    replies = ask_all(gateway, [body(stream=bool(number % 2)) for number in range(100)], ALICE)
    assert Counter(reply.status for reply in replies) == {200: 40, 429: 60}
    assert len({reply.headers["x-tierway-exchange-id"][:4] for reply in replies}) == 2
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.error["code"] == "rate_limit_exceeded"
    assert "'alices-hour' (key=alice)" in refused.error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 90
    assert {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"40"}
    assert (own_limits(gateway, ALICE)["alices-hour/requests"])["used"] in (39, 40)
    metrics = gateway.get("/metrics").body.decode()
    assert 'tierway_limited_total{limit="alices-hour",measure="requests",shadow="false"} 60' in metrics
    assert "tierway_limits_apart 0" in metrics


def test_the_sdk_waits_for_what_it_was_told_and_gets_in(gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=BOB, max_retries=3)
    for _ in range(2):
        raw = client.chat.completions.with_raw_response.create(**body())
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        assert raw.parse().choices[0].message.content
    impatient = client.with_options(max_retries=0)

    def ask_thrice() -> None:
        for _ in range(3):
            impatient.chat.completions.create(**body())

    with pytest.raises(openai.RateLimitError) as refused:
        ask_thrice()
    assert refused.value.code == "rate_limit_exceeded"


def test_a_budget_lands_and_is_not_asked_again(gateway: Gateway, session_stack: Stack) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=NARROW, max_retries=3)

    def spend_it() -> None:
        for _ in range(500):
            client.chat.completions.create(**body(model="small", max_tokens=16))

    with pytest.raises(openai.APIStatusError) as refused:
        spend_it()
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_quota")
    assert wait_until(lambda: own_limits(gateway, NARROW)["narrow-budget/spend"]["reserved"] == "0")
    spent = own_limits(gateway, NARROW)["narrow-budget/spend"]
    assert 0.0004 < float(spent["used"]) <= 0.0005
    seen = session_stack.small.seen
    assert session_stack.small.idle()
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(**body(model="small", max_tokens=16))
    assert session_stack.small.seen == seen


def test_users_wait_for_their_own_requests_and_for_nobody_elses(gateway: Gateway) -> None:
    bodies = [body(user=f"user-{number % 3}", max_tokens=50) for number in range(30)]
    replies = ask_all(gateway, bodies, OPERATOR)
    assert Counter(reply.status for reply in replies) == {200: 30}
    assert wait_until(lambda: own_limits(gateway, OPERATOR, "?user=user-1")["users/tokens"]["reserved"] == 0)
    usage = [reply.json()["usage"] for reply, asked in zip(replies, bodies, strict=True) if asked["user"] == "user-1"]
    used = sum(one["total_tokens"] for one in usage)
    shown = own_limits(gateway, OPERATOR, "?user=user-1")
    # What has drained since is at most a token or two a second.
    assert used - 60 <= shown["users/tokens"]["used"] <= used
    assert shown["users/concurrent"]["used"] == shown["users/concurrent"]["reserved"] == 0
    assert own_limits(gateway, OPERATOR, "?user=nobody")["users/tokens"]["used"] == 0


def test_limits_are_the_callers_own_and_need_a_key(gateway: Gateway) -> None:
    assert set(own_limits(gateway, ALICE)) == {"alices-hour/requests"}
    assert gateway.get("/v1/limits").status == 401


def test_a_store_that_never_answers_keeps_nobody_waiting_and_modes_hold(session_stack: Stack) -> None:
    session_stack.reset()
    with running_redis() as gone:
        config = _config(session_stack, gone)
        password = gone.password
    config["state"]["timeout"] = "50ms"
    with Gateway(config, session_stack.folder, "--workers", "2", environment={"REDIS_PASSWORD": password}) as gateway:
        replies = ask_all(gateway, [body() for _ in range(60)], ALICE)
        # Two workers, each with its half.
        assert 20 <= Counter(reply.status for reply in replies)[200] <= 40
        closed = gateway.post("/v1/chat/completions", body(model="small", max_tokens=16), NARROW)
        assert (closed.status, closed.error["code"]) == (503, "limits_unavailable")
        assert "retry-after" in closed.headers
        assert "tierway_limits_apart 2" in gateway.get("/metrics").body.decode()


def test_budgets_that_were_lost_are_told_again_once(session_stack: Stack, tmp_path: Path) -> None:
    session_stack.reset()
    with running_redis() as first:
        port, password = first.port, first.password
        # Where there is no ledger to know it.
        config = _config(session_stack, first) | {"ledger": {"store": {"kind": "none"}}}
        gateway = Gateway(config, session_stack.folder, environment={"REDIS_PASSWORD": password})
    with gateway:
        cheap = body(model="small", max_tokens=16)
        with running_redis(port, password=password):

            def status() -> int:
                return gateway.post("/v1/chat/completions", cheap, NARROW).status

            # Its mode is closed until somebody says what was spent.
            assert wait_until(lambda: "lost" in gateway.process.said(), 10)
            assert status() == 503
            file = tmp_path / "gateway.yaml"
            file.write_text(json.dumps(config))
            totals = {"limit": "narrow-budget", "scope": {"key": "narrow"}, "usd": "0.0004"}
            said = [seed(file, password, {"totals": [totals]}) for _ in range(2)]
            assert re.search(r"1 totals, counted", said[0])
            assert re.search(r"nothing was changed", said[1])
            assert wait_until(lambda: status() == 200, 5, 0.1)
            spent = float(own_limits(gateway, NARROW)["narrow-budget/spend"]["used"])
            assert 0.0004 < spent < 0.0005


def test_budgets_that_were_lost_are_known_again_from_the_ledger(session_stack: Stack, tmp_path: Path) -> None:
    session_stack.reset()
    with running_redis() as first:
        port, password = first.port, first.password
        store = {"kind": "sqlite", "path": str(tmp_path / "ledger.db")}
        config = _config(session_stack, first) | {"ledger": {"store": store}}
        gateway = Gateway(config, session_stack.folder, "--workers", "2", environment={"REDIS_PASSWORD": password})
        cheap = body(model="small", max_tokens=16)
        assert [gateway.post("/v1/chat/completions", cheap, NARROW).status for _ in range(5)] == [200] * 5

        def spent() -> str:
            found: str = own_limits(gateway, NARROW)["narrow-budget/spend"]["used"]
            return found

        assert wait_until(lambda: own_limits(gateway, NARROW)["narrow-budget/spend"]["reserved"] == "0", 5, 0.1)
        before = spent()
        assert float(before) > 0
    with gateway, running_redis(port, password=password):
        assert wait_until(lambda: "lost" in gateway.process.said(), 10)
        assert wait_until(lambda: spent() == before, 10, 0.1), (spent(), before)
        assert gateway.post("/v1/chat/completions", cheap, NARROW).status == 200


def seed(config: Path, password: str, totals: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "limits", "seed", "-", "--config", str(config)],
        input=json.dumps(totals).encode(),
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={"REDIS_PASSWORD": password},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()
