"""Do the books keep what they promise, whatever arrives twice, late or in the wrong order?"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.accounts import Budget, Concurrency, Entry, Rate, Rolling, Rule, Short, Standing
from policies.books import (
    Announce,
    Books,
    Cancel,
    Charge,
    Done,
    Granted,
    Look,
    Operation,
    Refused,
    Renew,
    Reply,
    Reserve,
    Seed,
    Settle,
    Tell,
)

NOW = 1_800_000_000_000
SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000

TOKENS = Rate(1000, MINUTE, 1000)
SPEND = Budget(1000)
OPEN = Concurrency(2)
TYPICAL = (Entry("tokens", TOKENS, held=100), Entry("spend", SPEND, held=300), Entry("open", OPEN, held=1))


def granted(books: Books, operation: Operation, now: int = NOW) -> Granted:
    reply = books.apply(operation, now)
    assert isinstance(reply, Granted), reply
    return reply


def refused(books: Books, operation: Operation, now: int = NOW) -> Refused:
    reply = books.apply(operation, now)
    assert isinstance(reply, Refused), reply
    return reply


def known(books: Books, operation: Operation, now: int = NOW) -> bool:
    reply = books.apply(operation, now)
    assert isinstance(reply, Done), reply
    return reply.known


def stands(books: Books, *entries: Entry, now: int = NOW) -> list[tuple[int, int]]:
    reply = books.apply(Look(entries or TYPICAL), now)
    assert isinstance(reply, Done)
    return [(one.used, one.reserved) for one in reply.standings]


# -- reserving --------------------------------------------------------------------------------------------------------


def test_a_reservation_holds_and_a_settlement_counts() -> None:
    books = Books()
    reply = granted(books, Reserve("a", TYPICAL, SECOND))
    assert reply == Granted(NOW, (Standing(0, 100, 0), Standing(0, 300, -1), Standing(0, 1, 0)))
    assert known(books, Settle("a", (40, 120, 0)))
    assert stands(books) == [(40, 0), (120, 0), (0, 0)]


def test_what_is_taken_is_used_at_once_and_what_is_settled_comes_on_top() -> None:
    books = Books()
    entry = Entry("sum", SPEND, taken=1, held=10)
    granted(books, Reserve("a", (entry,), SECOND))
    assert stands(books, entry) == [(1, 10)]
    known(books, Settle("a", (4,)))
    assert stands(books, entry) == [(5, 0)]


def test_all_entries_fit_or_none_is_reserved() -> None:
    books = Books()
    granted(books, Reserve("a", (Entry("spend", SPEND, taken=800),), SECOND))
    reply = refused(books, Reserve("b", TYPICAL, SECOND))
    assert reply.short == (Short(1, "used", -1),)
    assert reply.standings == (Standing(0, 0, 0), Standing(800, 0, -1), Standing(0, 0, 0))
    assert stands(books) == [(0, 0), (800, 0), (0, 0)]


def test_every_entry_that_does_not_fit_is_told() -> None:
    books = Books()
    granted(books, Reserve("a", (Entry("open", OPEN, held=2), Entry("spend", SPEND, held=999)), SECOND))
    short = refused(books, Reserve("b", (*TYPICAL, Entry("tokens", TOKENS, held=1001, shadow=True)), SECOND)).short
    assert short == (Short(1, "reserved", -1), Short(2, "reserved", -1), Short(3, "never", -1))


def test_a_shadow_is_counted_and_refuses_nothing() -> None:
    books = Books()
    entry = Entry("spend", SPEND, held=2000, shadow=True)
    assert granted(books, Reserve("a", (entry,), SECOND)).short == (Short(0, "never", -1),)
    assert stands(books, entry) == [(0, 2000)]


def test_entries_of_one_account_must_fit_together() -> None:
    books = Books()
    twice = (Entry("spend", SPEND, held=600), Entry("spend", SPEND, held=401))
    assert refused(books, Reserve("a", twice, SECOND)).short == (Short(1, "never", -1),)
    granted(books, Reserve("a", (twice[0], Entry("spend", SPEND, held=400)), SECOND))


def test_the_same_id_is_granted_again_and_counts_nothing() -> None:
    books = Books()
    first = granted(books, Reserve("a", TYPICAL, SECOND))
    assert granted(books, Reserve("a", TYPICAL, SECOND)) == first
    known(books, Settle("a", (1, 2, 0)))
    granted(books, Reserve("a", TYPICAL, SECOND))
    assert stands(books) == [(1, 0), (2, 0), (0, 0)]


def test_nothing_is_a_reservation_too() -> None:
    books = Books()
    granted(books, Reserve("a", (), 0))
    assert known(books, Renew("a", (), 5))
    assert known(books, Settle("a", ()))
    assert not known(books, Settle("a", ()))


# -- settling ---------------------------------------------------------------------------------------------------------


def test_a_second_settlement_changes_nothing() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    assert known(books, Settle("a", (40, 120, 0)))
    assert not known(books, Settle("a", (50, 130, 0)))
    assert not known(books, Settle("a", (50, 130, 0), TYPICAL))
    assert stands(books) == [(40, 0), (120, 0), (0, 0)]


def test_more_than_was_held_is_counted() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Settle("a", (4000, 5000, 0)))
    assert stands(books) == [(4000, 0), (5000, 0), (0, 0)]


def test_what_was_lost_with_the_data_is_counted_once() -> None:
    books = Books()
    entries = (Entry("spend", SPEND, taken=1, held=300),)
    assert not known(books, Settle("a", (40,)))
    assert stands(books, *entries) == [(0, 0)]
    assert not known(books, Settle("a", (40,), entries))
    assert not known(books, Settle("a", (40,), entries), NOW + DAY - 1)
    assert stands(books, *entries, now=NOW + DAY - 1) == [(41, 0)]


@pytest.mark.parametrize("settled_first", [True, False])
def test_what_was_settled_with_its_entries_counts_before_or_after_a_cancellation(settled_first: bool) -> None:
    books = Books()
    operations: list[Operation] = [Settle("a", (40,), (Entry("spend", SPEND, held=300),)), Cancel("a")]
    for operation in operations if settled_first else operations[::-1]:
        known(books, operation)
    assert stands(books, Entry("spend", SPEND)) == [(40, 0)]


def test_amounts_left_out_are_nothing() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    assert known(books, Renew("a", (10,), SECOND))
    assert known(books, Settle("a", (10,)))
    assert stands(books) == [(10, 0), (0, 0), (0, 0)]


# -- renewing and leases ----------------------------------------------------------------------------------------------


def test_a_renewal_moves_what_was_used_and_keeps_the_lease() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    assert known(books, Renew("a", (30, 90, 0), SECOND), NOW + 999)
    assert stands(books, now=NOW + 1998) == [(14, 70), (0, 300), (0, 1)]
    assert known(books, Settle("a", (40, 120, 0)), NOW + 1998)
    assert stands(books, now=NOW + 1998) == [(24, 0), (120, 0), (0, 0)]


def test_what_was_used_so_far_never_falls() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Renew("a", (30, 90, 0), SECOND))
    known(books, Renew("a", (20, 100, 0), SECOND))
    assert stands(books) == [(30, 70), (0, 300), (0, 1)]
    assert stands(books, now=NOW + SECOND)[1] == (100, 0)


def test_more_so_far_than_was_held_is_not_overlooked() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Renew("a", (101, 301, 7), SECOND))
    assert stands(books) == [(101, 0), (0, 301), (0, 1)]
    known(books, Settle("a", (101, 302, 0)))
    assert stands(books) == [(101, 0), (302, 0), (0, 0)]


def test_a_lease_that_runs_out_settles_at_the_last_renewal() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Renew("a", (30, 90, 0), SECOND))
    assert stands(books, now=NOW + 999)[1:] == [(0, 300), (0, 1)]
    assert stands(books, now=NOW + 1000)[1:] == [(90, 0), (0, 0)]


def test_a_settlement_puts_an_expired_reservation_right_within_an_hour() -> None:
    for later, expected in ((HOUR, 120), (HOUR + SECOND, 90)):
        books = Books()
        granted(books, Reserve("a", TYPICAL, SECOND))
        known(books, Renew("a", (30, 90, 0), SECOND))
        books.apply(Look(()), NOW + SECOND)
        assert known(books, Settle("a", (40, 120, 0)), NOW + later) == (later == HOUR)
        assert stands(books, now=NOW + later)[1] == (expected, 0)


def test_a_settlement_below_what_was_counted_gives_back() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Renew("a", (30, 90, 0), SECOND))
    known(books, Settle("a", (10, 20, 0)))
    assert stands(books) == [(10, 0), (20, 0), (0, 0)]


def test_a_renewal_opens_an_expired_reservation_again() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    assert stands(books, now=NOW + SECOND)[2] == (0, 0)
    assert known(books, Renew("a", (0, 90, 0), SECOND), NOW + 2 * SECOND)
    assert stands(books, now=NOW + 2 * SECOND)[1:] == [(0, 300), (0, 1)]
    assert not known(books, Renew("b", (0, 90, 0), SECOND))


def test_few_leases_end_with_one_operation_and_the_oldest_first() -> None:
    books = Books()
    entry = Entry("open", Concurrency(1000), held=1)
    ids = [f"{number:03}" for number in range(250)]
    random.Random(1).shuffle(ids)
    for id_ in ids:
        granted(books, Reserve(id_, (entry,), 1000 + int(id_)))
    assert [stands(books, entry, now=NOW + DAY)[0][1] for _ in range(4)] == [150, 50, 0, 0]


# -- cancelling, announcing, charging ---------------------------------------------------------------------------------


def test_a_cancellation_undoes_everything() -> None:
    books = Books()
    entries = (*TYPICAL, Entry("requests", Rate(10, MINUTE, 10), taken=1), Entry("roll", Rolling(10, HOUR), taken=1))
    granted(books, Reserve("a", entries, SECOND))
    known(books, Renew("a", (10, 10, 0, 0, 1), SECOND))
    assert known(books, Cancel("a"))
    assert stands(books, *entries) == [(0, 0)] * 5
    assert books.account_count == 0
    assert not known(books, Cancel("a"))
    assert not known(books, Settle("a", (5, 5, 0)))
    assert not known(books, Renew("a", (5, 5, 0), SECOND))
    assert stands(books, *entries) == [(0, 0)] * 5


def test_a_reservation_that_comes_after_its_cancellation_is_refused() -> None:
    books = Books()
    assert not known(books, Cancel("a"))
    reply = refused(books, Reserve("a", TYPICAL, SECOND), NOW + 10 * MINUTE - 1)
    assert reply.short == ()
    assert len(reply.standings) == 3
    granted(books, Reserve("a", TYPICAL, SECOND), NOW + 10 * MINUTE)


def test_what_was_settled_is_not_cancelled() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Settle("a", (40, 120, 0)))
    assert not known(books, Cancel("a"))
    assert stands(books) == [(40, 0), (120, 0), (0, 0)]


def test_an_announcement_enters_whatever_the_limits_say() -> None:
    books = Books()
    entries = (Entry("spend", Budget(1), taken=2, held=300), Entry("open", Concurrency(0), held=1))
    assert not known(books, Announce("a", entries, (40, 0), SECOND))
    assert stands(books, *entries) == [(2, 300), (0, 1)]
    assert known(books, Announce("a", entries, (350, 0), SECOND))
    assert stands(books, *entries) == [(2, 350), (0, 1)]
    assert known(books, Settle("a", (60, 0)))
    assert known(books, Announce("a", entries, (70, 0), SECOND))
    assert stands(books, *entries) == [(62, 0), (0, 0)]


def test_an_announcement_does_not_revive_what_was_cancelled() -> None:
    books = Books()
    known(books, Cancel("a"))
    assert known(books, Announce("a", TYPICAL, (), SECOND))
    assert stands(books) == [(0, 0)] * 3


def test_a_charge_counts_once_a_day() -> None:
    books = Books()
    charge = Charge("c", (Entry("spend", SPEND, taken=5000, held=7), Entry("open", OPEN, taken=1)))
    assert known(books, charge)
    assert not known(books, charge, NOW + DAY - 1)
    assert stands(books, *charge.entries) == [(5000, 0), (0, 0)]
    assert known(books, charge, NOW + DAY)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_totals_count_once_after_a_loss_and_only_in_windows() -> None:
    entries = (
        Entry("spend", SPEND, taken=7),
        Entry("roll", Rolling(10, HOUR), taken=2),
        Entry("tokens", TOKENS, taken=9),
        Entry("open", OPEN, taken=1),
    )
    books = Books()
    assert not known(books, Seed(entries))
    books = Books(seeded=False)
    known(books, Charge("c", (entries[0],)))
    assert known(books, Seed(entries))
    assert not known(books, Seed(entries))
    assert stands(books, *entries) == [(14, 0), (2, 0), (0, 0), (0, 0)]


def test_after_a_loss_windows_hold_what_was_counted_since() -> None:
    entries = (
        Entry("spend", SPEND, taken=7, held=3),
        Entry("roll", Rolling(10, HOUR), taken=2),
        Entry("r", TOKENS, taken=1),
    )
    books = Books()
    granted(books, Reserve("a", entries, SECOND))
    books.lose()
    assert stands(books, *entries) == [(0, 3), (0, 0), (1, 0)]
    known(books, Charge("c", entries))
    assert known(books, Seed(entries))
    assert stands(books, *entries) == [(14, 3), (4, 0), (2, 0)]


def spent(books: Books, now: int = NOW) -> int:
    return stands(books, Entry("spend", SPEND), now=now)[0][0]


def bill(id_: str, amount: int, at: int = NOW, *, of: tuple[str, ...] = (), missing: bool = True) -> Tell:
    return Tell(f"{id_}#", (Entry("spend", SPEND, taken=amount),), at, of=of, missing=missing)


def settle(id_: str, amount: int, at: int = NOW) -> Settle:
    return Settle(id_, (0, amount, 0), TYPICAL, at, f"{id_}#")


def test_after_a_loss_a_bill_counts_once_whoever_tells_it() -> None:
    orders: list[list[Operation]] = [[bill("a", 40), settle("a", 40)], [settle("a", 40), bill("a", 40)]]
    for told in orders:
        for held in (True, False):
            books = Books()
            books.lose()
            if held:
                known(books, Announce("a", TYPICAL, (0, 10, 0), DAY))
            for operation in told:
                known(books, operation)
            known(books, Seed(()))
            assert [spent(books), *stands(books)[1:]] == [40, (40, 0), (0, 0)]
            # The ledger may be read again for some time, whatever else has been forgotten.
            assert not known(books, bill("a", 40), NOW + 10 * MINUTE - 1)
            assert spent(books) == 40


def test_a_bill_from_before_the_cut_is_among_the_totals() -> None:
    books = Books()
    books.lose(cut_ms=NOW)
    known(books, settle("a", 40, NOW - 1))
    assert not known(books, bill("b", 50, NOW - 1))
    assert [spent(books), stands(books)[0]] == [0, (0, 0)]
    known(books, settle("c", 60, NOW))
    assert known(books, bill("d", 70, NOW))
    assert spent(books) == 130


def test_what_was_settled_before_the_loss_counts_again_in_windows_alone() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Settle("a", (30, 40, 0)))
    books.lose()
    assert stands(books) == [(30, 0), (0, 0), (0, 0)]
    known(books, Settle("a", (30, 40, 0), TYPICAL))
    known(books, Settle("a", (30, 40, 0), TYPICAL))
    assert stands(books) == [(30, 0), (40, 0), (0, 0)]


def test_what_expired_gives_way_to_its_bill() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Renew("a", (0, 90, 0), SECOND))
    books.apply(Look(()), NOW + SECOND)
    assert spent(books, NOW + SECOND) == 90
    assert known(books, bill("a", 35, of=("a",), missing=False), NOW + MINUTE)
    assert not known(books, bill("a", 35, of=("a",), missing=False), NOW + MINUTE)
    known(books, settle("a", 36), NOW + MINUTE)
    assert spent(books, NOW + MINUTE) == 35


def test_what_is_open_holds_nothing_once_its_bill_is_told() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    assert known(books, bill("a", 35, of=("a", "b")))
    assert stands(books) == [(0, 100), (35, 0), (0, 1)]
    known(books, Renew("a", (0, 90, 0), SECOND))
    assert stands(books, now=NOW + MINUTE)[1:] == [(35, 0), (0, 0)]


def test_a_bill_of_what_is_not_known_counts_where_it_may_be_missing() -> None:
    books = Books()
    granted(books, Reserve("a", TYPICAL, SECOND))
    known(books, Settle("a", (0, 40, 0)))
    assert not known(books, bill("a", 40, of=("a",)))
    assert not known(books, bill("b", 40, of=("b",), missing=False))
    assert known(books, bill("b", 40, of=("b",)))
    assert spent(books) == 80


def test_windows_count_at_the_time_of_the_bill() -> None:
    day, roll = Budget(1000, (NOW - DAY, NOW, NOW + DAY)), Rolling(1000, HOUR)
    books = Books()
    entries = (Entry("day", day), Entry("roll", roll))
    known(books, Settle("a", (1, 1), entries, NOW - 1))
    known(books, Settle("b", (2, 2), entries, NOW))
    known(books, Settle("c", (4, 4), entries, NOW - 62 * MINUTE))
    assert stands(books, *entries) == [(2, 0), (3, 0)]
    assert stands(books, *entries, now=NOW + HOUR) == [(2, 0), (2, 0)]
    # What is taken back is taken from there.
    refund = tuple(Entry(entry.account, entry.rule, taken=-1) for entry in entries)
    known(books, Tell("adj", refund, NOW, times_ms=(NOW - 1, NOW - 1)))
    assert stands(books, *entries) == [(2, 0), (2, 0)]


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [Rate(10, MINUTE, 10), Budget(10, (NOW, NOW + MINUTE)), Rolling(10, MINUTE), Concurrency(10)]
)
def test_users_that_have_gone_are_forgotten(rule: Rule) -> None:
    books = Books()
    for number in range(5000):
        granted(books, Reserve(str(number), (Entry(f"user{number}", rule, held=2),), SECOND), NOW + number)
        known(books, Settle(str(number), (1,)), NOW + number)
    assert books.account_count <= 5000
    now = NOW + 10 * MINUTE
    for _ in range(200):
        books.apply(Look(()), now)
    assert (books.account_count, books.record_count) == (0, 0)
    assert not books._checks
    assert not books._checked
    assert not books._leases
    assert not any(books._memories.values())


def test_what_is_used_for_ever_or_reserved_is_not_forgotten() -> None:
    books = Books()
    granted(books, Reserve("a", (Entry("for ever", SPEND, taken=1), Entry("open", OPEN, held=1)), 100 * DAY))
    for day in range(90):
        books.apply(Look(()), NOW + day * DAY)
    assert stands(books, Entry("for ever", SPEND), Entry("open", OPEN), now=NOW + 90 * DAY) == [(1, 0), (0, 1)]
    assert sum(map(len, books._checks.values())) == 2


# -- whatever happens -------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    "rate": Rate(50, MINUTE, 20),
    "window": Budget(60, tuple(NOW + number * 10 * SECOND for number in range(-1, 1000))),
    "sum": Budget(200),
    "roll": Rolling(60, MINUTE),
    "open": Concurrency(3),
}
names = st.sampled_from(sorted(RULES))
amounts = st.lists(st.integers(0, 12), min_size=4, max_size=4).map(tuple)
entries_ = st.lists(
    st.builds(
        lambda name, taken, held: Entry(name, RULES[name], taken, held), names, st.integers(0, 3), st.integers(0, 12)
    ),
    max_size=4,
).map(tuple)
ids = st.sampled_from("abcdef")
leases = st.sampled_from([1, 500, 3000])
operations_ = st.one_of(
    st.builds(Reserve, ids, entries_, leases),
    st.builds(Settle, ids, amounts),
    st.builds(Settle, ids, amounts, entries_),
    st.builds(Renew, ids, amounts, leases),
    st.builds(Cancel, ids),
    st.builds(Announce, ids, entries_, amounts, leases),
    st.builds(Charge, ids, entries_),
    st.builds(Settle, ids, amounts, entries_, st.just(NOW), ids.map("{}#".format)),
    st.builds(
        Tell, ids.map("{}#".format), entries_, st.just(NOW), of=ids.map(lambda id_: (id_,)), missing=st.booleans()
    ),
    st.builds(Look, entries_),
)
histories = st.lists(st.tuples(operations_, st.sampled_from([0, 0, 1, 100, 1000, 5000, -300])), max_size=60)


def reserved_by_open(books: Books) -> dict[str, int]:
    sums = dict.fromkeys(RULES, 0)
    for record in books._records.values():
        if record.state == "open":
            for entry, counted in zip(record.entries, record.counted, strict=True):
                if isinstance(entry.rule, Rate):
                    sums[entry.account] += max(0, entry.held - counted)
                elif isinstance(entry.rule, Concurrency):
                    sums[entry.account] += entry.held
                elif not record.billed:
                    sums[entry.account] += max(entry.held, counted)
    return sums


def snapshot(books: Books, now: int) -> Reply:
    return books.apply(Look(tuple(Entry(name, rule) for name, rule in RULES.items())), now)


@settings(max_examples=100)
@given(histories)
def test_what_is_reserved_is_what_open_reservations_hold(history: list[tuple[Operation, int]]) -> None:
    books, now = Books(), NOW
    for operation, passed in history:
        now += passed
        books.apply(operation, now)
        sums = reserved_by_open(books)
        assert all(account.reserved == sums[name] for name, account in books._accounts.items())
        assert all(name in books._accounts for name, reserved in sums.items() if reserved)
    look = snapshot(books, now + DAY)
    assert isinstance(look, Done)
    assert not any(one.reserved for one in look.standings)


@settings(max_examples=100)
@given(histories, st.builds(Reserve, st.just("z"), entries_, leases))
def test_a_refused_reservation_changes_nothing(history: list[tuple[Operation, int]], last: Reserve) -> None:
    books, now = Books(), NOW
    for operation, passed in history:
        now += passed
        books.apply(operation, now)
    before = snapshot(books, now)
    accounts, records = dict(books._accounts), dict(books._records)
    if isinstance(books.apply(last, now), Refused):
        assert snapshot(books, now) == before
        assert books._accounts == accounts
        assert books._records == records


@settings(max_examples=100)
@given(histories, histories)
def test_no_limit_is_passed_by_those_who_stay_within_what_they_hold(
    history: list[tuple[Operation, int]], more: list[tuple[Operation, int]]
) -> None:
    # Without leases that run out: what expired may be counted after others have taken its room.
    books, now = Books(), NOW
    held: dict[str, tuple[Entry, ...]] = {}
    for operation, passed in history + more:
        now += max(0, passed)
        match operation:
            case Reserve():
                reply = books.apply(Reserve(operation.id, operation.entries, DAY), now)
                if isinstance(reply, Granted):
                    held.setdefault(operation.id, operation.entries)
            case Settle():
                books.apply(Settle(operation.id, within(held.get(operation.id, ()), operation.actual)), now)
            case Renew():
                books.apply(Renew(operation.id, within(held.get(operation.id, ()), operation.so_far), DAY), now)
            case Cancel():
                books.apply(operation, now)
        look = snapshot(books, now)
        assert isinstance(look, Done)
        for (name, rule), one in zip(RULES.items(), look.standings, strict=True):
            assert one.used + one.reserved <= (rule.burst if isinstance(rule, Rate) else rule.limit), name


def within(entries: tuple[Entry, ...], amounts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(amount, entry.held) for amount, entry in zip(amounts, entries, strict=False))


@settings(max_examples=100)
@given(histories)
def test_everything_may_arrive_twice(history: list[tuple[Operation, int]]) -> None:
    once, twice, now = Books(), Books(), NOW
    for operation, passed in history:
        now += max(0, passed)
        once.apply(operation, now)
        twice.apply(operation, now)
        twice.apply(operation, now)
        assert snapshot(once, now) == snapshot(twice, now)


def test_settled_reservations_leave_nothing_of_their_leases_however_long() -> None:
    books = Books()
    open_ones = 10
    for number in range(open_ones):
        books.apply(Reserve(f"open-{number}", (), 366 * 86_400_000), 1)
    for number in range(20_000):
        books.apply(Reserve(str(number), (), 366 * 86_400_000), 2)
        books.apply(Settle(str(number), ()), 2)
    assert len(books._leases) <= 1001
    assert sum(id_.startswith("open-") for _, id_ in books._leases) == open_ones
