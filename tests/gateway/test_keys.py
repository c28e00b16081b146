"""Whose key is it, now? Live keys over stores that change, are cut off, or are flooded; time is what the test says."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import model as noun
from gateway.errors import Refusal
from gateway.http import recognise
from gateway.key_store import Changes, KeysDown, MemoryKeys, Replaced, StoredKey, digest_of
from gateway.keys import LiveKeys, caller_of, moment, moment_s
from policies.access import Caller, Keyring
from tests.gateway.key_stores import Watched, changed, redis_keys, stored
from tests.servers.redis import RedisServer

CONFIGURED = Keyring.of([(digest_of("configured"), Caller(key="configured"))])


class Now:
    """One time for everything."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


class World:
    """A store, a watch on it, and live keys over it."""

    def __init__(self, *, most_cached: int = 100_000) -> None:
        self.now = Now()
        self.store = MemoryKeys()
        self.source = Watched(self.store)
        self.keys = self.replica(most_cached=most_cached)

    def replica(self, *, most_cached: int = 100_000) -> LiveKeys:
        return LiveKeys(
            CONFIGURED,
            self.source,
            valid_for_s=30.0,
            most_cached=most_cached,
            time_s=self.now,
            clock_s=self.now,
        )

    async def put(self, name: str, key: str = "", *, replaced: tuple[Replaced, ...] = (), **facts: object) -> StoredKey:
        new = stored(name, key, replaced=replaced, **facts)
        assert await self.store.replace(name, await self.store.named(name), new)
        return new

    async def change(self, name: str, **facts: object) -> None:
        old = await self.store.named(name)
        assert old is not None
        assert await self.store.replace(name, old, changed(old, **facts))


def play(test: Callable[[World], Awaitable[None]], *, most_cached: int = 100_000) -> None:
    async def whole() -> None:
        await test(World(most_cached=most_cached))

    asyncio.run(whole())


