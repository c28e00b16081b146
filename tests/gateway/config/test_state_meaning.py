"""Is everything told that does not fit together in the settings of the store?"""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.load import ConfigError, parse
from gateway.config.model import MemoryState, RedisState

GOOD = (Path(__file__).parent / "good.yaml").read_text()


def problems_of(state: str) -> list[str]:
    try:
        parse(f"{GOOD}state: {{{state}}}\n", "g")
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_without_a_word_memory_counts() -> None:
    assert parse(GOOD).config.state == MemoryState()


def test_a_redis_has_its_defaults() -> None:
    state = parse(GOOD + "state: {kind: redis, addresses: [r:6379]}\n").config.state
    assert state == RedisState(addresses=("r:6379",))
    assert isinstance(state, RedisState)
    assert (state.timeout, state.lease, state.partition) == (0.05, 30.0, "deployment")


@pytest.mark.parametrize(
    "state",
    [
        "kind: memory, per_worker_shares: true",
        'kind: redis, addresses: ["[::1]:6379"], database: 3, user: u, tls: {server_name: redis.example}',
        "kind: redis, addresses: [s1:26379, s2:26379], mode: sentinel, master: mymaster",
        "kind: redis, addresses: [n1:1, n2:65535], mode: cluster, partition: team",
        "kind: redis, addresses: [r:1], timeout: 2s, lease: 1s, expected_replicas: 8, keys_valid_for: 1m",
    ],
)
def test_what_fits_is_taken(state: str) -> None:
    assert problems_of(state) == []


CASES = {
    "two standalone": (
        "kind: redis, addresses: [a:1, b:1]",
        "20:39: state.addresses[1]: a second server, and `standalone` has one; `mode: sentinel` and `mode: cluster` have several",
    ),
    "no master": (
        "kind: redis, addresses: [a:1], mode: sentinel",
        "20:46: state.mode: `sentinel` needs `master`, the name of the master that they watch",
    ),
    "a master of its own": (
        "kind: redis, addresses: [a:1], master: m",
        "20:48: state.master: means something with `mode: sentinel` only",
    ),
    "database of a cluster": (
        "kind: redis, addresses: [a:1], mode: cluster, database: 1",
        "20:65: state.database: a cluster has only database 0; leave it out",
    ),
    "port 0": ("kind: redis, addresses: [a:0]", "20:34: state.addresses[0]: 0 is no port; those are 1 to 65535"),
    "port 65536": (
        "kind: redis, addresses: [a:65536]",
        "20:34: state.addresses[0]: 65536 is no port; those are 1 to 65535",
    ),
    "node twice": (
        "kind: redis, addresses: [a:1, b:1, a:1], mode: cluster",
        "20:44: state.addresses[2]: `a:1` twice; the first is at 20:34",
    ),
    "no port": (
        "kind: redis, addresses: [redis-1]",
        "20:34: state.addresses[0]: expected a `host:port` such as `redis-1:6379`",
    ),
    "an url with a password": (
        'kind: redis, addresses: ["redis://:sesame@a:1"]',
        "20:34: state.addresses[0]: expected a `host:port` such as `redis-1:6379`",
    ),
    "no address": ("kind: redis, addresses: []", "20:33: state.addresses: expected a list, at least 1, found none"),
    "missing address": ("kind: redis", "20:8: state: missing key `addresses`"),
    "another store": (
        "kind: reddis, addresses: [a:1]",
        "20:15: state.kind: expected one of `memory`, `redis`, found `reddis`; did you mean `redis`?",
    ),
    "mode misspelt": (
        "kind: redis, addresses: [a:1, b:1], mode: clutser",
        "20:51: state.mode: expected one of `cluster`, `sentinel`, `standalone`, found `clutser`; did you mean `cluster`?",
    ),
    "master misspelt": (
        "kind: redis, addresses: [a:1], mode: sentinel, mastre: m",
        "20:56: state: unknown key `mastre`; did you mean `master`?",
    ),
    "short lease": (
        "kind: redis, addresses: [a:1], lease: 10ms",
        "20:47: state.lease: must be at least `1s`, found `10ms`",
    ),
    "long timeout": (
        "kind: redis, addresses: [a:1], timeout: 1m",
        "20:49: state.timeout: must be at most `10s`, found `1m`",
    ),
    "password in the file": (
        "kind: redis, addresses: [a:1], password: sesame",
        "20:50: state.password: expected a reference such as `{from: env, name: …}` (a secret never stands in this file), found text",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told_with_its_place(case: str) -> None:
    state, message = CASES[case]
    assert problems_of(state) == [f"g:{message}"]
