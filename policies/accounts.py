"""How full is one account? What a limit counts, as an account with a rule: the arithmetic of a single one.

An account has a *used* amount, settled and certain, and a *reserved* one: the sum of what open reservations hold.
Used amounts drain (`Rate`), fall away with their window (`Budget`, `Rolling`) or never were (`Concurrency`). What is
reserved drains never: it is settled, given back or runs out with its lease. An amount fits where used, reserved and
asked together stay within the limit, so what was let through never passes it; nothing (0) always fits.

A clock that goes back gives nothing back: what was used keeps its later time, and drains again once that has passed.
The limit and the burst of a rule may change from one moment to the next (what had drained by the old ones has
drained); under another kind of rule or another period an account begins with nothing used.

Everything is an integer below 2**53, and time is in whole milliseconds since the epoch: the same operations on the
doubles of Redis' Lua (`gateway/limits.lua`) give the same results to the last bit, and a property test holds both to
that. Amounts are requests, tokens or nano-dollars; an account does not know which.
"""

from __future__ import annotations

import msgspec

SLOTS = 60
"""A rolling window is counted in this many slots; one is dropped when all of it is older than the window."""

LARGEST_RATE = 1_000_000_000
"""Most units of a `Rate`, so that units times the milliseconds of an hour stay below 2**53."""

LARGEST_SUM = 9_000_000_000_000_000
"""Most units of the other rules: 9 million dollars in nano-dollars. Used amounts are counted up to here."""


class Rate(msgspec.Struct, frozen=True, array_like=True, tag="rate"):
    """A leaking bucket (GCRA): `limit` units drain in `period_ms`, at most `burst` are in it.

    In any span of `t` ms at most `burst + limit * t / period_ms` units pass. Periods longer than an hour are counted
    in whole seconds. The level is kept in units times ticks, so it is exact.
    """

    limit: int
    period_ms: int
    burst: int

    @property
    def tick_ms(self) -> int:
        """The grain of its clock."""
        return 1 if self.period_ms <= 3_600_000 else 1000

    @property
    def period_ticks(self) -> int:
        """Its period by that clock."""
        return self.period_ms // self.tick_ms


class Budget(msgspec.Struct, frozen=True, array_like=True, tag="budget"):
    """A sum that begins anew with each calendar window, or never.

    `starts_ms` are the beginnings of the windows around now, ascending (the store picks by its own clock: the last one
    that is not after now); without any, the sum is for ever. The last one must lie far enough ahead. Before the first
    one it is taken for begun. An account never goes back to an earlier window.
    """

    limit: int
    starts_ms: tuple[int, ...] = ()


