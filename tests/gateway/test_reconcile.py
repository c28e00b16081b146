"""Does the store hear all that it does not know, and nothing twice that counts twice?"""

from __future__ import annotations

import pytest

from gateway import reconcile
from gateway.limiter import Item, Numbers, Order
from gateway.reconcile import NEVER, UNSURE, Backlog, Held
from policies.accounts import Budget, Concurrency, Entry, Rate
from policies.operations import Announce, Cancel, Charge, Settle, Tell
from tests.gateway.limiting import concurrent, order, requests, spend

NOW_MS = 1_000_000


def held(*items: Item, epoch: str = NEVER, so_far: tuple[int, ...] = (0,)) -> Held:
    wanted = order(*items)
    return Held(wanted.id, wanted, lambda: so_far, epoch, 0.0)


RATE = Rate(100, 3_600_000, 100)


def tokens(held: int, account: str = "tokens") -> Item:
    return Item(Entry(account, RATE, 0, held), "open")


def said(backlog: Backlog, most: int = 64, now_ms: int = NOW_MS) -> list[reconcile.Said]:
    return backlog.next(most, epoch="e1", lease_ms=1000, now_ms=now_ms)


def test_open_reservations_are_announced_with_what_they_have_used() -> None:
    backlog = Backlog("r", Numbers())
    one = held(spend(100, 10), so_far=(4,))
    backlog.announce([one])
    first = said(backlog)
    assert first == [Announce(one.id, (one.order.items[0].entry,), (4,), 1000)]
    assert one.epoch == UNSURE
    assert said(backlog) == first, "what was not confirmed is said again"
    backlog.done(first, epoch="e1", now_s=7.0)
    assert (one.epoch, one.told_s) == ("e1", 7.0)
    assert not backlog


def test_the_end_of_what_the_store_knows_is_told_without_entries_and_of_what_it_may_know_with_them() -> None:
    backlog = Backlog("r", Numbers())
    known, unsure, lost = (held(spend(100, 10), epoch=epoch) for epoch in ("e1", UNSURE, "e0"))
    for one in (known, unsure, lost):
        backlog.settle(one, (3,), NOW_MS, NOW_MS - 7)
    entries = (spend(100, 10).entry,)
    assert said(backlog) == [
        Settle(known.id, (3,), (), NOW_MS - 7, f"{known.id}#"),
        Settle(unsure.id, (3,), entries, NOW_MS - 7, f"{unsure.id}#"),
        Settle(lost.id, (3,), entries, NOW_MS - 7, f"{lost.id}#"),
    ]


def test_what_the_store_never_heard_of_is_charged_as_one_sum() -> None:
    backlog = Backlog("r", Numbers())
    for _ in range(5):
        backlog.settle(held(tokens(10), requests(100), concurrent(3)), (4, 0, 0), NOW_MS)
    first = said(backlog)
    used = (tokens(20).entry, requests(100).entry)
    assert first == [
        Charge(
            "r/1",
            tuple(Entry(one.account, one.rule, taken, shadow=True) for one, taken in zip(used, (20, 5), strict=True)),
        )
    ]
    # What is used until that is confirmed is another charge, with another id.
    backlog.settle(held(tokens(10)), (4,), NOW_MS)
    assert said(backlog) == first
    backlog.done(first, epoch="e1", now_s=0.0)
    assert said(backlog) == [Charge("r/2", (Entry("tokens", RATE, 4, 0, shadow=True),))]


def test_what_the_store_never_heard_of_is_told_bill_by_bill_to_windows() -> None:
    backlog = Backlog("r", Numbers())
    one = held(spend(100, 10), requests(100))
    counted = Held("x", Order("exchange/counted", "all", one.order.items), lambda: (0, 0), NEVER, 0.0)
    nothing = held(spend(100, 10), concurrent(3))
    for ended, spent in ((one, 4), (counted, 5), (nothing, 0)):
        backlog.settle(ended, (spent, 0), NOW_MS, NOW_MS - 7)
    charge, *bills = said(backlog)
    assert isinstance(charge, Charge)
    assert [entry.account for entry in charge.entries] == ["requests"]
    assert bills == [
        Tell(f"{one.id}#", (Entry("spend", Budget(100), 4, shadow=True),), NOW_MS - 7),
        Tell("exchange#", (Entry("spend", Budget(100), 5, shadow=True),), NOW_MS - 7),
    ]
    backlog.done([charge, *bills], epoch="e1", now_s=0.0)
    assert not backlog


def test_a_sum_is_told_in_parts_and_each_account_in_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_CHARGED_AT_ONCE", 2)
    backlog = Backlog("r", Numbers())
    for number in range(5):
        backlog.settle(held(tokens(1, f"a{number}")), (1,), NOW_MS)
    charged: dict[str, int] = {}
    while parts := said(backlog):
        for part in parts:
            assert isinstance(part, Charge)
            for entry in part.entries:
                charged[entry.account] = charged.get(entry.account, 0) + entry.taken
        # More of the same comes while it is being told.
        if len(charged) < 5:
            backlog.settle(held(tokens(10, "a0")), (10,), NOW_MS)
        backlog.done(parts, epoch="e1", now_s=0.0)
    assert charged == {"a0": 21, "a1": 1, "a2": 1, "a3": 1, "a4": 1}


def test_rates_drain_while_nobody_hears_of_them() -> None:
    backlog = Backlog("r", Numbers())
    rate = Item(Entry("rate", Rate(60, 60_000, 60), 1), "open")
    for _ in range(30):
        backlog.settle(held(rate), (0,), NOW_MS)
    backlog.settle(held(rate), (0,), NOW_MS + 20_000)
    (charge,) = said(backlog, now_ms=NOW_MS + 20_000)
    assert isinstance(charge, Charge)
    assert {entry.account: entry.taken for entry in charge.entries} == {"rate": 11}


def test_cancellations_come_first_and_what_is_undone_is_not_announced() -> None:
    backlog = Backlog("r", Numbers())
    one, two = held(spend(100, 10)), held(spend(100, 10))
    backlog.announce([one, two])
    backlog.cancel(two.id)
    assert [type(part) for part in said(backlog)] == [Cancel, Announce]
    backlog.forget(one.id)
    assert said(backlog) == [Cancel(two.id)]


def test_it_is_bounded_and_counts_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_MOST_SETTLES", 10)
    monkeypatch.setattr(reconcile, "_MOST_ACCOUNTS", 10)
    monkeypatch.setattr(reconcile, "_MOST_BILLS", 10)
    numbers = Numbers()
    backlog = Backlog("r", numbers)
    for number in range(15):
        backlog.settle(held(spend(100, 10), epoch="e1"), (1,), NOW_MS)
        backlog.settle(held(tokens(1, f"a{number}")), (1,), NOW_MS)
        backlog.settle(held(spend(100, 10)), (1,), NOW_MS)
    assert numbers.dropped == 15
    parts = said(backlog)
    assert sum(isinstance(part, Settle) for part in parts) == 10


def test_what_the_store_will_not_take_is_not_said_for_ever() -> None:
    numbers = Numbers()
    backlog = Backlog("r", numbers)
    backlog.settle(held(spend(100, 10), epoch="e1"), (1,), NOW_MS)
    backlog.cancel("x")
    backlog.drop(said(backlog))
    assert not backlog
    assert numbers.dropped == 2


def test_concurrency_leaves_nothing_behind() -> None:
    backlog = Backlog("r", Numbers())
    backlog.settle(held(Item(Entry("c", Concurrency(3), 0, 1), "open")), (1,), NOW_MS)
    assert not backlog
