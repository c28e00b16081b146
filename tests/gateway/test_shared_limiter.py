"""Do replicas keep their limits together while the store answers, and each its promise while it does not?

Against real servers that are frozen, killed, restarted empty, restored from an old snapshot and slow.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest

from gateway.limiter import Closed, Order
from gateway.redis_store import Place, Tls
from gateway.shared_limiter import SharedLimiter
from policies.accounts import Entry, Rolling
from policies.operations import Granted, Refused
from tests.gateway.limiting import (
    ask,
    concurrent,
    count_granted,
    granted,
    item,
    order,
    place_of,
    replica,
    requests,
    spend,
    standing,
    stands_at,
    until,
)
from tests.servers.redis import (
    RedisServer,
    frozen,
    kill,
    running_cluster,
    running_redis,
    running_sentinel,
    say,
    wait_for,
)
from tests.servers.relay import CERTIFICATE, SERVER_NAME, relay_to

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with running_redis() as one:
        yield one


def play(place: Place, scene: Callable[[SharedLimiter], Awaitable[T]], **settings: float) -> T:
    async def run() -> T:
        async with replica(place, **settings) as limiter:  # type: ignore[arg-type]
            return await scene(limiter)

    return asyncio.run(run())


# -- while the store answers ------------------------------------------------------------------------------------------


def test_replicas_together_never_pass_a_limit(server: RedisServer) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            limiters = [await stack.enter_async_context(replica(place_of(server))) for _ in range(4)]
            limit = (requests(100), concurrent(60), spend(1_000_000, 10_000))
            assert sum(await asyncio.gather(*(count_granted(one, 50, *limit) for one in limiters))) == 60

    asyncio.run(scene())


def test_operations_of_one_turn_go_in_one_batch(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        await count_granted(limiter, 1, requests(1000))
        before = limiter.numbers.batches
        assert await count_granted(limiter, 60, requests(1000)) == 60
        assert limiter.numbers.batches == before + 1

    play(place_of(server), scene)


def test_what_is_settled_is_given_back_and_told_to_those_who_wait(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        freed = asyncio.Event()
        limiter.subscribe(freed.set)
        first = await granted(limiter, spend(100, 80))
        assert first is not None
        assert await granted(limiter, spend(100, 80)) is None
        limiter.settle(first, (15,))
        limiter.settle(first, (15,))
        await asyncio.wait_for(freed.wait(), 5)
        await stands_at(limiter, spend(100, 0), 15, 0)
        assert await granted(limiter, spend(100, 80)) is not None

    play(place_of(server), scene)


def test_what_is_cancelled_was_never_there(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        first = await granted(limiter, requests(1), spend(100, 80))
        assert first is not None
        limiter.cancel(first)
        limiter.settle(first, (0, 50))
        await stands_at(limiter, spend(100, 0), 0, 0)
        assert await granted(limiter, requests(1), spend(100, 80)) is not None

    play(place_of(server), scene)


def test_a_caller_who_leaves_while_asking_holds_nothing(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        for steps in range(8):
            asking = asyncio.ensure_future(granted(limiter, concurrent(1)))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            (got,) = await asyncio.gather(asking, return_exceptions=True)
            if isinstance(got, Order):
                limiter.cancel(got)
            await stands_at(limiter, concurrent(1), 0, 0)

    play(place_of(server), scene)


def test_a_long_reservation_outlives_its_lease_and_counts_what_it_used(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        wanted = order(spend(100, 80))
        used = [0]
        assert isinstance(await limiter.reserve(wanted, lambda: (used[0],)), Granted)
        used[0] = 90
        await stands_at(limiter, spend(100, 0), 0, 90)
        await asyncio.sleep(0.5)
        await stands_at(limiter, spend(100, 0), 0, 90)
        limiter.settle(wanted, (40,))
        await stands_at(limiter, spend(100, 0), 40, 0)

    play(place_of(server), scene, lease_s=0.3)


def test_a_replica_that_is_killed_gives_back_within_its_lease(server: RedisServer) -> None:
    code = (
        "import asyncio, sys\n"
        "from tests.gateway.limiting import granted, place_of, replica, concurrent\n"
        "from tests.servers.redis import RedisServer\n"
        "async def main():\n"
        "    server = RedisServer(pid=0, port=int(sys.argv[1]), password=sys.argv[2])\n"
        "    async with replica(place_of(server), lease_s=0.5) as limiter:\n"
        "        assert await granted(limiter, concurrent(1)) is not None\n"
        "        print('held', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )

    async def scene(limiter: SharedLimiter) -> None:
        assert other.stdout is not None
        assert await asyncio.to_thread(other.stdout.readline) == b"held\n"
        assert await granted(limiter, concurrent(1)) is None
        os.kill(other.pid, signal.SIGKILL)
        await stands_at(limiter, concurrent(1), 0, 0)

    command = [sys.executable, "-c", code, str(server.port), server.password]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other:
        try:
            play(place_of(server), scene)
        finally:
            other.kill()


def test_partitions_are_apart_and_forgotten_when_nobody_uses_them(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        for name in ("team=a", "team=b"):
            assert await granted(limiter, requests(1), partition=name) is not None
            assert await granted(limiter, requests(1), partition=name) is None
        assert limiter.partitions == 3

    play(place_of(server), scene)


def test_a_partition_without_traffic_is_dropped(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.shared_limiter._DROPPED_AFTER_S", 0.0)
    monkeypatch.setattr("gateway.shared_limiter._TEND_EVERY_S", 0.01)

    async def scene(limiter: SharedLimiter) -> None:
        held = await granted(limiter, requests(1), partition="team=a")
        await asyncio.sleep(0.1)
        assert limiter.partitions == 2
        assert held is not None
        limiter.settle(held, (0,))
        await until(lambda: limiter.partitions == 1)
        assert await granted(limiter, requests(1), partition="team=a") is None

    play(place_of(server), scene)


# -- while it does not ------------------------------------------------------------------------------------------------


async def _all_fast(asking: list[Awaitable[T]], bound_s: float) -> list[T]:
    async def timed(one: Awaitable[T]) -> tuple[T, float]:
        began_s = time.monotonic()
        return await one, time.monotonic() - began_s

    answers = await asyncio.gather(*(timed(one) for one in asking))
    # Ten times: only to catch what hangs. The exact bound is for the proofs.
    assert max(took_s for _, took_s in answers) < 10 * bound_s
    return [answer for answer, _ in answers]


def test_while_the_store_is_frozen_each_mode_holds_and_nobody_waits(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        open_, closed, share = (requests(4, when_down=mode, account=mode) for mode in ("open", "closed", "share"))
        assert await granted(limiter, open_, closed, share) is not None
        with frozen(server):
            answers = await _all_fast([ask(limiter, order(open_)) for _ in range(40)], 0.05)
            assert all(isinstance(one, Granted) for one in answers)
            assert limiter.state == "down"
            answers = await _all_fast([ask(limiter, order(open_, closed)) for _ in range(40)], 0.05)
            assert answers == [Closed((1,))] * 40
            answers = await _all_fast([ask(limiter, order(open_, share)) for _ in range(40)], 0.05)
            # Alone, its share is everything; what is open since before the fault is part of it.
            assert sum(isinstance(one, Granted) for one in answers) == 3
            assert {one.short[0].index for one in answers if isinstance(one, Refused)} == {1}
        await until(lambda: limiter.numbers.came_back == 1)
        assert limiter.numbers.went_down == 1

    play(place_of(server, timeout_s=0.05), scene)


def test_shares_of_those_last_seen_alive_are_never_more_than_the_whole(server: RedisServer) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            place = place_of(server, timeout_s=0.05)
            limiters = [await stack.enter_async_context(replica(place)) for _ in range(3)]
            await until(lambda: all(_alive(one) == 3 for one in limiters))
            with frozen(server):
                got = [await count_granted(one, 10, concurrent(8)) for one in limiters]
                assert sorted(got) == [2, 3, 3]
            # Everything that was let through is known to the store before it decides again.
            await stands_at(limiters[0], concurrent(8), 0, 8)
            await until(lambda: all(one.state == "shared" for one in limiters))
            assert await granted(limiters[1], concurrent(8)) is None

    asyncio.run(scene())


def _alive(limiter: SharedLimiter) -> int:
    return len(next(iter(limiter._partitions.values()))._alone.replicas)


def test_a_replica_that_never_saw_the_store_starts_with_its_share_of_those_expected(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        assert limiter.state in ("reconciling", "down")
        assert await count_granted(limiter, 20, concurrent(10)) == 2
        os.kill(server.pid, signal.SIGCONT)
        await stands_at(limiter, concurrent(10), 0, 2)
        assert await count_granted(limiter, 20, concurrent(10)) == 8

    with frozen(server):
        play(place_of(server, timeout_s=0.05), scene, expected_replicas=4)


def test_what_was_granted_and_used_meanwhile_is_counted_once(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        budget = spend(1000, 100, when_down="open")
        before = [await granted(limiter, budget) for _ in range(3)]
        with frozen(server):
            within = [await granted(limiter, budget) for _ in range(4)]
            # Two of each kind end while the store is away: by their id, and as a sum.
            for one in (*before[:2], *within[:2]):
                assert one is not None
                limiter.settle(one, (30,))
        await stands_at(limiter, budget, 120, 300)
        for one in (*before, *within):
            assert one is not None
            limiter.settle(one, (50,))
        await stands_at(limiter, budget, 120 + 150, 0)

    play(place_of(server, timeout_s=0.05), scene)


def test_a_reservation_whose_answer_came_too_late_is_cancelled(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        closed = requests(2, when_down="closed")
        wanted = order(closed)
        with frozen(server):
            # It is in the socket of the frozen server, which will execute it when it thaws.
            assert await ask(limiter, wanted) == Closed((0,))
        await stands_at(limiter, closed, 0, 0)
        # The same request, waiting for its turn, asks again under the same id.
        assert isinstance(await ask(limiter, wanted), Granted)
        assert await count_granted(limiter, 3, closed) == 1

    play(place_of(server, timeout_s=0.05), scene)


def test_a_reservation_granted_here_while_the_store_granted_it_too_is_held_once(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        with frozen(server):
            wanted = order(concurrent(2, when_down="open"))
            ended = order(concurrent(2, when_down="open"))
            assert all(
                isinstance(one, Granted) for one in await asyncio.gather(ask(limiter, wanted), ask(limiter, ended))
            )
            limiter.settle(ended, (0,))
        await stands_at(limiter, concurrent(2), 0, 1)
        limiter.settle(wanted, (0,))
        await stands_at(limiter, concurrent(2), 0, 0)

    play(place_of(server, timeout_s=0.05), scene)


def test_a_settlement_that_was_not_answered_is_neither_lost_nor_doubled(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        budget = spend(1000, 100)
        held = [await granted(limiter, budget) for _ in range(10)]
        with frozen(server):
            for one in held:
                assert one is not None
                limiter.settle(one, (7,))
            await until(lambda: limiter.state == "down")
        await stands_at(limiter, budget, 70, 0)

    play(place_of(server, timeout_s=0.05), scene)


def test_what_is_held_for_longer_than_its_lease_while_the_store_is_away_is_announced_first(
    server: RedisServer,
) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        assert await granted(limiter, concurrent(1)) is not None
        with frozen(server):
            await until(lambda: limiter.state == "down")
            await asyncio.sleep(0.6)
        await until(lambda: limiter.state == "shared")
        assert await granted(limiter, concurrent(1)) is None

    play(place_of(server, timeout_s=0.05), scene, lease_s=0.5)


def test_a_store_that_answers_in_seconds_is_down(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        assert await granted(limiter, requests(10)) is not None
        relay.delay_s = 2.0
        await _all_fast([ask(limiter, order(requests(10))) for _ in range(20)], 0.05)
        assert limiter.state == "down"
        relay.delay_s = 0.0
        await until(lambda: limiter.state == "shared")
        assert (await standing(limiter, requests(10))).used == 10

    with relay_to(server.port) as relay:
        place = Place(addresses=(("127.0.0.1", relay.port),), password=server.password, timeout_s=0.05)
        play(place, scene)


def test_it_is_said_once_when_it_goes_down_and_once_when_it_is_back(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        for name in ("a", "b", "c"):
            await granted(limiter, requests(100), partition=name)
        with frozen(server):
            for name in ("a", "b", "c", "a"):
                await granted(limiter, requests(100), partition=name)
            await asyncio.sleep(0.5)
        await until(lambda: all(one.mode == "shared" for one in limiter._partitions.values()))

    with caplog.at_level(logging.INFO, "tierway.limits"):
        play(place_of(server, timeout_s=0.05), scene)
    assert [record.message.split(",")[0] for record in caplog.records] == ["the store is down", "the store is back"]


# -- when it has lost its data ----------------------------------------------------------------------------------------


class Machine:
    """A server that can be killed and started again on the same port, in the same folder."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.server = stack.enter_context(running_redis(folder=folder))

    def restart(self) -> None:
        self._stack.enter_context(running_redis(self.server.port, password=self.server.password, folder=self._folder))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(stack, tmp_path)


