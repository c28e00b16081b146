"""Which stores fail when a test wants them to? Stand-ins for a disk or a database that is not well."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gateway.ledger.contract import BadRows, LedgerDown, Reading
from gateway.ledger.rows import AnyRow, Bill, ExchangeRow


class Scripted:
    """A store in memory: it can be down, hang, or not bear certain rows."""

    def __init__(self) -> None:
        self.down = False
        self.spoils: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[tuple[list[AnyRow], list[str]]] = []
        self.tries = 0
        self.closed = False

    @property
    def rows(self) -> list[AnyRow]:
        return [row for rows, _ in self.batches for row in rows]

    @property
    def billed(self) -> list[str]:
        return [row.exchange_id for row in self.rows if isinstance(row, ExchangeRow)]

    @property
    def closings(self) -> list[str]:
        return [one for _, closed in self.batches for one in closed]

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        self.tries += 1
        self.entered.release()
        assert self.gate.wait(20)
        if self.down:
            raise LedgerDown("the disk is full")
        if any(isinstance(row, ExchangeRow) and row.exchange_id == self.spoils for row in rows):
            raise BadRows("one of them is bad")
        self.batches.append((list(rows), list(closed)))

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        raise NotImplementedError
        yield

    def close(self) -> None:
        self.closed = True


class Clock:
    """A clock that goes as it is told."""

    def __init__(self, at_s: float = 1000.0) -> None:
        self.at_s = at_s

    def __call__(self) -> float:
        return self.at_s


class Told:
    """What an exchange would say of itself; how often it was asked."""

    def __init__(self, bill: Bill) -> None:
        self.bill = bill
        self.asked = 0

    def __call__(self) -> Bill:
        self.asked += 1
        return self.bill


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)
