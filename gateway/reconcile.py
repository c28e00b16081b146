"""What must the store hear before limits are shared again? What this process did while it could not be asked.

* Reservations that are open are announced, whoever granted them.
* Reservations that the store may know, and that ended meanwhile, are settled or cancelled by their id.
* What was used by exchanges that the store never heard of is added up for each account and charged once. What they
  spent is told bill by bill: a store that has lost its data is told the same by the ledger, under the same names.

Nothing is forgotten before the store has said that it was done, and everything may be said twice: the store knows each
of it by an id.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

import msgspec

from gateway.limiter import Numbers, Order, SoFar, bill_of, entries_of
from policies.accounts import Concurrency, Entry, is_window
from policies.books import Announce, Books, Cancel, Charge, Done, Look, Settle, Tell

_MOST_SETTLES = 100_000
_MOST_BILLS = 100_000
_MOST_ACCOUNTS = 100_000
_ENTERED_EVERY_MS = 250
_CHARGED_AT_ONCE = 64

NEVER = ""
"""The epoch of what the store was never told."""
UNSURE = "?"
"""The epoch of what the store was told and has not confirmed."""


Said = Announce | Tell | Cancel | Charge | Settle
_T = TypeVar("_T")


class Held(msgspec.Struct):
    """An open reservation, `id` to the store. `epoch`: in which it was confirmed. `told_s`: when it was last told."""

    id: str
    order: Order
    so_far: SoFar
    epoch: str
    told_s: float


class _Ended(msgspec.Struct, frozen=True):
    held: Held
    actual: tuple[int, ...]
    at_ms: int


class Backlog:
    """What the store does not know yet. `name` makes the ids of charges unique; `numbers` has what was dropped."""

    def __init__(self, name: str, numbers: Numbers) -> None:
        self._numbers = numbers
        self._name = name
        self._announced: dict[str, Held] = {}
        self._cancelled: dict[str, None] = {}
        self._ended: dict[str, _Ended] = {}
        self._charges: dict[str, Charge] = {}
        self._bills: dict[str, Tell] = {}
        # What is added up, and what is being told: a sum must not grow once part of it was told.
        self._spent = _Spent()
        self._told = _Spent()
        self._number = 0

    def __bool__(self) -> bool:
        told = self._announced or self._cancelled or self._ended or self._charges or self._bills
        return bool(told or self._spent or self._told)

    def announce(self, held: Iterable[Held]) -> None:
        """Tell of open reservations."""
        self._announced.update((one.id, one) for one in held)

    def cancel(self, id_: str) -> None:
        """Undo what the store may have granted."""
        self._announced.pop(id_, None)
        self._cancelled[id_] = None

    def settle(self, held: Held, actual: tuple[int, ...], now_ms: int, at_ms: int = 0) -> None:
        """Tell how a reservation has ended, with a bill made at `at_ms`. What the store never heard of is added up."""
        id_ = held.id
        self._announced.pop(id_, None)
        if held.epoch == NEVER:
            entries = entries_of(held.order.items)
            self._numbers.dropped += self._spent.add(entries, actual, now_ms)
            self._bill(bill_of(held.order), entries, actual, at_ms or now_ms)
            return
        self._ended[id_] = _Ended(held, actual, at_ms or now_ms)
        if len(self._ended) > _MOST_SETTLES:
            # Its lease will end it, at what was used when it was renewed last.
            self._ended.pop(next(iter(self._ended)))
            self._numbers.dropped += 1

    def _bill(self, bill: str, entries: tuple[Entry, ...], actual: tuple[int, ...], at_ms: int) -> None:
        spent = tuple(
            Entry(entry.account, entry.rule, entry.taken + amount, 0, shadow=True)
            for entry, amount in zip(entries, actual, strict=True)
            if is_window(entry.rule) and entry.taken + amount
        )
        if spent:
            self._bills[bill] = Tell(bill, spent, at_ms)
        if len(self._bills) > _MOST_BILLS:
            # It is in the ledger, and counts again when budgets are seeded from there.
            self._bills.pop(next(iter(self._bills)))
            self._numbers.dropped += 1

    def forget(self, id_: str) -> None:
        """Say nothing of a reservation that the store never heard of and that is undone."""
        self._announced.pop(id_, None)

    def next(self, most: int, *, epoch: str, lease_ms: int, now_ms: int) -> list[Said]:
        """Return the next `most` things to say, in the order in which they must be said."""
        said: list[Said] = [Cancel(id_) for id_ in _few(self._cancelled, most)]
        for held in _few(self._announced.values(), most - len(said)):
            # From here on it may be known, so its end must be told too, whatever becomes of this.
            held.epoch = UNSURE
            said.append(Announce(held.id, entries_of(held.order.items), held.so_far(), lease_ms))
        if len(said) < most and not self._charges:
            if not self._told:
                self._told, self._spent = self._spent, _Spent()
            entries = self._told.take(_CHARGED_AT_ONCE, now_ms)
            if entries:
                self._number += 1
                charge = Charge(f"{self._name}/{self._number}", entries)
                self._charges[charge.id] = charge
        said.extend(_few(self._charges.values(), most - len(said)))
        said.extend(_few(self._bills.values(), most - len(said)))
        for ended in _few(self._ended.values(), most - len(said)):
            # One that was lost with the store's data is counted from its entries.
            order = ended.held.order
            entries = () if ended.held.epoch == epoch else entries_of(order.items)
            said.append(Settle(ended.held.id, ended.actual, entries, ended.at_ms, bill_of(order)))
        return said

    def done(self, said: Iterable[Said], *, epoch: str, now_s: float) -> None:
        """Forget what the store has confirmed."""
        for one in said:
            match one:
                case Announce():
                    held = self._announced.pop(one.id, None)
                    if held is not None:
                        held.epoch, held.told_s = epoch, now_s
                case Cancel():
                    self._cancelled.pop(one.id, None)
                case Charge():
                    self._charges.pop(one.id, None)
                case Tell():
                    self._bills.pop(one.id, None)
                case Settle():
                    self._ended.pop(one.id, None)

    def drop(self, said: Iterable[Said]) -> None:
        """Forget what the store will not take, or it would be said for ever."""
        for one in said:
            self._numbers.dropped += 1
            for kept in (self._announced, self._cancelled, self._charges, self._bills, self._ended):
                kept.pop(one.id, None)


class _Spent:
    """What was used of rates, as it would stand in the books of the store now: they drain here too."""

    def __init__(self) -> None:
        self._books = Books()
        self._accounts: dict[str, Entry] = {}
        self._sums: dict[str, int] = {}
        self._first_ms = self._last_ms = 0
        self._number = 0

    def __bool__(self) -> bool:
        return bool(self._accounts)

    def add(self, entries: tuple[Entry, ...], actual: tuple[int, ...], now_ms: int) -> int:
        """Count what one exchange used; how many accounts there was no room for."""
        dropped = 0
        if now_ms - self._first_ms >= _ENTERED_EVERY_MS:
            self._enter()
            self._first_ms = now_ms
        self._last_ms = now_ms
        for entry, amount in zip(entries, actual, strict=True):
            used = entry.taken + amount
            if not used or isinstance(entry.rule, Concurrency) or is_window(entry.rule):
                continue
            if entry.account not in self._accounts and len(self._accounts) >= _MOST_ACCOUNTS:
                dropped += 1
                continue
            self._accounts[entry.account] = entry
            self._sums[entry.account] = self._sums.get(entry.account, 0) + used
        return dropped

    def take(self, most: int, now_ms: int) -> tuple[Entry, ...]:
        """Hand over the sums of up to `most` accounts, and forget them."""
        self._enter()
        taken = [self._accounts.pop(account) for account in list(_few(self._accounts, most))]
        reply = self._books.apply(Look(tuple(taken)), now_ms) if taken else None
        if not isinstance(reply, Done):
            return ()
        return tuple(
            Entry(entry.account, entry.rule, standing.used, 0, shadow=True)
            for entry, standing in zip(taken, reply.standings, strict=True)
            if standing.used
        )

    def _enter(self) -> None:
        """Put what was added up into the books, when it was used: not each by itself, for books remember every id."""
        if not self._sums:
            return
        self._number += 1
        entries = tuple(
            Entry(account, self._accounts[account].rule, used, 0, shadow=True)
            for account, used in self._sums.items()
            if account in self._accounts
        )
        self._sums.clear()
        self._books.apply(Charge(str(self._number), entries), self._last_ms)


def _few(many: Iterable[_T], most: int) -> list[_T]:
    return list(islice(many, max(0, most)))