async def _back(limiter: SharedLimiter) -> None:
    await until(lambda: limiter.state in ("shared", "unseeded") and limiter.numbers.came_back > 0)


def test_after_an_empty_restart_open_reservations_are_there_and_budgets_follow_the_mode(machine: Machine) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        budget = spend(1000, 100, when_down="share")
        held = await granted(limiter, budget, concurrent(3))
        assert held is not None
        done = [await granted(limiter, budget) for _ in range(5)]
        for one in done:
            assert one is not None
            limiter.settle(one, (100,))
        await stands_at(limiter, budget, 500, 100)
        kill(machine.server)
        await until(lambda: limiter.state == "down")
        machine.restart()
        await _back(limiter)
        assert limiter.state == "unseeded"
        await stands_at(limiter, concurrent(3), 0, 1)
        # The store has forgotten the 500; this process has not, nor the 100 that are open.
        assert await count_granted(limiter, 10, budget) == 4
        closed = spend(1000, 1, when_down="closed")
        assert await ask(limiter, order(closed)) == Closed((0,))
        assert await granted(limiter, concurrent(3)) is not None
        # Whoever knows the totals tells them, once.
        totals = (Entry("spend", budget.entry.rule, 500),)
        assert await limiter.seed("deployment", totals)
        assert not await limiter.seed("deployment", totals)
        await stands_at(limiter, budget, 500, 500)
        assert await granted(limiter, budget) is None
        limiter.settle(held, (100, 0))
        await stands_at(limiter, budget, 600, 400)

    play(place_of(machine.server, timeout_s=0.2), scene)


