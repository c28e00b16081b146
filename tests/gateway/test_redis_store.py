"""Does the door to Redis keep its word, whatever the server does? Against real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from gateway.redis_store import Place, RedisStore, Script, ServerChanged, StoreDown, StoreMisused, Tls
from tests.servers.redis import (
    RedisServer,
    Watched,
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

ECHO = Script.of(
    "redis.call('INCR', KEYS[1]) local said = {} for i, one in ipairs(ARGV) do said[i] = one end return said"
)
# Far more than any bound under test, to tell one that does not end from one that is slow.
PATIENCE_S = 5.0


def place(server: RedisServer, **settings: object) -> Place:
    known: dict[str, object] = {
        "addresses": (("127.0.0.1", server.port),),
        "password": server.password,
        "timeout_s": 1.0,
    }
    return Place(**{**known, **settings})  # type: ignore[arg-type]


def using(where: Place, play: Callable[[RedisStore], Awaitable[T]]) -> T:
    async def run() -> T:
        store = RedisStore(where)
        try:
            return await play(store)
        finally:
            await store.close()
            await asyncio.sleep(0.01)

    return asyncio.run(run())


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[RedisServer, ...]]:
    with running_cluster() as servers:
        yield servers


def test_a_script_is_run_by_its_name_and_sent_where_it_is_not_known(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        assert await store.run(ECHO, "k", [b"a", b"\x00\r\n"]) == [b"a", b"\x00\r\n"]
        assert await store.command("SCRIPT", "FLUSH") == b"OK"
        assert await store.run(ECHO, "k", [b"b"]) == [b"b"]
        assert await store.command("GET", "k") == b"2"

    using(place(own_server), play)


def test_answers_of_every_kind_are_read(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        assert await store.command("SET", "k", b"x" * 300_000) == b"OK"
        assert await store.command("GET", "k") == b"x" * 300_000
        assert await store.command("GET", "none") is None
        assert await store.command("HSET", "h", "f", 1) == 1
        assert await store.command("HGETALL", "h") == [b"f", b"1"]
        assert await store.command("LRANGE", "l", 0, -1) == []

    using(place(own_server), play)


def test_a_mistake_of_ours_is_told_apart_from_a_store_that_is_down(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        with pytest.raises(StoreMisused):
            await store.command("HGET", "k")
        with pytest.raises(StoreMisused):
            await store.run(Script.of("return nosuch.thing"), "k", [])
        with pytest.raises(StoreMisused):
            await store.run(Script.of("return 1"), "k", [])
        assert await store.command("PING") == b"PONG"

    using(place(own_server), play)


@pytest.mark.parametrize("setting", ["min-replicas-to-write 1", "maxmemory 1"], ids=["too few replicas", "no memory"])
def test_a_server_that_takes_no_writes_is_down(own_server: RedisServer, setting: str) -> None:
    say(own_server, f"CONFIG SET {setting}")

    async def play(store: RedisStore) -> None:
        for _ in range(2):
            with pytest.raises(StoreDown):
                await store.run(ECHO, "k", [])
        with pytest.raises(StoreDown):
            await store.command("INCR", "k")

    using(place(own_server), play)


def test_a_replica_is_down_for_writes(own_server: RedisServer) -> None:
    say(own_server, "REPLICAOF 127.0.0.1 1")
    say(own_server, "CONFIG SET replica-serve-stale-data yes")

    async def play(store: RedisStore) -> None:
        for _ in range(2):
            with pytest.raises(StoreDown):
                await store.run(ECHO, "k", [])

    using(place(own_server), play)


def test_nobody_there_and_a_wrong_password_are_down(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        with pytest.raises(StoreDown):
            await store.command("PING")

    using(place(own_server, password="wrong"), play)
    kill(own_server)
    using(place(own_server), play)


def test_a_user_and_a_database_are_respected(own_server: RedisServer) -> None:
    say(own_server, "ACL SETUSER limits on >secret ~* +@all")

    async def play(store: RedisStore) -> None:
        await store.command("SET", "k", "here")

    using(place(own_server, user="limits", password="secret", database=3), play)
    assert say(own_server, "GET k") == "$-1\r\n"


def test_no_call_waits_longer_than_its_time_for_a_frozen_server(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> list[float]:
        async def ask() -> float:
            began_s = time.monotonic()
            with pytest.raises(StoreDown):
                await store.command("GET", "k")
            return time.monotonic() - began_s

        await store.command("GET", "k")
        with frozen(own_server):
            # More than there are connections: most wait for one, and some for the handshake of a new one.
            took_s = await asyncio.gather(*(ask() for _ in range(100)))
        assert await store.command("PING", within_s=PATIENCE_S) == b"PONG"
        return took_s

    assert max(using(place(own_server, timeout_s=0.05), play)) < 10 * 0.05


def test_a_late_answer_is_nobodys(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        for name in ("one", "two"):
            await store.command("SET", name, name)
        with frozen(own_server), pytest.raises(StoreDown):
            await store.command("GET", "one", within_s=0.02)
        for _ in range(20):
            assert await store.command("GET", "two") == b"two"

    using(place(own_server), play)


def test_a_call_that_is_cancelled_leaves_no_answer_behind(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        await store.command("SET", "one", "one")
        await store.command("SET", "two", "two")
        for steps in range(6):
            call = asyncio.ensure_future(store.command("GET", "one"))
            for _ in range(steps):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert await store.command("GET", "two") == b"two"

    using(place(own_server), play)


def test_a_loop_that_was_held_up_itself_takes_what_has_come(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        await store.command("PING")
        call = asyncio.ensure_future(store.command("PING"))
        await asyncio.sleep(0)
        time.sleep(0.1)  # noqa: ASYNC251 - that is what is tested
        assert await call == b"PONG"

    using(place(own_server, timeout_s=0.05), play)


def test_a_restarted_server_is_another_one_and_is_sent_nothing(tmp_path: Path) -> None:
    async def play(store: RedisStore, again: Callable[[], RedisServer]) -> None:
        first = await store.server_of("k")
        assert await store.run(ECHO, "k", [b"a"], server=first) == [b"a"]
        server = again()
        with pytest.raises(StoreDown):
            # The connection may not have heard yet that it is at its end.
            await store.run(ECHO, "k", [b"b"], server=first)
        with pytest.raises(ServerChanged) as changed:
            await store.run(ECHO, "k", [b"b"], server=first)
        assert say(server, "GET k") == "$-1\r\n"
        second = await store.server_of("k")
        assert second == changed.value.server != first
        assert await store.run(ECHO, "k", [b"b"], server=second) == [b"b"]

    with ExitStack() as stack:
        server = stack.enter_context(running_redis(folder=tmp_path))

        def again() -> RedisServer:
            kill(server)
            return stack.enter_context(running_redis(server.port, password=server.password, folder=tmp_path))

        using(place(server), lambda store: play(store, again))


def test_tls_is_spoken_and_the_name_is_checked(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> None:
        assert await store.run(ECHO, "k", [b"a"]) == [b"a"]
        assert await store.command("SET", "large", b"x" * 200_000) == b"OK"
        assert await store.command("GET", "large") == b"x" * 200_000

    async def fails(store: RedisStore) -> None:
        with pytest.raises(StoreDown, match=r"certificate|CERTIFICATE"):
            await store.command("PING")

    with relay_to(own_server.port, tls=True) as relay:
        address = (("127.0.0.1", relay.port),)
        ca = str(CERTIFICATE)
        using(place(own_server, addresses=address, tls=Tls(ca=ca, server_name=SERVER_NAME)), play)
        using(place(own_server, addresses=address, tls=Tls(ca=ca, server_name="other.test")), fails)
        using(place(own_server, addresses=address, tls=Tls(server_name=SERVER_NAME)), fails)


def test_an_answer_that_takes_seconds_is_not_waited_for(own_server: RedisServer) -> None:
    async def play(store: RedisStore) -> float:
        await store.command("SET", "k", "v")
        relay.delay_s = 2.0
        began_s = time.monotonic()
        with pytest.raises(StoreDown):
            await store.command("GET", "k", within_s=0.05)
        return time.monotonic() - began_s

    with relay_to(own_server.port) as relay:
        assert using(place(own_server, addresses=(("127.0.0.1", relay.port),)), play) < 0.5


def test_the_master_is_followed_when_a_sentinel_names_another() -> None:
    with running_sentinel() as watched:
        using(_watched(watched), lambda store: _followed(store, watched))


def _watched(watched: Watched) -> Place:
    # One that refuses does not keep the other from being heard.
    return Place(
        addresses=(("127.0.0.1", watched.sentinel.port), ("127.0.0.1", 1)),
        mode="sentinel",
        master=watched.name,
        password=watched.master.password,
        timeout_s=1.0,
    )


async def _followed(store: RedisStore, watched: Watched) -> None:
    first = await store.server_of("k")
    await store.run(ECHO, "k", [b"a"], server=first)
    await asyncio.to_thread(wait_for, lambda: say(watched.replica, "GET k") == "$1\r\n1\r\n")
    await asyncio.to_thread(kill, watched.master)
    give_up_s = time.monotonic() + 30
    while True:
        try:
            second = await store.server_of("k")
        except StoreDown:
            assert time.monotonic() < give_up_s
            await asyncio.sleep(0.05)
            continue
        break
    assert second != first
    with pytest.raises(ServerChanged):
        await store.run(ECHO, "k", [b"b"], server=first)
    assert await store.run(ECHO, "k", [b"b"], server=second) == [b"b"]
    assert say(watched.replica, "GET k") == "$1\r\n2\r\n"


def test_each_key_goes_to_the_node_that_has_it(cluster: tuple[RedisServer, ...]) -> None:
    where = place(cluster[0], addresses=tuple(("127.0.0.1", server.port) for server in cluster), mode="cluster")

    async def play(store: RedisStore) -> None:
        servers, places = set(), set()
        for number in range(30):
            key = f"tierway:{{{number}}}"
            assert await store.run(ECHO, key, [b"a"]) == [b"a"]
            assert await store.command("GET", key) == b"1"
            servers.add(await store.server_of(key))
            places.add(store.place_of(key))
        assert len(servers) == len(places) == 3

    using(where, play)


def test_a_slot_that_moves_is_followed(cluster: tuple[RedisServer, ...]) -> None:
    where = place(cluster[0], mode="cluster")
    first, second, third = (say(server, "CLUSTER MYID").split("\r\n")[1] for server in cluster)
    slot = int(say(cluster[0], "CLUSTER KEYSLOT {moved}")[1:])
    names = {first: cluster[0], second: cluster[1], third: cluster[2]}

    async def play(store: RedisStore) -> None:
        before = await store.server_of("{moved}")
        here = next(name for name, one in names.items() if not say(one, "EXISTS {moved}").startswith("-MOVED"))
        there = next(name for name in names if name != here)
        # While it moves a key that is not there any more is asked for elsewhere, once.
        say(names[there], f"CLUSTER SETSLOT {slot} IMPORTING {here}")
        say(names[here], f"CLUSTER SETSLOT {slot} MIGRATING {there}")
        assert await store.run(ECHO, "{moved}", [b"a"]) == [b"a"]
        with pytest.raises(ServerChanged):
            await store.run(ECHO, "{moved}", [b"a"], server=before)
        for one in (there, here, *names):
            say(names[one], f"CLUSTER SETSLOT {slot} NODE {there}")
        with pytest.raises(ServerChanged):
            await store.run(ECHO, "{moved}", [b"a"], server=before)
        assert await store.run(ECHO, "{moved}", [b"b"]) == [b"b"]
        assert await store.command("GET", "{moved}") == b"2"

    using(where, play)


def test_a_cluster_without_a_node_goes_on_with_the_others() -> None:
    with running_cluster(3) as servers:
        where = place(servers[0], addresses=tuple(("127.0.0.1", one.port) for one in servers), mode="cluster")

        async def play(store: RedisStore) -> None:
            keys = [f"{{{number}}}" for number in range(12)]
            on = {key: (await store.server_of(key), store.place_of(key)) for key in keys}
            await asyncio.to_thread(kill, servers[2])
            worked = set()
            for key in keys:
                try:
                    await store.run(ECHO, key, [], within_s=PATIENCE_S)
                except StoreDown:
                    assert on[key][1] == f"127.0.0.1:{servers[2].port}"
                else:
                    worked.add(on[key][1])
            assert worked == {f"127.0.0.1:{one.port}" for one in servers[:2]}

        using(where, play)
