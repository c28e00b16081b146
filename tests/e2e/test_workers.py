"""Are several workers one gateway to everybody outside, and gone when their parent is?"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ALICE, BOB, Gateway, Stack, alive, descendants, wait_until


@pytest.fixture(scope="module")
def pair(session_stack: Stack) -> Iterator[Gateway]:
    session_stack.reset()
    gateway = session_stack.start_gateway("--workers", "2")
    assert wait_until(lambda: len(workers(gateway)) == 2)
    yield gateway
    gateway.process.stop()


def workers(gateway: Gateway) -> list[int]:
    """Return the process ids of the workers, in the order of their numbers."""
    found = {}
    for pid in descendants(gateway.pid):
        try:
            told = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"gateway.serve" in told:
            number = re.search(rb'"worker":(\d+)', b" ".join(told))
            assert number is not None
            found[int(number[1])] = pid
    return [found[number] for number in sorted(found)]


def asked_of_both(gateway: Gateway) -> dict[str, list[str]]:
    """Ask until both workers have answered; return the exchange ids by worker."""
    found: dict[str, list[str]] = {}
    for _ in range(400):
        exchange_id = gateway.chat().headers["x-tierway-exchange-id"]
        found.setdefault(exchange_id[:4], []).append(exchange_id)
        if len(found) == 2:
            return found
    raise AssertionError(f"only {set(found)} answered")


def answered(gateway: Gateway) -> float:
    found = re.findall(
        r'tierway_exchanges_total\{route="auto",ending="answered"\} (\d+)', gateway.get("/metrics").body.decode()
    )
    return float(found[0]) if found else 0.0


def test_a_decision_is_found_whichever_worker_is_asked(pair: Gateway) -> None:
    ids = [one for of_worker in asked_of_both(pair).values() for one in of_worker[:2]]
    # Every connection is a new one: within so many, both workers are asked for each.
    for exchange_id in ids * 20:
        reply = pair.get(f"/v1/requests/{exchange_id}", ALICE)
        assert (reply.status, reply.json()["exchange_id"]) == (200, exchange_id)
        assert pair.get(f"/v1/requests/{exchange_id}", BOB).status == 404
    assert pair.get("/v1/requests/tw00-" + "0" * 32, ALICE).status == 404
    assert pair.get("/v1/requests/tw7f-" + "0" * 32, ALICE).status == 404


def test_the_numbers_add_up(pair: Gateway) -> None:
    before = answered(pair)
    count = sum(map(len, asked_of_both(pair).values()))
    assert {answered(pair) for _ in range(20)} == {before + count}


def test_a_killed_worker_comes_back_and_nobody_waits_for_it(pair: Gateway) -> None:
    first, second = workers(pair)
    os.kill(second, signal.SIGKILL)
    for _ in range(20):
        assert pair.chat().status == 200
        assert pair.get("/metrics").status == 200
    assert wait_until(lambda: len(workers(pair)) == 2 and second not in workers(pair), 10)
    assert workers(pair)[0] == first
    assert len(asked_of_both(pair)) == 2
    assert "worker 1 died" in pair.process.said()


def test_sigterm_ends_all(session_stack: Stack) -> None:
    gateway = session_stack.start_gateway("--workers", "2")
    assert wait_until(lambda: len(workers(gateway)) == 2)
    family = descendants(gateway.pid)
    gateway.process.signal(signal.SIGTERM)
    gateway.process.wait(10)
    assert wait_until(lambda: not any(map(alive, family)), 5), [pid for pid in family if alive(pid)]


def test_kill_9_of_the_parent_leaves_no_worker(session_stack: Stack) -> None:
    gateway = session_stack.start_gateway("--workers", "2")
    assert wait_until(lambda: len(workers(gateway)) == 2)
    asked_of_both(gateway)
    family = descendants(gateway.pid)
    assert len(family) >= 2
    gateway.process.kill()
    assert wait_until(lambda: not any(map(alive, family)), 5), [pid for pid in family if alive(pid)]


def test_kill_9_of_one_process_leaves_no_helper(session_stack: Stack) -> None:
    gateway = session_stack.start_gateway()
    gateway.chat(messages=[{"role": "user", "content": "x" * 200_000}])
    family = descendants(gateway.pid)
    assert family, "large bodies are read in a process of their own"
    gateway.process.kill()
    assert wait_until(lambda: not any(map(alive, family)), 5)


def test_a_killed_helper_costs_no_request(session_stack: Stack) -> None:
    gateway = session_stack.start_gateway()
    for _ in range(3):
        assert gateway.chat(messages=[{"role": "user", "content": "x" * 200_000}]).status == 200
        for pid in descendants(gateway.pid):
            os.kill(pid, signal.SIGKILL)
    gateway.process.stop()