def test_after_an_old_snapshot_nothing_runs_before_the_loss_is_known(machine: Machine) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        budget = spend(1000, 100)
        first = await granted(limiter, budget)
        assert first is not None
        limiter.settle(first, (100,))
        await stands_at(limiter, budget, 100, 0)
        await asyncio.to_thread(say, machine.server, "SAVE")
        await asyncio.sleep(2.2)
        later = [await granted(limiter, budget) for _ in range(3)]
        for one in later[:2]:
            assert one is not None
            limiter.settle(one, (100,))
        await stands_at(limiter, budget, 300, 100)
        kill(machine.server)
        machine.restart()
        await until(lambda: limiter.state == "unseeded")
        assert later[2] is not None
        # What is open was announced, though the snapshot did not know it.
        assert (await standing(limiter, budget)).reserved == 100
        assert await limiter.seed("deployment", (Entry("spend", budget.entry.rule, 300),))
        await stands_at(limiter, budget, 300, 100)

    play(place_of(machine.server, timeout_s=0.2), scene)


def test_data_that_is_wiped_under_open_connections_is_noticed_before_anything_is_decided(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        closed = spend(1000, 10, when_down="closed")
        held = await granted(limiter, concurrent(2), closed)
        assert held is not None
        await asyncio.to_thread(say, server, "FLUSHALL")
        # All of one batch, and none of it is decided by accounts that are suddenly empty.
        replies = await asyncio.gather(*(ask(limiter, order(concurrent(2))) for _ in range(5)))
        assert sum(isinstance(one, Granted) for one in replies) == 1
        assert limiter.state == "unseeded"
        assert await ask(limiter, order(closed)) == Closed((0,))
        assert limiter.numbers.went_down == 0
        limiter.settle(held, (0, 4))
        await stands_at(limiter, closed, 4, 0)

    play(place_of(server), scene)


def test_a_settlement_of_what_was_lost_is_counted_all_the_same(machine: Machine) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        budget = spend(1000, 100)
        held = await granted(limiter, budget)
        assert held is not None
        kill(machine.server)
        limiter.settle(held, (60,))
        await until(lambda: limiter.state == "down")
        machine.restart()
        await _back(limiter)
        await stands_at(limiter, budget, 60, 0)

    play(place_of(machine.server, timeout_s=0.2), scene)


def test_rolling_windows_are_in_doubt_too(machine: Machine) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        window = item("window", Rolling(100, 3_600_000), taken=10)
        assert await count_granted(limiter, 6, window) == 6
        kill(machine.server)
        await until(lambda: limiter.state == "down")
        machine.restart()
        await _back(limiter)
        assert limiter.state == "unseeded"
        assert await count_granted(limiter, 20, window) == 4

    play(place_of(machine.server, timeout_s=0.2), scene)


def test_a_failover_is_survived_with_what_is_open() -> None:
    async def scene(limiter: SharedLimiter) -> None:
        held: list[Order | None] = [await granted(limiter, concurrent(5)) for _ in range(2)]
        await asyncio.to_thread(kill, watched.master)
        assert await granted(limiter, concurrent(5)) is not None
        await _back(limiter)
        await stands_at(limiter, concurrent(5), 0, 3)
        assert await count_granted(limiter, 5, concurrent(5)) == 2
        assert None not in held

    with running_sentinel() as watched:
        place = Place(
            addresses=(("127.0.0.1", watched.sentinel.port),),
            mode="sentinel",
            master=watched.name,
            password=watched.master.password,
            timeout_s=0.2,
        )
        wait_for(lambda: "role:slave" in say(watched.replica, "INFO replication"))
        play(place, scene)


# -- everything at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_whatever_goes_wrong_nothing_is_lost_and_nothing_counted_twice(server: RedisServer, seed: int) -> None:
    """Frozen, slow, cut off and without its scripts, under clients that leave, cancel and settle twice."""

    async def scene() -> None:
        random = Random(seed)
        place = Place(addresses=(("127.0.0.1", relay.port),), password=server.password, timeout_s=0.05)
        items = (spend(10**12, 1000, when_down="open"), concurrent(10**6, when_down="open"))
        total, stopped = 0, False

        async def client(limiter: SharedLimiter) -> None:
            nonlocal total
            while not stopped:
                wanted = order(*items)
                asking = asyncio.ensure_future(ask(limiter, wanted))
                if random.random() < 0.05:
                    await asyncio.sleep(random.random() * 0.01)
                    asking.cancel()
                (reply,) = await asyncio.gather(asking, return_exceptions=True)
                if isinstance(reply, Granted):
                    await asyncio.sleep(random.random() * 0.05)
                    if random.random() < 0.1:
                        limiter.cancel(wanted)
                    actual = random.randrange(1500)
                    total += actual if wanted.id in _open_in(limiter) else 0
                    limiter.settle(wanted, (actual, 0))
                    limiter.settle(wanted, (actual, 0))
                await asyncio.sleep(random.random() * 0.01)

        async def fault() -> None:
            await asyncio.sleep(random.random() * 0.2)
            match random.randrange(4):
                case 0:
                    with frozen(server):
                        await asyncio.sleep(random.random() * 0.3)
                case 1:
                    relay.delay_s = random.choice((0.03, 0.2))
                    await asyncio.sleep(random.random() * 0.3)
                    relay.delay_s = 0.0
                case 2:
                    await asyncio.to_thread(say, server, "CLIENT KILL TYPE normal")
                case 3:
                    await asyncio.to_thread(say, server, "SCRIPT FLUSH")

        async with AsyncExitStack() as stack:
            limiters = [await stack.enter_async_context(replica(place)) for _ in range(2)]
            clients = [asyncio.ensure_future(client(limiter)) for limiter in limiters for _ in range(10)]
            for _ in range(5):
                await fault()
            stopped = True
            await asyncio.gather(*clients)
            await stands_at(limiters[0], items[0], total, 0)
            await stands_at(limiters[0], items[1], 0, 0)

    with relay_to(server.port) as relay:
        asyncio.run(scene())


def _open_in(limiter: SharedLimiter) -> set[str]:
    return {id_ for partition in limiter._partitions.values() for id_ in partition._held}


def test_of_a_cluster_only_what_lies_on_the_dead_node_is_down() -> None:
    async def scene(limiter: SharedLimiter) -> None:
        names = [f"team={number}" for number in range(12)]
        for name in names:
            assert await granted(limiter, requests(10), partition=name) is not None
        places = {name: limiter._partitions[name].place for name in names}
        dead = f"127.0.0.1:{servers[2].port}"
        assert dead in places.values()
        os.kill(servers[2].pid, signal.SIGSTOP)
        try:
            for name in names:
                assert await granted(limiter, requests(10), partition=name) is not None
            down = {name for name in names if limiter._partitions[name].mode != "shared"}
            assert down == {name for name in names if places[name] == dead}
        finally:
            os.kill(servers[2].pid, signal.SIGCONT)
        await until(lambda: all(one.mode == "shared" for one in limiter._partitions.values()))
        for name in names:
            found = (await limiter.look(name, (requests(10),)))[0]
            assert found.used == 2

    with running_cluster(3) as servers:
        place = Place(
            addresses=tuple(("127.0.0.1", one.port) for one in servers),
            mode="cluster",
            password=servers[0].password,
            timeout_s=0.2,
        )
        play(place, scene)


def test_limits_are_shared_over_tls(server: RedisServer) -> None:
    async def scene(limiter: SharedLimiter) -> None:
        assert limiter.state == "shared"
        assert await count_granted(limiter, 20, requests(7)) == 7

    with relay_to(server.port, tls=True) as relay:
        tls = Tls(ca=str(CERTIFICATE), server_name=SERVER_NAME)
        address = (("127.0.0.1", relay.port),)
        play(Place(addresses=address, password=server.password, tls=tls, timeout_s=1.0), scene)