class Rolling(msgspec.Struct, frozen=True, array_like=True, tag="rolling"):
    """A sum over the last `period_ms`, in slots of a `SLOTS`th of it: up to one slot longer, never shorter."""

    limit: int
    period_ms: int

    @property
    def slot_ms(self) -> int:
        """The length of a slot, rounded up."""
        return -(-self.period_ms // SLOTS)


class Concurrency(msgspec.Struct, frozen=True, array_like=True, tag="concurrency"):
    """Nothing but what is open."""

    limit: int


Rule = Rate | Budget | Rolling | Concurrency


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One line of a reservation: `taken` is counted as used at once, `held` is reserved until it is settled.

    A `shadow` entry is counted like any other and refuses nothing.
    """

    account: str
    rule: Rule
    taken: int = 0
    held: int = 0
    shadow: bool = False


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """How an account stands. `reset_ms`: until nothing of it is used any more; -1: never by itself.

    For a `Rate` `used` is rounded up; its reset is when the bucket is empty, a `Budget`'s the end of its window (used
    or not), a `Rolling`'s when the slot used last has fallen out.
    """

    used: int
    reserved: int
    reset_ms: int


class Short(msgspec.Struct, frozen=True, array_like=True):
    """An entry that did not fit, by its index.

    `why` is "never" where it is more than the limit itself, "used" where used amounts alone leave no room, "reserved"
    where it would fit if open reservations came to nothing. `wait_ms` is the time after which it fits if nothing else
    happens and everything reserved stays; -1: not by waiting, or unknown (`Concurrency`). A `Rate` says when it would
    fit if all that is reserved was used now.
    """

    index: int
    why: str
    wait_ms: int


class Account(msgspec.Struct, frozen=True, gc=False):
    """The state of one account. One without anything used or reserved is as good as none.

    `used` and `at` are those of the time when something was last counted, in the terms of `rule`, the one it was
    counted by: units times ticks and a tick (`Rate`), units and the start of a window (`Budget`). A `Rolling` has
    `slots` instead: number and units of each that has any, oldest first.
    """

    reserved: int = 0
    used: int = 0
    at: int = 0
    slots: tuple[tuple[int, int], ...] = ()
    rule: Rule | None = None

    @property
    def empty(self) -> bool:
        """Whether it can be forgotten."""
        return not (self.reserved or self.used or self.slots)


EMPTY = Account()


def room(account: Account, rule: Rule, asked: int, now_ms: int, index: int) -> Short | None:
    """Return why `asked` units do not fit, as entry `index`; None: they do."""
    if asked <= 0:
        return None
    if isinstance(rule, Rate):
        return _room_of_rate(account, rule, asked, now_ms, index)
    if asked > rule.limit:
        return Short(index, "never", -1)
    used, at = _used(account, rule, now_ms)
    excess = used + account.reserved + asked - rule.limit
    if excess <= 0:
        return None
    why = "used" if used + asked > rule.limit else "reserved"
    end_ms = None
    # Where reserved amounts alone are in the way, no window that ends helps.
    if excess <= used:
        if isinstance(rule, Budget):
            end_ms = _next_start(rule, at)
        elif isinstance(rule, Rolling):
            end_ms = _fallen_out_ms(account, rule, excess, now_ms)
    return Short(index, why, -1 if end_ms is None else end_ms - now_ms)


def is_window(rule: Rule) -> bool:
    """Whether it is a sum over a window of time, and so one that bills add up to."""
    return isinstance(rule, Budget | Rolling)


def take(account: Account, rule: Rule, units: int, now_ms: int, at_ms: int | None = None) -> Account:
    """Count `units` as used now, or in a window as used at `at_ms`: nowhere, where that is no longer in it."""
    if units <= 0 or isinstance(rule, Concurrency):
        return account
    if isinstance(rule, Rolling):
        return _take_rolling(account, rule, units, now_ms, at_ms)
    used, at = _used(account, rule, now_ms)
    if at_ms is not None and isinstance(rule, Budget) and at_ms < at:
        return account
    grain = rule.period_ticks if isinstance(rule, Rate) else 1
    return Account(account.reserved, min(LARGEST_SUM, used + units * grain), at, rule=rule)


def _take_rolling(account: Account, rule: Rolling, units: int, now_ms: int, at_ms: int | None) -> Account:
    slots = _live(account, rule, now_ms)
    if at_ms is None:
        slot = max(now_ms // rule.slot_ms, slots[-1][0] if slots else 0)
    else:
        slot = min(at_ms, now_ms) // rule.slot_ms
        if slot < now_ms // rule.slot_ms - SLOTS:
            return account
    place = len(slots)
    while place and slots[place - 1][0] > slot:
        place -= 1
    if place and slots[place - 1][0] == slot:
        place -= 1
        units += slots.pop(place)[1]
    slots.insert(place, (slot, min(LARGEST_SUM, units)))
    return Account(account.reserved, slots=tuple(slots), rule=rule)


def correct(account: Account, rule: Rule, units: int, since_ms: int, now_ms: int) -> Account:
    """Take back `units` that were counted at `since_ms`, as far as they are still there and never more.

    What may have drained since (`Rate`) has drained; what was counted in an earlier window (`Budget`) or slot
    (`Rolling`) is taken from there or, where that is gone, from nowhere.
    """
    if units <= 0 or isinstance(rule, Concurrency):
        return account
    if isinstance(rule, Rolling):
        slot = since_ms // rule.slot_ms
        left = [(i, amount - units if i == slot else amount) for i, amount in _live(account, rule, now_ms)]
        kept = tuple((i, amount) for i, amount in left if amount > 0)
        return Account(account.reserved, slots=kept, rule=rule) if left else account
    used, at = _used(account, rule, now_ms)
    if isinstance(rule, Rate):
        drained = max(0, now_ms // rule.tick_ms - since_ms // rule.tick_ms) * rule.limit
        units = min(LARGEST_SUM, units * rule.period_ticks) - min(LARGEST_SUM, drained)
    elif at > since_ms:
        return account
    if used == 0 or units <= 0:
        return account
    return Account(account.reserved, max(0, used - units), at, rule=rule)


def hold(account: Account, units: int) -> Account:
    """Reserve `units`; negative: give them back."""
    return Account(account.reserved + units, account.used, account.at, account.slots, account.rule)


def standing(account: Account, rule: Rule, now_ms: int) -> Standing:
    """Tell how `account` stands under `rule`."""
    used, at = _used(account, rule, now_ms)
    end_ms: int | None = now_ms
    if isinstance(rule, Rate):
        end_ms = _drained_ms(rule, used, at) if used else now_ms
        used = -(-used // rule.period_ticks)
    elif isinstance(rule, Budget):
        end_ms = _next_start(rule, at)
    elif isinstance(rule, Rolling) and used:
        end_ms = (_live(account, rule, now_ms)[-1][0] + SLOTS + 1) * rule.slot_ms
    return Standing(used, account.reserved, -1 if end_ms is None else end_ms - now_ms)


def idle_at_ms(account: Account) -> int | None:
    """Return when nothing of `account` is used any more; None: not by waiting, or something is reserved."""
    if account.reserved or account.rule is None:
        return None
    if isinstance(account.rule, Rate):
        return _drained_ms(account.rule, account.used, account.at)
    if isinstance(account.rule, Budget):
        return _next_start(account.rule, account.at)
    if isinstance(account.rule, Rolling) and account.slots:
        return (account.slots[-1][0] + SLOTS + 1) * account.rule.slot_ms
    return 0


def _room_of_rate(account: Account, rule: Rate, asked: int, now_ms: int, index: int) -> Short | None:
    if asked > rule.burst:
        return Short(index, "never", -1)
    level, at = _used(account, rule, now_ms)
    used_excess = level + (asked - rule.burst) * rule.period_ticks
    excess = used_excess + account.reserved * rule.period_ticks
    if excess <= 0:
        return None
    end_ms = _drained_ms(rule, excess, at)
    return Short(index, "used" if used_excess > 0 else "reserved", -1 if end_ms is None else end_ms - now_ms)


def _used(account: Account, rule: Rule, now_ms: int) -> tuple[int, int]:
    """Return what of `account` is used now in the terms of `rule`, and the tick or window that is counted in.

    An account of which nothing is used has no time of its own, so it makes no difference whether it was forgotten.
    """
    if isinstance(rule, Concurrency):
        return 0, 0
    used = account.used if account.used and _same_terms(account.rule, rule) else 0
    if isinstance(rule, Rate):
        tick = now_ms // rule.tick_ms
        if used and tick > account.at:
            used = max(0, used - (tick - account.at) * rule.limit)
        return used, max(tick, account.at) if used else tick
    if isinstance(rule, Budget):
        begun = [start for start in rule.starts_ms if start <= now_ms] or rule.starts_ms[:1]
        window = begun[-1] if begun else 0
        return (used, account.at) if used and window <= account.at else (0, window)
    return min(LARGEST_SUM, sum(amount for _, amount in _live(account, rule, now_ms))), 0


def _same_terms(before: Rule | None, rule: Rule) -> bool:
    if before is rule:
        return True
    if isinstance(rule, Rate):
        return isinstance(before, Rate) and before.period_ms == rule.period_ms
    if isinstance(rule, Rolling):
        return isinstance(before, Rolling) and before.period_ms == rule.period_ms
    return isinstance(before, Budget)


def _live(account: Account, rule: Rolling, now_ms: int) -> list[tuple[int, int]]:
    """Return the slots that count now."""
    if not _same_terms(account.rule, rule):
        return []
    oldest = now_ms // rule.slot_ms - SLOTS
    return [slot for slot in account.slots if slot[0] >= oldest]


def _drained_ms(rule: Rate, level: int, at: int) -> int | None:
    """Return the first millisecond at which `level` has drained."""
    return (at - (-level // rule.limit)) * rule.tick_ms if rule.limit > 0 else None


def _next_start(rule: Budget, window: int) -> int | None:
    return next((start for start in rule.starts_ms if start > window), None)


def _fallen_out_ms(account: Account, rule: Rolling, units: int, now_ms: int) -> int | None:
    """Return when slots with `units` together have fallen out."""
    for slot, amount in _live(account, rule, now_ms):
        units -= amount
        if units <= 0:
            return (slot + SLOTS + 1) * rule.slot_ms
    return None
