"""What does a replica let through without the store? By the rule of each item, and what was last seen of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gateway.limiter import Closed, Item, Order, entries_of
from gateway.local_books import LocalBooks
from gateway.reconcile import Held
from policies.accounts import Budget, Entry, Rolling, Rule, Standing
from policies.operations import Granted, Refused
from policies.shares import begun_with, share_of, still_used

_MOST_SEEN = 100_000


class Alone:
    """The decisions of one replica, `name`, in one partition while the store cannot be asked, or has forgotten."""

    def __init__(self, name: str, *, expected_replicas: int, least_replicas: int, now_ms: Callable[[], int]) -> None:
        self.replicas: tuple[str, ...] = ()
        self._name = name
        self._expected = expected_replicas
        self._least = least_replicas
        self._now_ms = now_ms
        self._seen: dict[str, tuple[int, int]] = {}
        self._books: LocalBooks | None = None

    # -- what is seen of the store ------------------------------------------------------------------------------------

    def note(self, items: tuple[Item, ...], standings: tuple[Standing, ...], now_ms: int) -> None:
        """Remember how full accounts are: what is shared without the store is what was left of them."""
        seen = self._seen
        for item, standing in zip(items, standings, strict=False):
            seen[item.entry.account] = (standing.used, now_ms)
        while len(seen) > _MOST_SEEN:
            del seen[next(iter(seen))]

    def note_used(self, items: tuple[Item, ...], actual: tuple[int, ...]) -> None:
        """Remember what this replica has told the store since."""
        for item, amount in zip(items, actual, strict=False):
            if amount and (last := self._seen.get(item.entry.account)) is not None:
                self._seen[item.entry.account] = (last[0] + amount, last[1])

    # -- decisions ----------------------------------------------------------------------------------------------------

    def begin(self, held: Iterable[Held]) -> LocalBooks:
        """Begin to decide, with what is `held` here already."""
        if self._books is None:
            self._books = LocalBooks(self._share, self._begun)
            for one in held:
                self._books.announce(one.id, entries_of(one.order.items), self._now_ms())
        return self._books

    def end(self) -> None:
        """Leave it to the store again."""
        self._books = None

    def verdict(self, id_: str, order: Order, *, sums_only: bool = False) -> Granted | Refused | Closed:
        """Decide on an order, or (`sums_only`) on what of it a store that lost its data cannot decide: its windows."""
        mine = [
            number
            for number, item in enumerate(order.items)
            if not item.entry.shadow and (not sums_only or isinstance(item.entry.rule, Budget | Rolling))
        ]
        closed = tuple(number for number in mine if order.items[number].when_down == "closed")
        if closed:
            return Closed(closed)
        shared = {number for number in mine if order.items[number].when_down == "share"}
        free = [number for number in range(len(order.items)) if number not in shared]
        return self.begin(()).reserve(id_, entries_of(order.items), self._now_ms(), free=free)

    def settle(self, id_: str, actual: Sequence[int]) -> None:
        """Give back what is held here, and count."""
        if self._books is not None:
            self._books.settle(id_, tuple(actual), self._now_ms())

    def cancel(self, id_: str) -> bool:
        """Undo what is held here; whether anything can be."""
        if self._books is None:
            return False
        self._books.cancel(id_, self._now_ms())
        return True

    def look(self, items: tuple[Item, ...]) -> tuple[Standing, ...]:
        """Tell how accounts stand here."""
        return self.begin(()).look(entries_of(items), self._now_ms())

    # -- shares -------------------------------------------------------------------------------------------------------

    def _share(self, entry: Entry) -> Rule | None:
        count, rank = self._rank()
        return share_of(entry.rule, count=count, rank=rank, used=self._still_used(entry))

    def _begun(self, entry: Entry) -> int:
        return begun_with(entry.rule, self._still_used(entry), count=self._rank()[0])

    def _still_used(self, entry: Entry) -> int:
        used, at_ms = self._seen.get(entry.account, (0, 0))
        return still_used(entry.rule, used, at_ms, self._now_ms()) if used else 0

    def _rank(self) -> tuple[int, int | None]:
        """Return how many replicas there are and which this one is, by what was last seen."""
        replicas = self.replicas
        if self._name in replicas and len(replicas) >= self._least:
            return len(replicas), replicas.index(self._name)
        if replicas:
            return max(self._least, len(replicas) + (self._name not in replicas)), None
        return max(self._least, self._expected), None
