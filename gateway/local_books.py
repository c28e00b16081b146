"""What does this process let through by itself, and what has it let through? Books that are shared with nobody."""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from policies.accounts import Entry, Rule, Short, Standing
from policies.books import Announce, Books, Cancel, Charge, Done, Granted, Look, Refused, Reserve, Settle, Tell

# What is reserved here is held as long as the process lives, which is as long as anybody knows of it.
_FOR_EVER_MS = 366 * 86_400_000

ShareOf = Callable[[Entry], Rule | None]
"""The rule that holds here in place of an entry's own; None where nothing passes."""


class LocalBooks:
    """Reservations by the rules that `share` gives. Entries named as `free` are counted and refuse nothing.

    `begun` says how much of its share an account has used already when it is met for the first time.
    """

    def __init__(self, share: ShareOf, begun: Callable[[Entry], int] | None = None) -> None:
        self._share = share
        self._begun = begun
        self._met: set[str] = set()
        self._books = Books()

    def reserve(
        self, id_: str, entries: tuple[Entry, ...], now_ms: int, *, free: Collection[int] = ()
    ) -> Granted | Refused:
        """Reserve all or nothing."""
        self._meet(entries, now_ms)
        rules = [self._share(entry) for entry in entries]
        never = tuple(
            Short(number, "never", -1)
            for number, (entry, rule) in enumerate(zip(entries, rules, strict=True))
            if rule is None and number not in free and not entry.shadow and entry.taken + entry.held > 0
        )
        mine = tuple(
            _mine(entry, rule, free=number in free)
            for number, (entry, rule) in enumerate(zip(entries, rules, strict=True))
        )
        if never:
            return Refused(now_ms, self.look(mine, now_ms), never)
        reply = self._books.apply(Reserve(id_, mine, _FOR_EVER_MS), now_ms)
        if not isinstance(reply, Granted | Refused):
            raise TypeError(f"a reservation was answered with {type(reply).__name__}")
        return _without(reply, frozenset(free), entries) if free and reply.short else reply

    def _meet(self, entries: tuple[Entry, ...], now_ms: int) -> None:
        if self._begun is None:
            return
        for entry in entries:
            if entry.account in self._met:
                continue
            self._met.add(entry.account)
            rule, used = self._share(entry), self._begun(entry)
            if used and rule is not None:
                self._books.apply(Charge(f"begun {len(self._met)}", (Entry(entry.account, rule, used),)), now_ms)

    def announce(self, id_: str, entries: tuple[Entry, ...], now_ms: int) -> None:
        """Enter what is held of a reservation that was granted elsewhere. What it took is counted there."""
        self._meet(entries, now_ms)
        mine = tuple(
            Entry(entry.account, self._share(entry) or entry.rule, 0, entry.held, shadow=True) for entry in entries
        )
        self._books.apply(Announce(id_, mine, (0,) * len(mine), _FOR_EVER_MS), now_ms)

    def settle(self, id_: str, actual: tuple[int, ...], now_ms: int, at_ms: int = 0) -> None:
        """Give back what is held and count what was used, in windows at `at_ms` (0: now)."""
        self._books.apply(Settle(id_, actual, at_ms=at_ms), now_ms)

    def tell(self, operation: Charge | Tell, now_ms: int) -> bool:
        """Count what was spent elsewhere, by the rules that hold here; whether it counted."""
        entries = tuple(_mine(entry, self._share(entry), free=True) for entry in operation.entries)
        reply = self._books.apply(msgspec.structs.replace(operation, entries=entries), now_ms)
        return isinstance(reply, Done) and reply.known

    def cancel(self, id_: str, now_ms: int) -> None:
        """Undo a reservation."""
        self._books.apply(Cancel(id_), now_ms)

    def look(self, entries: tuple[Entry, ...], now_ms: int) -> tuple[Standing, ...]:
        """Tell how accounts stand here."""
        mine = tuple(_mine(entry, self._share(entry), free=True) for entry in entries)
        reply = self._books.apply(Look(mine), now_ms)
        return reply.standings if isinstance(reply, Done) else ()


def _without(reply: Granted | Refused, free: frozenset[int], entries: tuple[Entry, ...]) -> Granted | Refused:
    """Leave out what was only counted."""
    short = tuple(one for one in reply.short if one.index not in free or entries[one.index].shadow)
    return msgspec.structs.replace(reply, short=short)


def _mine(entry: Entry, rule: Rule | None, *, free: bool) -> Entry:
    if rule is None or (free and not entry.shadow):
        # What has no share here is still counted, by its own rule.
        return Entry(entry.account, rule or entry.rule, entry.taken, entry.held, shadow=True)
    return entry if rule is entry.rule else Entry(entry.account, rule, entry.taken, entry.held, entry.shadow)
