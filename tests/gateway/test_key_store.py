"""Are keys kept as they were put, by one of several writers, and is every change told? In memory and in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256

import pytest

from gateway.key_redis import RedisKeys
from gateway.key_store import MOST_TOLD, KeysDown, MemoryKeys, Replaced, digest_of, new_key
from gateway.redis_line import Place
from gateway.redis_store import RedisStore
from tests.gateway.key_stores import AnyKeys, changed, redis_keys, stored
from tests.servers.redis import RedisServer, free_port, running_redis

Play = Callable[[AnyKeys], Awaitable[None]]


@pytest.fixture(params=["memory", "redis"])
def play(request: pytest.FixtureRequest) -> Callable[[Play], None]:
    """Run a test with an empty store of either kind."""
    server: RedisServer | None = None if request.param == "memory" else request.getfixturevalue("redis_server")

    @contextlib.asynccontextmanager
    async def store() -> AsyncIterator[AnyKeys]:
        if server is None:
            yield MemoryKeys()
            return
        async with redis_keys(server) as keys:
            yield keys

    def run(test: Play) -> None:
        async def whole() -> None:
            async with store() as keys:
                await test(keys)

        asyncio.run(whole())

    return run


def half(key: str) -> bytes:
    return sha256(key.encode()).digest()


def test_keys_cannot_be_guessed_and_only_their_digests_are_kept() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("tw-") and len(key) == 46 for key in keys)
    one = keys.pop()
    assert one not in repr(stored("alice", one))


def test_a_key_is_found_by_its_digest_and_by_its_name(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        alice = stored("alice", team="red", models=("auto",), metadata=(("cost-centre", "Ü 17"),), expires_s=12.5)
        assert await keys.replace("alice", None, alice)
        assert await keys.replace("bob", None, stored("bob"))
        assert list(await keys.find([half("nobody"), half("alice")])) == [None, alice]
        assert await keys.named("alice") == alice
        assert await keys.named("carol") is None

    play(test)


def test_of_many_who_create_the_same_name_exactly_one_does(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        tried = [stored("alice", f"key-{number}") for number in range(20)]
        done = await asyncio.gather(*(keys.replace("alice", None, one) for one in tried))
        assert sum(done) == 1
        winner = tried[done.index(True)]
        assert await keys.named("alice") == winner
        found = await keys.find([bytes.fromhex(one.digest) for one in tried])
        assert [one for one in found if one is not None] == [winner]

    play(test)


def test_a_change_of_what_has_changed_meanwhile_is_not_made(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        first = stored("alice")
        await keys.replace("alice", None, first)
        second = changed(first, disabled=True)
        assert await keys.replace("alice", first, second)
        assert not await keys.replace("alice", first, changed(first, priority=5))
        assert not await keys.replace("alice", first, None)
        assert await keys.named("alice") == second

    play(test)


def test_a_key_that_was_deleted_and_made_again_is_another_one(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        first, again = stored("alice", "one"), stored("alice", "two")
        await keys.replace("alice", None, first)
        await keys.replace("alice", first, None)
        await keys.replace("alice", None, again)
        assert not await keys.replace("alice", first, changed(first, priority=5))
        assert list(await keys.find([half("one"), half("two")])) == [None, again]

    play(test)


def test_after_a_rotation_both_digests_lead_to_the_key_and_after_its_end_none(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        first = stored("alice", "old")
        rotated = stored("alice", "new", replaced=(Replaced(digest_of("old"), 50.0),))
        await keys.replace("alice", None, first)
        await keys.replace("alice", first, rotated)
        assert list(await keys.find([half("old"), half("new")])) == [rotated, rotated]
        old, new = rotated.caller(digest_of("old")), rotated.caller(digest_of("new"))
        assert old is not None
        assert new is not None
        assert (old.replaced_s, new.replaced_s) == (50.0, None)
        assert rotated.caller(digest_of("other")) is None
        await keys.replace("alice", rotated, None)
        assert list(await keys.find([half("old"), half("new")])) == [None, None]
        assert list(await keys.page("", 10)) == []

    play(test)


def test_of_a_deleted_key_nothing_stays_in_redis(redis_server: RedisServer) -> None:
    async def test() -> None:
        async with redis_keys(redis_server) as keys:
            alice = stored("alice", replaced=(Replaced(digest_of("old"), 50.0),))
            await keys.replace("alice", None, alice)
            await keys.replace("alice", alice, None)
            for name in ("records", "digests", "names"):
                assert await keys._redis.command("EXISTS", f"{keys._key}:{name}") == 0

    asyncio.run(test())


def test_keys_are_listed_by_name_in_pages(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        names = ["Zoe", "a-10", "a-9", "a.b/c", "alice", "bob"]
        for name in reversed(names):
            await keys.replace(name, None, stored(name))
        pages: list[list[str]] = []
        while not pages or pages[-1]:
            pages.append([one.name for one in await keys.page(pages[-1][-1] if pages else "", 4)])
        assert pages == [names[:4], names[4:], []]
        assert [one.name for one in await keys.page("b", 4)] == ["bob"]

    play(test)


def test_changes_are_told_in_order_from_where_a_reader_was(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        start = await keys.changes("")
        assert (await keys.changes(start.at)).names == ()
        alice = stored("alice")
        await keys.replace("alice", None, alice)
        begun = await keys.changes("")
        await keys.replace("bob", None, stored("bob"))
        await keys.replace("alice", alice, None)
        told = await keys.changes(begun.at)
        assert told.names == ("bob", "alice")
        assert (await keys.changes(told.at)).names == ()

    play(test)


def test_who_missed_too_much_is_told_to_forget_everything(play: Callable[[Play], None]) -> None:
    async def test(keys: AnyKeys) -> None:
        await keys.replace("alice", None, stored("alice"))
        begun = await keys.changes("")
        for number in range(MOST_TOLD):
            await keys.replace(f"k{number}", None, stored(f"k{number}"))
        told = (await keys.changes(begun.at)).names
        assert told is not None
        assert len(told) == MOST_TOLD
        await keys.replace("last", None, stored("last"))
        assert (await keys.changes(begun.at)).names is None

    play(test)


def test_a_store_that_lost_its_data_makes_readers_forget() -> None:
    async def test(server: RedisServer) -> None:
        async with redis_keys(server, "lost") as keys:
            await keys.replace("alice", None, stored("alice"))
            begun = await keys.changes("")
            assert begun.at
            await keys._redis.command("FLUSHALL")
            lost = await keys.changes(begun.at)
            assert (lost.at, lost.names) == ("", None)
            assert list(await keys.find([half("alice")])) == [None]
            await keys.replace("bob", None, stored("bob"))
            assert (await keys.changes(begun.at)).names is None
            assert (await keys.changes("")).names is None

    with running_redis() as server:
        asyncio.run(test(server))


def test_a_record_that_cannot_be_read_is_no_key_and_hides_no_other(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with redis_keys(redis_server) as keys:
            await keys.replace("alice", None, stored("alice"))
            await keys.replace("bob", None, bob := stored("bob"))
            records = f"{keys._key}:records"
            await keys._redis.command("HSET", records, "alice", b'r {"name": "alice", "digest": 7}')
            assert list(await keys.find([half("alice"), half("bob")])) == [None, bob]
            assert [one.name for one in await keys.page("", 10)] == ["bob"]

    asyncio.run(test())
    assert "cannot be read" in caplog.text


def test_a_store_that_does_not_answer_or_holds_something_else_is_down(redis_server: RedisServer) -> None:
    async def test() -> None:
        gone = RedisStore(Place(addresses=(("127.0.0.1", free_port()),), timeout_s=0.5))
        with pytest.raises(KeysDown):
            await RedisKeys(gone, prefix="t").find([half("alice")])
        async with redis_keys(redis_server) as keys:
            await keys._redis.command("SET", f"{keys._key}:changes", "of somebody else")
            with pytest.raises(KeysDown, match="WRONGTYPE"):
                await keys.changes("")

    asyncio.run(test())
