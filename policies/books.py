"""What is reserved, by whom, until when? All accounts and open reservations of one partition: reserve, then settle.

`Books` is the reference: the memory store is this class, and the script that runs in Redis (`gateway/limits.lua`)
answers every operation as it does, which a property test proves with random sequences. Rules a reader must not break:

* A reservation is all or nothing: one that does not fit changes no account.
* What is reserved in an account is the sum of what its open reservations still hold, always.
* Used amounts are counted when they are known: `taken` at once, the rest when it is renewed or settled; in windows only
  when a reservation ends, all of it at one time, so that windows add up to bills.
* Every operation is idempotent on the id of its reservation, whatever arrives twice, late or in the wrong order.
* Nothing is kept for ever but what is used for ever: the past is swept up, a little with every operation.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Literal, assert_never

import msgspec

from policies.accounts import (
    EMPTY,
    Account,
    Concurrency,
    Entry,
    Rule,
    Short,
    Standing,
    correct,
    hold,
    idle_at_ms,
    is_window,
    room,
    standing,
    take,
)
from policies.operations import (
    Announce,
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
    Stale,
    Tell,
)

__all__ = [
    "Announce",
    "Books",
    "Cancel",
    "Charge",
    "Done",
    "Granted",
    "Look",
    "Operation",
    "Refused",
    "Renew",
    "Reply",
    "Reserve",
    "Seed",
    "Settle",
    "Stale",
    "Tell",
]

# How long an id is remembered, by what became of its reservation. `gateway/limits.lua` has the same numbers.
_SETTLED_MS = 2 * 60_000
_CANCELLED_MS = 10 * 60_000
_EXPIRED_MS = 60 * 60_000
_COUNTED_MS = 24 * 60 * 60_000

_TELLING_MS = 10 * 60_000
"""For so long after the totals of a loss every bill is remembered, so that the ledger may tell them all again."""

_MOST_AT_ONCE = 100
"""Leases, ids and accounts that one operation sweeps up at most."""

_MOST_SKIPPED = 1000

_FEW_LEASES = 1000
"""So many may be listed before those that have ended are looked for."""

_KEPT_MS = 60_000
"""How much longer than it counts a thing is kept, so that a clock may go back that far."""

_LOOK_AGAIN_MS = 10 * 60_000


class _Record(msgspec.Struct, frozen=True, gc=False):
    """What is known of one id. `counted` is what was counted of each entry beside `taken`, the last time `since_ms`.

    Windows count it only once it has `expired`; until then they know it. `until_ms` is the end of the lease where it is
    open, else of its memory. What is `settled` or `cancelled` has no entries any more. `mark` is that of the books when
    windows last counted it. Of one that is `billed` they count and hold nothing.
    """

    state: Literal["open", "expired", "settled", "cancelled"]
    until_ms: int
    entries: tuple[Entry, ...] = ()
    counted: tuple[int, ...] = ()
    since_ms: int = 0
    mark: int = 0
    billed: bool = False

    @property
    def unsettled(self) -> bool:
        """Whether there is anything to put right."""
        return self.state in ("open", "expired")


class Books:
    """The accounts and reservations of one partition, in memory. It is told the time and never reads it.

    `seeded=False`: they follow others that were lost, so the first `Seed` counts.
    """

    def __init__(self, *, seeded: bool = True) -> None:
        self.seeded = seeded
        self._lost = not seeded
        self._cut_ms = 0
        self._telling_until_ms = 0
        self._mark = 0
        self._accounts: dict[str, Account] = {}
        self._records: dict[str, _Record] = {}
        # Each lists times and names, the earliest first; those that no longer hold are skipped when their time comes.
        self._leases: list[tuple[int, str]] = []
        self._most_leases = _FEW_LEASES
        # By how long they last, so that each is in order as it is.
        self._memories: dict[int, deque[tuple[int, str]]] = {}
        # Accounts to look at, by the second after which: a million of them are in no order that costs anything.
        self._checks: dict[int, list[str]] = {}
        self._check_seconds: list[int] = []
        self._checked: set[str] = set()

    @property
    def account_count(self) -> int:
        """How many accounts there are."""
        return len(self._accounts)

    @property
    def record_count(self) -> int:
        """How many reservations are open or remembered."""
        return len(self._records)

    def apply(self, operation: Operation, now_ms: int) -> Reply:
        """Perform `operation` at `now_ms`, milliseconds since the epoch, after all that was due before it."""
        self._expire(now_ms)
        self._forget(now_ms)
        match operation:
            case Reserve():
                return self._reserve(operation, now_ms)
            case Settle():
                return self._settle(operation, now_ms)
            case Renew():
                return Done(now_ms, self._renew(operation.id, operation.so_far, operation.lease_ms, now_ms))
            case Cancel():
                return self._cancel(operation, now_ms)
            case Announce():
                return self._announce(operation, now_ms)
            case Charge():
                return self._charge(operation, now_ms)
            case Tell():
                return self._tell(operation, now_ms)
            case Look():
                return Done(now_ms, known=True, standings=self._standings(operation.entries, now_ms))
            case Seed():
                return self._seed(operation, now_ms)
        assert_never(operation)

    def lose(self, cut_ms: int = 0) -> None:
        """Begin anew after a loss: whatever windows held no longer counts, and the next `Seed` does.

        Its totals have every bill made before `cut_ms`.
        """
        self.seeded, self._lost, self._cut_ms = False, True, cut_ms
        self._mark += 1
        for name, account in tuple(self._accounts.items()):
            if account.rule is not None and is_window(account.rule):
                self._put(name, Account(account.reserved), 0)

    # -- operations ---------------------------------------------------------------------------------------------------

    def _reserve(self, operation: Reserve, now_ms: int) -> Reply:
        entries = operation.entries
        record = self._find(operation.id, now_ms)
        if record is not None:
            standings = self._standings(entries, now_ms)
            return Refused(now_ms, standings, ()) if record.state == "cancelled" else Granted(now_ms, standings)
        short = self._short(entries, now_ms)
        if any(not entries[one.index].shadow for one in short):
            return Refused(now_ms, self._standings(entries, now_ms), short)
        self._open(operation.id, entries, (0,) * len(entries), operation.lease_ms, now_ms)
        return Granted(now_ms, self._standings(entries, now_ms), short)

    def _settle(self, operation: Settle, now_ms: int) -> Reply:
        record = self._find(operation.id, now_ms)
        if record is not None and record.unsettled:
            self._release(record, now_ms)
            self._uncount(record, now_ms)
            actual = _padded(operation.actual, record.entries)
            self._count(record, actual, now_ms)
            if not record.billed:
                self._count_windows(operation, record.entries, actual, now_ms, doubtful=self._telling(now_ms))
            self._remember(operation.id, "settled", _SETTLED_MS, now_ms)
            return Done(now_ms, known=True)
        entries = operation.entries
        if not entries or (record is not None and record.state == "settled" and record.mark == self._mark):
            return Done(now_ms, known=False)
        if record is None or record.state != "settled":
            rest = tuple(entry for entry in entries if not is_window(entry.rule))
            self._take(rest, now_ms)
            amounts = zip(entries, _padded(operation.actual, entries), strict=True)
            unknown = _Record("open", 0, rest, (0,) * len(rest))
            self._count(unknown, [amount for entry, amount in amounts if not is_window(entry.rule)], now_ms)
        # One that was settled before the loss is still there in its rates.
        spent = [
            entry.taken + amount for entry, amount in zip(entries, _padded(operation.actual, entries), strict=True)
        ]
        self._count_windows(operation, entries, spent, now_ms, doubtful=True)
        self._remember(operation.id, "settled", _COUNTED_MS, now_ms)
        return Done(now_ms, known=False)

    def _count_windows(
        self, operation: Settle, entries: Sequence[Entry], amounts: Sequence[int], now_ms: int, *, doubtful: bool
    ) -> None:
        """Count what an exchange came to, unless that was told; `doubtful`: it may have been, or will be, by its name.

        Where it is not doubtful a reservation that is known knows itself that its bill was told.
        """
        doubtful = doubtful and operation.bill != ""
        if 0 < operation.at_ms < self._cut_ms or (doubtful and self._known_bill(operation.bill, now_ms)):
            return
        for entry, amount in zip(entries, amounts, strict=True):
            if is_window(entry.rule):
                self._take_one(entry, amount, now_ms, operation.at_ms or None)
        if doubtful:
            self._remember(operation.bill, "settled", _COUNTED_MS, now_ms)

    def _renew(self, id_: str, so_far: Sequence[int], lease_ms: int, now_ms: int) -> bool:
        record = self._find(id_, now_ms)
        if record is None or not record.unsettled:
            return False
        counted = tuple(map(max, record.counted, _padded(so_far, record.entries)))
        self._release(record, now_ms)
        self._uncount(record, now_ms)
        self._count(record, counted, now_ms)
        since_ms = now_ms if counted != record.counted else record.since_ms
        renewed = msgspec.structs.replace(
            record, state="open", until_ms=now_ms + max(1, lease_ms), counted=counted, since_ms=since_ms
        )
        self._hold(id_, renewed, now_ms)
        return True

    def _cancel(self, operation: Cancel, now_ms: int) -> Reply:
        record = self._find(operation.id, now_ms)
        known = record is not None and record.unsettled
        if record is not None and record.unsettled:
            self._release(record, now_ms)
            self._uncount(record, now_ms)
            for entry, counted in zip(record.entries, record.counted, strict=True):
                if not is_window(entry.rule):
                    self._correct(entry, entry.taken + counted, record.since_ms, now_ms)
                elif record.mark == self._mark:
                    self._correct(entry, entry.taken, record.since_ms, now_ms)
        if record is None or record.unsettled:
            self._remember(operation.id, "cancelled", _CANCELLED_MS, now_ms)
        return Done(now_ms, known)

    def _announce(self, operation: Announce, now_ms: int) -> Reply:
        if self._find(operation.id, now_ms) is not None:
            self._renew(operation.id, operation.so_far, operation.lease_ms, now_ms)
            return Done(now_ms, known=True)
        so_far = _padded(operation.so_far, operation.entries)
        self._open(operation.id, operation.entries, so_far, operation.lease_ms, now_ms)
        return Done(now_ms, known=False)

    def _charge(self, operation: Charge, now_ms: int) -> Reply:
        if self._find(operation.id, now_ms) is not None:
            return Done(now_ms, known=False)
        self._take(operation.entries, now_ms, operation.times_ms)
        self._remember(operation.id, "settled", _COUNTED_MS, now_ms)
        return Done(now_ms, known=True)

    def _tell(self, operation: Tell, now_ms: int) -> Reply:
        if operation.at_ms < self._cut_ms or self._known_bill(operation.id, now_ms):
            return Done(now_ms, known=False)
        found = False
        for id_ in operation.of:
            record = self._find(id_, now_ms)
            if record is not None and record.unsettled:
                found = found or not record.billed
                self._release(record, now_ms)
                self._uncount(record, now_ms)
                billed = msgspec.structs.replace(record, billed=True)
                self._records[id_] = billed
                if billed.state == "open":
                    self._move(billed, 1, now_ms)
            elif record is not None and record.state == "settled" and record.mark == self._mark:
                return Done(now_ms, known=False)
        if not found and not operation.missing:
            return Done(now_ms, known=False)
        for number, entry in enumerate(operation.entries):
            if is_window(entry.rule):
                at_ms = operation.times_ms[number] if number < len(operation.times_ms) else operation.at_ms
                self._take_one(entry, entry.taken, now_ms, at_ms)
                self._correct(entry, -entry.taken, at_ms, now_ms)
        self._remember(operation.id, "settled", _COUNTED_MS, now_ms)
        return Done(now_ms, known=True)

    def _known_bill(self, id_: str, now_ms: int) -> bool:
        record = self._find(id_, now_ms)
        return record is not None and record.mark == self._mark

    def _telling(self, now_ms: int) -> bool:
        """Whether the ledger may yet tell bills that were told by others."""
        return self._lost and (not self.seeded or now_ms < self._telling_until_ms)

    def _seed(self, operation: Seed, now_ms: int) -> Reply:
        if self.seeded:
            return Done(now_ms, known=False)
        self.seeded, self._telling_until_ms = True, now_ms + _TELLING_MS
        self._take([entry for entry in operation.entries if is_window(entry.rule)], now_ms)
        return Done(now_ms, known=True)

    # -- accounts -----------------------------------------------------------------------------------------------------

    def _short(self, entries: tuple[Entry, ...], now_ms: int) -> tuple[Short, ...]:
        """Return the entries that do not fit, each together with those before it in the same account."""
        asked: dict[str, int] = {}
        short = []
        for index, entry in enumerate(entries):
            units = asked[entry.account] = asked.get(entry.account, 0) + entry.taken + entry.held
            found = room(self._accounts.get(entry.account, EMPTY), entry.rule, units, now_ms, index)
            if found is not None:
                short.append(found)
        return tuple(short)

    def _standings(self, entries: Sequence[Entry], now_ms: int) -> tuple[Standing, ...]:
        accounts = self._accounts
        return tuple([standing(accounts.get(entry.account, EMPTY), entry.rule, now_ms) for entry in entries])

    def _take(self, entries: Sequence[Entry], now_ms: int, times_ms: Sequence[int] = ()) -> None:
        for number, entry in enumerate(entries):
            self._take_one(entry, entry.taken, now_ms, times_ms[number] if number < len(times_ms) else None)

    def _take_one(self, entry: Entry, units: int, now_ms: int, at_ms: int | None = None) -> None:
        if units > 0:
            account = self._accounts.get(entry.account, EMPTY)
            self._put(entry.account, take(account, entry.rule, units, now_ms, at_ms), now_ms)

    def _correct(self, entry: Entry, units: int, since_ms: int, now_ms: int) -> None:
        if units > 0:
            account = self._accounts.get(entry.account, EMPTY)
            self._put(entry.account, correct(account, entry.rule, units, since_ms, now_ms), now_ms)

    def _count(self, record: _Record, amounts: Sequence[int], now_ms: int) -> None:
        """Count the difference between `amounts` and what was counted of each entry before, but for windows."""
        for entry, before, amount in zip(record.entries, record.counted, amounts, strict=True):
            if not is_window(entry.rule):
                self._take_one(entry, amount - before, now_ms)
                self._correct(entry, before - amount, record.since_ms, now_ms)

    def _uncount(self, record: _Record, now_ms: int) -> None:
        """Take back what windows counted when the lease ran out."""
        if record.state == "expired" and record.mark == self._mark and not record.billed:
            for entry, counted in zip(record.entries, record.counted, strict=True):
                if is_window(entry.rule):
                    self._correct(entry, counted, record.until_ms - _EXPIRED_MS, now_ms)

    def _put(self, name: str, account: Account, now_ms: int) -> None:
        if account.empty:
            self._accounts.pop(name, None)
            return
        self._accounts[name] = account
        if name not in self._checked:
            self._look_after(now_ms + _KEPT_MS, name)

    def _look_after(self, at_ms: int, name: str) -> None:
        self._checked.add(name)
        second = at_ms // 1000 + 1
        names = self._checks.get(second)
        if names is None:
            names = self._checks[second] = []
            heapq.heappush(self._check_seconds, second)
        names.append(name)

    # -- reservations -------------------------------------------------------------------------------------------------

    def _find(self, id_: str, now_ms: int) -> _Record | None:
        record = self._records.get(id_)
        return None if record is None or (record.state != "open" and record.until_ms <= now_ms) else record

    def _open(self, id_: str, entries: tuple[Entry, ...], so_far: tuple[int, ...], lease_ms: int, now_ms: int) -> None:
        """Enter a reservation, whatever the limits say."""
        self._take(entries, now_ms)
        if any(so_far):
            self._count(_Record("open", 0, entries, (0,) * len(entries)), so_far, now_ms)
        self._hold(id_, _Record("open", now_ms + max(1, lease_ms), entries, so_far, now_ms, self._mark), now_ms)

    def _hold(self, id_: str, record: _Record, now_ms: int) -> None:
        self._records[id_] = record
        heapq.heappush(self._leases, (record.until_ms, id_))
        if len(self._leases) > self._most_leases:
            self._drop_settled_leases()
        self._move(record, 1, now_ms)

    def _drop_settled_leases(self) -> None:
        """Drop leases whose reservations have ended: where leases are long, nearly all of them have."""
        self._leases = [(until_ms, id_) for until_ms, id_ in self._leases if self._is_open(id_, until_ms)]
        heapq.heapify(self._leases)
        self._most_leases = max(_FEW_LEASES, 2 * len(self._leases))

    def _is_open(self, id_: str, until_ms: int) -> bool:
        record = self._records.get(id_)
        return record is not None and record.state == "open" and record.until_ms == until_ms

    def _release(self, record: _Record, now_ms: int) -> None:
        if record.state == "open":
            self._move(record, -1, now_ms)

    def _move(self, record: _Record, sign: int, now_ms: int) -> None:
        for entry, counted in zip(record.entries, record.counted, strict=True):
            units = _remaining(entry.rule, entry.held, counted)
            if units and not (record.billed and is_window(entry.rule)):
                account = hold(self._accounts.get(entry.account, EMPTY), sign * units)
                self._put(entry.account, account, now_ms)

    def _remember(self, id_: str, state: Literal["settled", "cancelled"], for_ms: int, now_ms: int) -> None:
        self._records[id_] = _Record(state, now_ms + for_ms, mark=self._mark)
        self._note_end(id_, for_ms, now_ms)

    def _note_end(self, id_: str, for_ms: int, now_ms: int) -> None:
        self._memories.setdefault(for_ms, deque()).append((now_ms + for_ms + _KEPT_MS, id_))

    # -- sweeping -----------------------------------------------------------------------------------------------------

    def _expire(self, now_ms: int) -> None:
        """Settle reservations whose lease has run out at what was counted of them, the oldest first."""
        left = _MOST_AT_ONCE
        # Leases that were settled or renewed in time cost next to nothing, but after a pause there may be many.
        for _ in range(_MOST_SKIPPED):
            if not left or not self._leases or self._leases[0][0] > now_ms:
                break
            until_ms, id_ = heapq.heappop(self._leases)
            if not self._is_open(id_, until_ms):
                continue
            left -= 1
            record = self._records[id_]
            self._release(record, now_ms)
            if not record.billed:
                for entry, counted in zip(record.entries, record.counted, strict=True):
                    if is_window(entry.rule):
                        self._take_one(entry, counted, now_ms, now_ms)
            self._records[id_] = msgspec.structs.replace(
                record, state="expired", until_ms=now_ms + _EXPIRED_MS, mark=self._mark
            )
            self._note_end(id_, _EXPIRED_MS, now_ms)

    def _forget(self, now_ms: int) -> None:
        """Drop ids and accounts that no longer matter."""
        for memories in self._memories.values():
            for _ in range(_MOST_AT_ONCE):
                if not memories or memories[0][0] > now_ms:
                    break
                _, id_ = memories.popleft()
                record = self._records.get(id_)
                if record is not None and record.state != "open" and record.until_ms + _KEPT_MS <= now_ms:
                    del self._records[id_]
        for _ in range(_MOST_AT_ONCE):
            if not self._check_seconds or self._check_seconds[0] * 1000 > now_ms:
                break
            names = self._checks[self._check_seconds[0]]
            name = names.pop()
            if not names:
                del self._checks[heapq.heappop(self._check_seconds)]
            self._checked.discard(name)
            self._check(name, now_ms)

    def _check(self, name: str, now_ms: int) -> None:
        """Drop an account that has been idle for a while, or say when to look again."""
        account = self._accounts.get(name)
        if account is None:
            return
        idle_ms = idle_at_ms(account)
        next_ms = now_ms + _LOOK_AGAIN_MS if idle_ms is None else idle_ms + _KEPT_MS
        if next_ms <= now_ms:
            del self._accounts[name]
        else:
            self._look_after(next_ms, name)


def _padded(amounts: Sequence[int], entries: Sequence[Entry]) -> tuple[int, ...]:
    """Return an amount for each entry."""
    return tuple(amounts[: len(entries)]) + (0,) * (len(entries) - len(amounts))


def _remaining(rule: Rule, held: int, counted: int) -> int:
    """Return what of `held` is still reserved when `counted` of it has been used."""
    if not counted or isinstance(rule, Concurrency):
        return held
    return max(held, counted) if is_window(rule) else max(0, held - counted)
