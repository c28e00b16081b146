"""What has a request to fit in, and who says whether it does? The seam between admission and where limits are kept.

A limiter reserves, settles and cancels. It never raises for a fault of its store and never waits for one longer than it
was told: then the rule of the item decides (`when_down`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from gateway.local_books import LocalBooks
from policies.accounts import Entry, Standing, is_window
from policies.books import Charge, Granted, Refused, Tell
from policies.shares import share_of

WhenDown = Literal["open", "closed", "share"]
State = Literal["memory", "joining", "shared", "unseeded", "reconciling", "down"]


class Item(msgspec.Struct, frozen=True):
    """One line of an order, and what holds for it while the store cannot be asked."""

    entry: Entry
    when_down: WhenDown


class Order(msgspec.Struct, frozen=True):
    """What a request wants to reserve. `id` is its own, and never that of another."""

    id: str
    partition: str
    items: tuple[Item, ...]


class Unseeded(msgspec.Struct, frozen=True):
    """A partition whose store has lost what was spent, and waits to be told: under `epoch`, and by no other.

    Bills made before `cut_ms` are told as totals, later ones each by itself.
    """

    partition: str
    epoch: str
    cut_ms: int


Told = Charge | Tell


class Closed(msgspec.Struct, frozen=True):
    """Refused because the store cannot be asked and these items, by their index, are then closed."""

    indices: tuple[int, ...]


SoFar = Callable[[], tuple[int, ...]]
"""What an open reservation has used until now, one amount an item, on top of `taken`."""


class Limiter(Protocol):
    """Where limits are kept."""

    @property
    def state(self) -> State:
        """How the limits are kept now, for logs and metrics."""

    async def open(self) -> None:
        """Begin. Does not wait for a store that does not answer."""

    async def close(self) -> None:
        """Send what is still to be sent, within a bound, and end."""

    def subscribe(self, freed: Callable[[], None]) -> None:
        """Have `freed` called after something was given back by this process."""

    async def reserve(self, order: Order, so_far: SoFar) -> Granted | Refused | Closed:
        """Reserve all items or none. What is granted must be settled or cancelled."""

    def settle(self, order: Order, actual: tuple[int, ...], at_ms: int = 0) -> None:
        """Give back what is held and count what was used, on top of `taken`. Never waits; twice does no harm.

        `at_ms` is when the bill was made that says so, 0: now.
        """

    def cancel(self, order: Order) -> None:
        """Undo a reservation. Never waits; twice does no harm."""

    async def look(self, partition: str, items: tuple[Item, ...]) -> tuple[Standing, ...]:
        """Tell how the accounts of `items` stand, as well as that is known."""

    async def seed(self, partition: str, entries: tuple[Entry, ...]) -> bool:
        """Tell totals to a store that has lost its data; whether they counted, False where it could not be told."""

    async def tell(self, partition: str, operations: Sequence[Told], *, epoch: str = "") -> int | None:
        """Tell what was spent, whoever spent it; how many counted. None: not all of it could be told.

        With `epoch` only under that one. Telling it again does no harm.
        """

    async def end_seeding(self, partition: str, epoch: str) -> bool:
        """Say that all totals have been told; whether that was heard."""

    @property
    def unseeded(self) -> tuple[Unseeded, ...]:
        """The partitions in use here that wait for their totals."""


class Numbers(msgspec.Struct):
    """What has happened since the start, for metrics."""

    batches: int = 0
    operations: int = 0
    faults: int = 0
    went_down: int = 0
    came_back: int = 0
    granted_locally: int = 0
    refused_locally: int = 0
    closed: int = 0
    dropped: int = 0


class Clock:
    """Milliseconds since the epoch that never run backwards, whatever is done to the machine's clock meanwhile."""

    def __init__(self, read_s: Callable[[], float] = time.monotonic) -> None:
        self._read_s = read_s
        self._ahead_s = time.time() - read_s()

    def now_ms(self) -> int:
        """Return the time."""
        return int((self._read_s() + self._ahead_s) * 1000)


class MemoryLimiter:
    """Limits of this process alone. With several workers, worker `rank` of `count` gives out its share of each."""

    state: State = "memory"

    def __init__(self, *, rank: int = 0, count: int = 1, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._rank, self._count = rank, count
        self._books = LocalBooks(
            lambda entry: entry.rule if count == 1 else share_of(entry.rule, count=count, rank=rank)
        )
        self._freed: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Nothing is to be opened."""

    async def close(self) -> None:
        """Nothing is to be closed."""

    def subscribe(self, freed: Callable[[], None]) -> None:
        self._freed.append(freed)

    async def reserve(self, order: Order, so_far: SoFar) -> Granted | Refused | Closed:
        return self._books.reserve(order.id, entries_of(order.items), self._clock.now_ms())

    def settle(self, order: Order, actual: tuple[int, ...], at_ms: int = 0) -> None:
        self._books.settle(order.id, actual, self._clock.now_ms(), at_ms)
        self._tell()

    def cancel(self, order: Order) -> None:
        self._books.cancel(order.id, self._clock.now_ms())
        self._tell()

    def _tell(self) -> None:
        for freed in self._freed:
            freed()

    async def look(self, partition: str, items: tuple[Item, ...]) -> tuple[Standing, ...]:
        return self._books.look(entries_of(items), self._clock.now_ms())

    async def seed(self, partition: str, entries: tuple[Entry, ...]) -> bool:
        """Nothing of it counts: what is forgotten with the process is known to nobody else."""
        return False

    async def tell(self, partition: str, operations: Sequence[Told], *, epoch: str = "") -> int:
        """Count it here."""
        now_ms = self._clock.now_ms()
        return sum(self._books.tell(self._shared(operation), now_ms) for operation in operations)

    def _shared(self, operation: Told) -> Told:
        """Return the part of it that this worker bears, as it has its part of each limit."""
        count = self._count
        if count == 1:
            return operation
        entries = tuple(
            msgspec.structs.replace(entry, taken=entry.taken // count + (self._rank < entry.taken % count))
            for entry in operation.entries
        )
        return msgspec.structs.replace(operation, entries=entries)

    async def end_seeding(self, partition: str, epoch: str) -> bool:
        """Nothing is waited for here."""
        return True

    @property
    def unseeded(self) -> tuple[Unseeded, ...]:
        return ()


def bill_id(id_: str) -> str:
    """Return the name of the bill of an exchange, or of an attempt, whichever name it was reserved under."""
    return f"{id_.removesuffix('/counted')}#"


def bill_of(order: Order) -> str:
    """Return the name of its bill, where it has any part in windows."""
    return bill_id(order.id) if any(is_window(item.entry.rule) for item in order.items) else ""


def entries_of(items: tuple[Item, ...]) -> tuple[Entry, ...]:
    """Return what is to be reserved."""
    return tuple([item.entry for item in items])