async def refused(keys: LiveKeys, key: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await keys.find(key)
    return caught.value


def test_a_configured_key_asks_no_store() -> None:
    async def test(world: World) -> None:
        world.source.down = True
        caller = world.keys.known(b"configured")
        assert caller is not None
        assert await world.keys.find(b"configured") is caller
        assert world.source.polls == 0

    play(test)


def test_a_stored_key_is_looked_up_once_and_then_known() -> None:
    async def test(world: World) -> None:
        await world.put(
            "alice", team="red", user="u", priority=7, tags=("x",), metadata=(("a", "b"),), models=("auto",)
        )
        assert world.keys.known(b"alice") is None
        caller = await world.keys.find(b"alice")
        assert caller == Caller(
            key="alice",
            names=frozenset({"auto"}),
            team="red",
            user="u",
            priority=7,
            tags=("x",),
            metadata=(("a", "b"),),
        )
        assert world.keys.known(b"alice") is caller
        assert await world.keys.find(b"alice") is caller
        assert world.source.asked == [1]

    play(test)


def test_a_request_is_recognised_by_either_kind_of_key() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        bearer = {"headers": [(b"authorization", b"Bearer alice")]}
        plain = {"headers": [(b"x-api-key", b"configured")]}
        assert (await recognise(world.keys, bearer)).key == "alice"
        assert (await recognise(world.keys, plain)).key == "configured"
        with pytest.raises(Refusal) as caught:
            await recognise(world.keys, {"headers": []})
        assert caught.value.status == 401

    play(test)


def test_without_a_store_a_strange_key_is_unknown() -> None:
    refusal = asyncio.run(refused(LiveKeys(CONFIGURED), b"strange"))
    assert (refusal.status, refusal.code) == (401, "invalid_api_key")


@pytest.mark.parametrize(("facts", "word"), [({"disabled": True}, "disabled"), ({"expires_s": 1000.0}, "expired")])
def test_a_key_that_does_not_hold_is_told_why(facts: dict[str, Any], word: str) -> None:
    async def test(world: World) -> None:
        await world.put("alice", **facts)
        for _ in range(2):  # looked up, and known
            refusal = await refused(world.keys, b"alice")
            assert (refusal.status, refusal.code) == (401, "invalid_api_key")
            assert word in refusal.message

    play(test)


def test_a_configured_key_can_expire_and_be_disabled() -> None:
    def key(name: str, **fields: object) -> tuple[str, Caller]:
        line = {"name": name, "sha256": digest_of(name), **fields}
        return digest_of(name), caller_of(msgspec.convert(line, noun.Key))

    ring = Keyring.of([key("guest", expires="1970-01-01T01:16:40+01:00"), key("off", disabled=True)])
    now = Now()
    keys = LiveKeys(ring, time_s=now)
    now.s = 999.9
    assert keys.known(b"guest") is not None
    now.s = 1000.0
    assert "expired" in asyncio.run(refused(keys, b"guest")).message
    assert "disabled" in asyncio.run(refused(keys, b"off")).message


def test_all_that_the_configuration_says_of_a_key_reaches_its_caller() -> None:
    line = {
        "name": "alice",
        "sha256": "0" * 64,
        "models": ["auto"],
        "admin": True,
        "team": "red",
        "user": "u",
        "priority": -3,
        "tags": ["x", "y"],
        "metadata": {"b": "2", "a": "1"},
        "expires": "2027-01-31T00:00:00Z",
        "disabled": True,
    }
    assert caller_of(msgspec.convert(line, noun.Key)) == Caller(
        key="alice",
        names=frozenset({"auto"}),
        admin=True,
        team="red",
        user="u",
        priority=-3,
        tags=("x", "y"),
        metadata=(("a", "1"), ("b", "2")),
        expires_s=moment_s("2027-01-31T00:00:00Z"),
        disabled=True,
    )


def test_a_cached_key_expires_at_its_time() -> None:
    async def test(world: World) -> None:
        await world.put("alice", expires_s=1010.0)
        assert (await world.keys.find(b"alice")).key == "alice"
        world.now.s = 1010.0
        with pytest.raises(Refusal, match="expired"):
            world.keys.known(b"alice")

    play(test)


def test_a_replaced_key_holds_for_its_grace_only() -> None:
    async def test(world: World) -> None:
        await world.put("alice", "new", replaced=(Replaced(digest_of("old"), 1010.0),))
        assert (await world.keys.find(b"old")).key == (await world.keys.find(b"new")).key == "alice"
        world.now.s = 1010.0
        assert "replaced" in (await refused(world.keys, b"old")).message
        assert world.keys.known(b"new") is not None

    play(test)


def test_every_change_is_known_after_one_poll() -> None:
    async def test(world: World) -> None:
        other = world.replica()
        for name in ("alice", "bob", "carol"):
            await world.put(name)
        for key in (b"alice", b"bob", b"carol"):
            await other.find(key)
        await world.change("alice", disabled=True)
        await world.change("bob", team="red")
        assert other.known(b"alice") is not None
        await other.poll()
        assert "disabled" in (await refused(other, b"alice")).message
        assert (await other.find(b"bob")).team == "red"
        assert (await other.find(b"carol")).team is None
        await world.change("alice", disabled=False)
        await other.poll()
        assert (await other.find(b"alice")).key == "alice"

    play(test)


def test_a_key_that_has_changed_is_known_also_when_the_store_goes_down_right_after() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.put("bob")
        await world.keys.find(b"alice")
        await world.keys.find(b"bob")
        await world.change("alice", priority=3)
        bob = await world.store.named("bob")
        await world.store.replace("bob", bob, None)
        world.source.asked.clear()
        await world.keys.poll()
        assert world.source.asked == [2]
        world.source.down = True
        assert (await world.keys.find(b"alice")).priority == 3
        assert (await refused(world.keys, b"bob")).status == 401

    play(test)


def test_a_change_that_was_told_and_not_seen_ends_the_old_key() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.keys.find(b"alice")
        await world.change("alice", disabled=True)
        find = world.source.find

        async def cut(digests: list[bytes]) -> object:
            world.source.down = True
            return await find(digests)

        world.source.find = cut  # type: ignore[method-assign,assignment]
        with pytest.raises(KeysDown):
            await world.keys.poll()
        assert (await refused(world.keys, b"alice")).status == 503

    play(test)


def test_a_key_rotated_or_deleted_elsewhere_ends_here_after_one_poll() -> None:
    async def test(world: World) -> None:
        await world.put("alice", "old")
        bob = await world.put("bob")
        await world.keys.find(b"old")
        await world.keys.find(b"bob")
        await world.put("alice", "new")
        await world.store.replace("bob", bob, None)
        await world.keys.poll()
        assert (await refused(world.keys, b"old")).status == (await refused(world.keys, b"bob")).status == 401
        assert (await world.keys.find(b"new")).key == "alice"

    play(test)


def test_what_was_unknown_is_looked_up_again_once_it_was_made() -> None:
    async def test(world: World) -> None:
        await world.put("other")
        for _ in range(5):
            assert (await refused(world.keys, b"alice")).status == 401
        assert world.source.asked == [1]
        await world.put("alice")
        await world.keys.poll()
        assert (await world.keys.find(b"alice")).key == "alice"

    play(test)


def test_a_change_during_a_look_up_is_not_missed() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.keys.poll()
        find = world.source.find

        async def slow(digests: list[bytes]) -> object:
            found = await find(digests)
            if len(world.source.asked) == 1:
                # Read before the change, answered after the poll that told of it.
                await world.change("alice", disabled=True)
                await world.keys.poll()
            return found

        world.source.find = slow  # type: ignore[method-assign,assignment]
        assert "disabled" in (await refused(world.keys, b"alice")).message

    play(test)


def test_cached_keys_are_believed_for_their_time_while_the_store_is_down(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tierway.keys")

    async def test(world: World) -> None:
        await world.put("alice")
        await world.put("bob")
        await world.keys.find(b"alice")
        world.source.down = True
        world.now.s += 29.9
        assert (await world.keys.find(b"alice")).key == "alice"
        assert not world.keys.down
        for key in (b"bob", b"strange", b"strange"):
            refusal = await refused(world.keys, key)
            assert (refusal.status, refusal.code) == (503, "keys_unavailable")
            assert (b"retry-after", b"1") in refusal.headers()
        assert world.keys.down
        world.now.s += 0.1
        assert (await refused(world.keys, b"alice")).status == 503
        assert world.keys.known(b"configured") is not None
        world.source.down = False
        assert (await world.keys.find(b"alice")).key == "alice"
        assert not world.keys.down
        assert (await refused(world.keys, b"strange")).status == 401

    play(test)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"], "once each"


def test_belief_begins_when_the_store_was_asked_not_when_it_answered() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.keys.find(b"alice")
        changes = world.source.changes

        async def slow(since: str) -> Changes:
            told = await changes(since)
            world.now.s += 5
            return told

        world.source.changes = slow  # type: ignore[method-assign]
        await world.keys.poll()
        world.source.down = True
        world.now.s += 25
        assert (await refused(world.keys, b"alice")).status == 503

    play(test)


def test_a_key_disabled_while_the_store_was_cut_off_ends_with_the_first_answer() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.keys.find(b"alice")
        world.source.down = True
        await world.change("alice", disabled=True)
        world.now.s += 60
        world.source.down = False
        assert "disabled" in (await refused(world.keys, b"alice")).message

    play(test)


def test_a_stored_key_with_the_name_of_a_configured_one_is_nobody() -> None:
    async def test(world: World) -> None:
        await world.put("configured", "another key")
        assert (await refused(world.keys, b"another key")).status == 401

    play(test)


def test_who_ask_for_the_same_key_at_once_share_one_look_up_and_others_its_question() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.put("bob")
        wanted = [b"alice", b"bob"] * 50
        found = await asyncio.gather(*map(world.keys.find, wanted))
        assert [caller.key.encode() for caller in found] == wanted
        assert world.source.asked == [2]

    play(test)


def test_who_leaves_takes_the_answer_from_nobody() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        leaving, staying = (asyncio.create_task(world.keys.find(b"alice")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        assert (await staying).key == "alice"
        with pytest.raises(asyncio.CancelledError):
            await leaving

    play(test)


def test_a_flood_of_strange_keys_costs_few_questions_and_little_memory() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.keys.find(b"alice")
        world.source.asked.clear()
        for wave in range(15):
            flood = [world.keys.find(b"strange-%d-%d" % (wave, number)) for number in range(1000)]
            known = [world.keys.find(b"alice") for _ in range(10)]
            results = await asyncio.gather(*flood, *known, return_exceptions=True)
            assert all(isinstance(one, Refusal) and one.status == 401 for one in results[:1000])
            assert all(isinstance(one, Caller) for one in results[1000:])
        assert sum(world.source.asked) == 15_000
        assert len(world.source.asked) == 150, "100 a question"
        assert world.keys.counts == (1, 10_000)
        assert not world.keys._waiting

    play(test)


def test_more_than_can_wait_are_told_to_come_back() -> None:
    async def test(world: World) -> None:
        await world.keys.poll()
        flood = [world.keys.find(b"strange-%d" % number) for number in range(10_050)]
        results = await asyncio.gather(*flood, return_exceptions=True)
        statuses = [one.status for one in results if isinstance(one, Refusal)]
        assert (statuses.count(401), statuses.count(503)) == (10_000, 50)

    play(test)


def test_all_who_wait_when_the_store_goes_down_are_answered_at_once() -> None:
    async def test(world: World) -> None:
        await world.keys.poll()
        world.source.down = True
        results = await asyncio.gather(
            *(world.keys.find(b"strange-%d" % number) for number in range(2000)), return_exceptions=True
        )
        assert {one.status for one in results if isinstance(one, Refusal)} == {503}
        assert not world.keys._waiting

    play(test)


def test_the_cache_holds_so_many_and_drops_who_was_away_longest() -> None:
    async def test(world: World) -> None:
        for number in range(5):
            await world.put(f"k{number}")
        for number in (0, 1, 2, 0, 3, 4):
            await world.keys.find(b"k%d" % number)
        assert world.keys.counts[0] == 3
        assert [number for number in range(5) if world.keys.known(b"k%d" % number)] == [0, 3, 4]
        assert len(world.keys._halves) == 3
        await world.change("k1", priority=1)
        await world.change("k3", priority=1)
        await world.keys.poll()
        assert (await world.keys.find(b"k3")).priority == (await world.keys.find(b"k1")).priority == 1

    play(test, most_cached=3)


def test_what_many_keys_have_in_common_is_held_once() -> None:
    async def test(world: World) -> None:
        for name in ("alice", "bob"):
            await world.put(name, models=("auto", "small"), tags=("ci",), metadata=(("a", "b"),), team="red")
        one, two = [await world.keys.find(key) for key in (b"alice", b"bob")]
        assert one.names is two.names
        assert one.tags is two.tags
        assert one.metadata is two.metadata
        assert (one.key, two.key) == ("alice", "bob")

    play(test)


def test_a_forged_half_digest_finds_nobody() -> None:
    async def test(world: World) -> None:
        await world.put("alice")
        await world.keys.find(b"alice")
        digest, caller = world.keys._cached[bytes.fromhex(digest_of("alice"))[:16]]
        world.keys._cached[digest[:16]] = (digest[:16] + bytes(16), caller)
        assert world.keys.known(b"alice") is None

    play(test)


def test_the_poll_goes_on_through_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.keys._POLL_S", 0.0)

    async def test(world: World) -> None:
        polling = asyncio.create_task(world.keys.keep_polling())

        async def until(true: Callable[[], bool]) -> None:
            async with asyncio.timeout(5):
                while not true():
                    await asyncio.sleep(0)

        await until(lambda: world.source.polls > 2)
        world.source.down = True
        await until(lambda: world.keys.down)
        world.source.down = False
        await until(lambda: not world.keys.down)
        assert world.keys._believed_until_s == world.now.s + 30
        polling.cancel()
        await asyncio.wait([polling])

    play(test)


def test_replicas_over_one_redis_learn_of_each_change(redis_server: RedisServer) -> None:
    async def test() -> None:
        async with (
            redis_keys(redis_server) as writer,
            redis_keys(redis_server, writer._key.partition(":")[0]) as reader,
        ):
            replicas = [LiveKeys(CONFIGURED, one) for one in (writer, reader)]
            alice = stored("alice")
            await writer.replace("alice", None, alice)
            for keys in replicas:
                assert (await keys.find(b"alice")).key == "alice"
            off = changed(alice, disabled=True)
            await writer.replace("alice", alice, off)
            for keys in replicas:
                await keys.poll()
                assert "disabled" in (await refused(keys, b"alice")).message
            await writer.replace("alice", off, None)
            for keys in replicas:
                await keys.poll()
                assert "not known" in (await refused(keys, b"alice")).message

    asyncio.run(test())


def test_moments_are_read_with_their_zones() -> None:
    assert moment_s("1970-01-01T00:00:00Z") == 0.0
    assert moment_s("1970-01-01T01:00:00+01:00") == 0.0
    assert math.isclose(moment_s("2027-01-31T00:00:00Z"), 1801353600.0)
    with pytest.raises(ValueError, match="day"):
        moment_s("2027-02-30T00:00:00Z")
    with pytest.raises(ValueError, match="9999"):
        moment_s("9999-12-31T23:59:59-23:59")


@given(st.datetimes(timezones=st.timezones()))
def test_a_moment_that_was_written_is_read_as_the_same_second(time: datetime) -> None:
    try:
        exact_s = time.astimezone(UTC).timestamp()
    except OverflowError:
        return
    written = moment(exact_s)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", written)
    assert moment_s(written) == math.floor(exact_s)
