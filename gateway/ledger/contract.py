"""Between an exchange and its bill: what is asked of the ledger, and what it asks of whatever keeps its rows.

An exchange meets a `Ledger`: it says when it begins, and waits for its bill to be durable before its last byte leaves.
Behind it a `Store` keeps rows; it is told what to write by one thread alone, and asked what is written by others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from gateway.ledger.rows import AnyRow, Bill, DeliveryRow

Value = int | float | str | bytes | None


class LedgerDown(Exception):  # noqa: N818 - a state, not a mistake
    """What was to be written is not durable, and may be in part or not at all. The message is for the operator."""


class BadRows(LedgerDown):
    """Nothing was written, because of the rows: a number too large, a text that is none. The store is well."""


class Ledger(Protocol):
    """The front, on the event loop."""

    @property
    def accepting(self) -> bool:
        """Whether new work may be taken on. False while bills cannot be written and the operator wants to refuse."""
        ...

    def begin(self, exchange_id: str, so_far: Callable[[], Bill]) -> None:
        """Note that an exchange is under way. `so_far` makes the bill that is due if its process dies now.

        Never waits. It ends with `write`, `write_later` or `forget`.
        """
        ...

    async def write(self, bill: Bill) -> None:
        """Return when the bill is durable. Raises `LedgerDown` where it cannot be and the operator wants to refuse."""
        ...

    def write_later(self, bill: Bill) -> None:
        """Write when it can be; never waits. For what nobody waits for any more."""
        ...

    def forget(self, exchange_id: str) -> None:
        """Forget an exchange that began: nobody was asked for it."""
        ...

    def deliver(self, delivery: DeliveryRow) -> None:
        """Note how an answer reached its client; never waits."""
        ...

    def refuse(self, key: str, code: str) -> None:
        """Count a refused request; never waits. `key` is empty where nobody was recognised."""
        ...


class Reading(Protocol):
    """Rows as they were at one moment."""

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Iterator[tuple[Value, ...]]:
        """Run a query. Its text is both databases' dialect, with `?` for each value. Blocks."""
        ...


class Store(Protocol):
    """Where rows are kept. Everything here blocks, and belongs in a thread."""

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        """Write rows in one transaction, durable on return, and forget the open exchanges whose ids are `closed`.

        Raises `LedgerDown`; `BadRows` where other rows could be written. From one thread.
        """
        ...

    def reading(self) -> AbstractContextManager[Reading]:
        """Open a connection of its own to read through; raises `LedgerDown`. From any thread."""
        ...

    def close(self) -> None:
        """Close the connection of the thread that writes."""
        ...
