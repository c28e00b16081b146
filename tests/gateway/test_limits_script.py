"""Does the script in Redis answer as `Books` does, and does it know when its data is not what it was?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec
import pytest
import redis

from gateway.limits_script import Alive, Answer, Beat, Command, Lose, Open, Opened, decode, encode, key, script
from policies.accounts import Budget, Concurrency, Entry, Rate, Rolling, Rule
from policies.books import (
    Books,
    Cancel,
    Charge,
    Done,
    Granted,
    Look,
    Operation,
    Renew,
    Reserve,
    Seed,
    Settle,
    Stale,
    Tell,
)
from tests.prove import books as proof
from tests.servers.redis import RedisServer

NOW = 1_800_000_000_000
SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
PREFIX = "t:{p}"

A = TypeVar("A", bound=Answer)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client


class Store:
    """A partition at a time that stands until it is moved, and the epoch of whoever opened it last."""

    def __init__(self, client: redis.Redis) -> None:
        self._simulated = proof.Simulated(client)
        self.now = NOW
        self.epoch = ""

    def call(self, *commands: Command) -> list[Answer]:
        return self._simulated.call("p", self.epoch, self.now, commands)

    def one(self, kind: type[A], command: Command) -> A:
        (answer,) = self.call(command)
        assert isinstance(answer, kind), answer
        return answer

    def open(self, run: str = "run-1", known: str = "", acked: int = 0) -> Opened:
        opened = self.one(Opened, Open(run, known, acked))
        self.epoch = opened.epoch
        return opened


def contents(client: redis.Redis) -> dict[bytes, bytes | None]:
    return {name: client.dump(name) for name in client.scan_iter()}


@pytest.fixture
def store(client: redis.Redis) -> Store:
    store = Store(client)
    store.open()
    return store


# -- as the books do --------------------------------------------------------------------------------------------------


def test_every_reply_is_that_of_the_books() -> None:
    figures = proof.compare(seed=1, sequences=100)
    assert figures["granted"] != 0
    assert figures["refused"] != 0


def test_waits_are_the_shortest_that_help() -> None:
    assert proof.waits(1, "test")["waits of a Rate"] == 200


def test_few_leases_end_with_one_operation_in_a_batch_too(store: Store) -> None:
    books, entry = Books(), Entry("open", Concurrency(1000), held=1)
    rounds: list[tuple[int, list[Operation]]] = [
        (0, [Reserve(f"{number * 7 % 250:03}", (entry,), 1000 + number % 5) for number in range(250)]),
        (1001, [Settle("007", (0,)), Renew("070", (0,), 5000), Look((entry,)), Look((entry,))]),
        (0, [Look((entry,))]),
        (3, [Cancel("033"), Look((entry,)), Look((entry,))]),
    ]
    for passed, operations in rounds:
        store.now += passed
        assert store.call(*operations) == [books.apply(operation, store.now) for operation in operations]


def test_it_reads_the_time_of_the_server(client: redis.Redis) -> None:
    sha = client.script_load(script())
    (opened,) = decode(client.evalsha(sha, 1, PREFIX, *encode("", [Open("run")])))
    assert isinstance(opened, Opened)
    seconds, microseconds = client.time()
    assert 0 <= seconds * 1000 + microseconds // 1000 - opened.now_ms < 30_000
    assert abs(time.time() * 1000 - opened.now_ms) < HOUR


def test_there_is_one_clock_to_replace() -> None:
    assert "local now = CLOCK\n" in script("CLOCK")
    assert "'TIME'" not in script("CLOCK")


# -- what it leaves in the server -------------------------------------------------------------------------------------


def test_all_keys_share_a_slot(client: redis.Redis, store: Store) -> None:
    entry = Entry("account", Budget(10), taken=1, held=1)
    store.call(Reserve("a", (entry,), SECOND), Beat("r", SECOND), Cancel("b"))
    found = sorted(client.keys())
    assert found == [f"{PREFIX}:{name}".encode() for name in ("a:account", "alive", "gen", "leases", "r:a", "r:b")]
    assert key("t", "p") == PREFIX


@pytest.mark.parametrize(
    ("rule", "expected_ms"),
    [
        (Rate(60, MINUTE, 60), SECOND + MINUTE),
        (Rate(24, DAY, 24), HOUR + MINUTE),
        (Rolling(60, HOUR), HOUR + MINUTE + MINUTE),
        (Budget(60, (NOW - HOUR, NOW + HOUR)), HOUR + MINUTE),
        (Budget(60, (NOW - HOUR,)), None),
        (Budget(60), None),
    ],
)
def test_an_account_lasts_as_long_as_it_matters(
    client: redis.Redis, store: Store, rule: Rule, expected_ms: int | None
) -> None:
    store.call(Reserve("a", (Entry("account", rule, held=2),), SECOND))
    assert client.pttl(f"{PREFIX}:a:account") == -1
    store.call(Settle("a", (1,)))
    left_ms = client.pttl(f"{PREFIX}:a:account")
    if expected_ms is None:
        assert left_ms == -1
    else:
        assert expected_ms - 20 * SECOND < left_ms <= expected_ms
    store.call(Reserve("b", (Entry("account", rule, held=1),), SECOND))
    assert client.pttl(f"{PREFIX}:a:account") == -1


def test_what_is_empty_is_gone(client: redis.Redis, store: Store) -> None:
    entries = (Entry("open", Concurrency(2), held=1), Entry("sum", Budget(10), held=1))
    store.call(Reserve("a", entries, SECOND))
    assert client.exists(f"{PREFIX}:a:open", f"{PREFIX}:a:sum") == 2
    store.call(Settle("a", (0, 0)))
    assert client.exists(f"{PREFIX}:a:open", f"{PREFIX}:a:sum", f"{PREFIX}:leases") == 0


@pytest.mark.parametrize(
    ("operations", "expected_ms"),
    [
        ([Settle("a", (1,))], 2 * MINUTE),
        ([Cancel("a")], 10 * MINUTE),
        ([Cancel("a"), Settle("a", (1,), (Entry("x", Budget(1)),))], DAY),
        ([Charge("a", ())], None),
    ],
)
def test_an_id_is_remembered_as_long_as_it_matters(
    client: redis.Redis, store: Store, operations: list[Operation], expected_ms: int | None
) -> None:
    store.call(Reserve("a", (Entry("sum", Budget(10), held=1),), SECOND), *operations)
    left_ms = client.pttl(f"{PREFIX}:r:a")
    if expected_ms is None:
        assert left_ms == -1
    else:
        assert expected_ms + MINUTE - 20 * SECOND < left_ms <= expected_ms + MINUTE


def test_an_expired_reservation_is_remembered_for_an_hour(client: redis.Redis, store: Store) -> None:
    store.call(Reserve("a", (Entry("sum", Budget(10), held=1),), SECOND))
    store.now += SECOND
    store.call(Look(()))
    assert client.zcard(f"{PREFIX}:leases") == 0
    assert HOUR < client.pttl(f"{PREFIX}:r:a") <= HOUR + MINUTE


def test_a_batch_that_fails_leaves_nothing_half_done(client: redis.Redis, store: Store) -> None:
    before = contents(client)
    good = msgspec.msgpack.encode(Reserve("a", (Entry("sum", Budget(10), taken=1, held=1),), SECOND))
    header = msgspec.msgpack.encode((store.epoch, NOW))
    for bad in (
        msgspec.msgpack.encode(("what is this",)),
        b"\xc1",
        b"",
        msgspec.msgpack.encode(("reserve", "b", 7, 7)),
    ):
        with pytest.raises(redis.ResponseError):
            client.eval(script(proof.CLOCK), 1, PREFIX, header, good, bad)
    assert contents(client) == before


def test_a_server_without_memory_does_all_of_a_batch_or_nothing(client: redis.Redis, store: Store) -> None:
    store.call(Reserve("a", (Entry("open", Concurrency(2), held=1),), SECOND))
    before = contents(client)
    client.config_set("maxmemory", 1)
    try:
        # What gives memory back is let through, and after it whatever the script writes.
        store.call(Settle("a", (0,)), Charge("c", (Entry("sum", Budget(10), taken=1),)))
    except redis.OutOfMemoryError:
        assert contents(client) == before
    else:
        assert client.exists(f"{PREFIX}:a:sum", f"{PREFIX}:r:a", f"{PREFIX}:r:c") == 3
        assert client.exists(f"{PREFIX}:a:open", f"{PREFIX}:leases") == 0
    finally:
        client.config_set("maxmemory", 0)


# -- who is there -----------------------------------------------------------------------------------------------------


def test_a_beat_tells_who_is_there(store: Store) -> None:
    assert store.one(Alive, Beat("b", 3000)) == Alive(NOW, store.epoch, seeded=True, replicas=("b",))
    for name in ("é", "a", "B", "ab"):
        store.call(Beat(name, 5000))
    assert store.one(Alive, Beat("b", 3000)).replicas == ("B", "a", "ab", "b", "é")
    store.now += 3000
    assert store.one(Alive, Beat("a", 3000)).replicas == ("B", "a", "ab", "é")
    assert store.one(Alive, Beat("ab", 3000, leaving=True)).replicas == ("B", "a", "é")


# -- losses: the table at `open` in the script ------------------------------------------------------------------------

SPENT = Entry("sum", Budget(100), taken=7)
ROLLED = Entry("roll", Rolling(100, HOUR), taken=7)
RATED = Entry("rate", Rate(1, DAY, 100), taken=7)
COUNTED = (SPENT, ROLLED, RATED)


def used(store: Store, entries: Sequence[Entry] = COUNTED) -> list[int]:
    return [one.used for one in store.one(Done, Look(tuple(entries))).standings]


def restart(store: Store, after_ms: int = 0) -> None:
    store.now += after_ms
    store.epoch = ""


def test_nobodys_data_and_a_caller_without_memory_are_a_new_deployment(client: redis.Redis) -> None:
    store = Store(client)
    opened = store.open()
    assert (opened.seeded, opened.lost) == (True, False)
    assert opened.epoch.startswith("run-1-")
    assert not store.one(Done, Seed((SPENT,))).known


def test_nobodys_data_and_a_caller_with_memory_are_a_loss(client: redis.Redis, store: Store) -> None:
    known = store.epoch
    store.call(Charge("c", COUNTED))
    client.flushall()
    assert store.one(Stale, Look(())) == Stale(NOW, "")
    opened = store.open("run-2", known, NOW)
    assert (opened.seeded, opened.lost) == (False, True)
    assert opened.epoch != known
    assert used(store) == [0, 0, 0]
    # What is counted since stays, and the totals come on top, once.
    store.call(Charge("c", COUNTED))
    assert [store.one(Done, Seed(COUNTED)).known for _ in range(2)] == [True, False]
    assert used(store) == [14, 14, 7]
    again = store.open("run-2", known, NOW)
    assert again == Opened(NOW, opened.epoch, seeded=True, lost=True, cut_ms=NOW - 10 * MINUTE)


def test_another_epoch_does_nothing(client: redis.Redis, store: Store) -> None:
    right, store.epoch = store.epoch, "another"
    before = contents(client)
    assert store.call(Charge("c", COUNTED), Beat("r", 5), Look(COUNTED)) == [Stale(NOW, right)] * 3
    assert contents(client) == before


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("run", ["run-1", "run-2"])
def test_data_that_is_all_there_goes_on(store: Store, run: str, remembers: bool) -> None:
    known = store.epoch
    store.call(Charge("c", COUNTED))
    acked = store.one(Alive, Beat("r", SECOND)).now_ms
    restart(store, 10 * MINUTE)
    opened = store.open(run, known if remembers else "", acked if remembers else 0)
    assert opened == Opened(store.now, known, seeded=True, lost=False)
    assert used(store) == [7, 7, 7]


def test_a_little_may_be_lost_in_a_failover(store: Store) -> None:
    known = store.epoch
    assert not store.open("run-2", known, NOW + 2000).lost
    restart(store, HOUR)
    assert store.open("run-3", known, NOW + 2001).lost


def old_copy(store: Store) -> str:
    """The data of NOW in a server that has been restarted an hour later; everybody had gone on for 50 minutes."""
    known = store.epoch
    store.call(Charge("c", COUNTED))
    restart(store, HOUR)
    return known


def test_an_old_copy_is_a_loss(store: Store) -> None:
    known = old_copy(store)
    opened = store.open("run-2", known, NOW + 50 * MINUTE)
    assert (opened.seeded, opened.lost) == (False, True)
    assert opened.epoch != known
    # Windows are empty, rates drain.
    assert used(store) == [0, 0, 7]
    assert store.one(Done, Seed(COUNTED)).known
    assert used(store) == [7, 7, 7]


def test_an_old_copy_that_was_taken_for_good_is_a_loss_when_somebody_remembers(store: Store) -> None:
    known = old_copy(store)
    assert store.open("run-2") == Opened(store.now, known, seeded=True, lost=False)
    store.now += MINUTE
    store.call(Beat("new", SECOND), Charge("d", COUNTED))
    opened = store.open("run-2", known, NOW + 50 * MINUTE)
    assert (opened.seeded, opened.lost) == (False, True)
    assert opened.epoch != known
    assert used(store, COUNTED[:2]) == [0, 0]
    # The one who had no memory, and others who had, come to the same new epoch.
    for remembered in (NOW + HOUR + MINUTE, NOW + 49 * MINUTE):
        assert store.open("run-2", known, remembered) == opened


def test_who_was_acknowledged_in_this_run_has_lost_nothing(store: Store) -> None:
    known = old_copy(store)
    acked = store.open("run-2").now_ms
    store.now += MINUTE
    acked = store.one(Alive, Beat("new", SECOND)).now_ms
    store.now += MINUTE
    assert store.open("run-2", known, acked) == Opened(store.now, known, seeded=True, lost=False)


def test_an_old_copy_of_an_earlier_epoch_is_a_loss(client: redis.Redis, store: Store) -> None:
    store.call(Charge("c", COUNTED))
    copy = contents(client)
    first = store.epoch
    client.flushall()
    store.now += MINUTE
    second = store.open("run-2", first, NOW).epoch
    client.flushall()
    for name, value in copy.items():
        client.restore(name, 0, value or b"")
    store.now += MINUTE
    third = store.open("run-3", second, NOW + MINUTE + 3000)
    assert (third.seeded, third.lost) == (False, True)
    assert third.epoch not in (first, second)
    assert used(store) == [0, 0, 7]


@pytest.mark.parametrize("run", ["run-2", "run-3"])
def test_a_new_deployment_that_was_none_is_a_loss_when_somebody_remembers(
    client: redis.Redis, store: Store, run: str
) -> None:
    known = store.epoch
    client.flushall()
    store.now += MINUTE
    fresh = store.open("run-2")
    assert (fresh.seeded, fresh.lost) == (True, False)
    store.call(Charge("c", COUNTED))
    opened = store.open(run, known, NOW)
    assert (opened.seeded, opened.lost) == (False, True)
    assert opened.epoch not in (known, fresh.epoch)
    # The ledger has what was counted since, too.
    assert used(store) == [0, 0, 7]
    late = store.open(run, fresh.epoch, fresh.now_ms)
    assert (late.epoch, late.seeded, late.lost) == (opened.epoch, False, True)


def test_who_comes_late_after_a_loss_begins_no_other_epoch(client: redis.Redis, store: Store) -> None:
    known = store.epoch
    client.flushall()
    store.now += MINUTE
    second = store.open("run-2", known, NOW).epoch
    store.call(Beat("r", SECOND))
    assert store.open("run-2", known, NOW).epoch == second
    restart(store, HOUR)
    late = store.open("run-3", known, NOW)
    assert (late.epoch, late.lost) == (second, True)


def test_where_totals_have_come_nothing_begins_anew(client: redis.Redis, store: Store) -> None:
    known = store.epoch
    client.flushall()
    second = store.open("run-2", known, NOW).epoch
    # An old copy of an epoch that waits for its totals: they come before somebody remembers more.
    restart(store, HOUR)
    assert store.open("run-3").epoch == second
    assert store.one(Done, Seed((SPENT,))).known
    late = store.open("run-3", second, NOW + 50 * MINUTE)
    assert (late.epoch, late.seeded, late.lost) == (second, True, True)
    assert used(store, [SPENT]) == [7]


def test_reservations_of_an_old_copy_end_with_their_lease(store: Store) -> None:
    entry = Entry("sum", Budget(100), held=5)
    store.one(Granted, Reserve("a", (entry,), HOUR + SECOND))
    known = old_copy(store)
    store.open("run-2", known, NOW + 50 * MINUTE)
    assert [one.reserved for one in store.one(Done, Look((entry,))).standings] == [5]
    store.now += SECOND
    assert [one.reserved for one in store.one(Done, Look((entry,))).standings] == [0]


# -- what a ledger tells ----------------------------------------------------------------------------------------------


def test_with_a_ledger_nobodys_data_wait_for_their_totals(client: redis.Redis) -> None:
    store = Store(client)
    opened = store.one(Opened, Open("run-1", ledger=True))
    assert (opened.seeded, opened.lost, opened.cut_ms) == (False, False, NOW - 10 * MINUTE)
    # Who comes next finds the same, whether or not it has a ledger.
    assert store.open("run-1") == opened
    assert store.one(Done, Seed(())).known
    assert store.open("run-1", opened.epoch, NOW).seeded


def test_who_knows_better_has_everybody_begin_anew(store: Store) -> None:
    store.call(Charge("c", COUNTED))
    known = store.epoch
    stale = store.one(Stale, Lose())
    assert stale.epoch != known
    assert store.one(Stale, Look(())) == stale
    opened = store.open("run-1", known, NOW)
    assert opened == Opened(NOW, stale.epoch, seeded=False, lost=True, cut_ms=NOW - 10 * MINUTE)
    assert used(store) == [0, 0, 7]


def test_an_old_copy_does_not_hide_what_was_settled_in_it(store: Store) -> None:
    spent = Entry("sum", Budget(100), held=7)
    store.one(Granted, Reserve("a", (spent,), HOUR))
    store.call(Settle("a", (7,), (), NOW, "a#"))
    known = store.epoch
    restart(store, MINUTE)
    store.open("run-2", known, NOW + 50 * SECOND)
    assert used(store, [spent]) == [0]
    told = Tell("a#", (Entry("sum", Budget(100), taken=7),), NOW, of=("a",))
    assert [store.one(Done, told).known for _ in range(2)] == [True, False]
    store.call(Settle("a", (7,), (spent,), NOW, "a#"))
    assert used(store, [spent]) == [7]


def test_names_of_bills_are_kept_as_long_as_the_ledger_may_be_read_again(client: redis.Redis, store: Store) -> None:
    entry = Entry("sum", Budget(1000), held=5)

    def settled(id_: str) -> int:
        store.call(Reserve(id_, (entry,), MINUTE), Settle(id_, (5,), (), store.now, f"{id_}#"))
        return int(client.exists(f"{PREFIX}:r:{id_}#"))

    assert settled("a") == 0
    known = store.epoch
    client.flushall()
    store.open("run-2", known, NOW)
    assert settled("b") == 1
    store.call(Seed(()))
    assert settled("c") == 1
    store.now += 10 * MINUTE
    assert settled("d") == 0
