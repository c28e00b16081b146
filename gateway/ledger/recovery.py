"""Who bills what dead processes left open? Every living one looks, and who claims an exchange first closes it.

An exchange is claimed by writing its open row as one's own, with a later stamp: of several who try one is seen there
afterwards. Should that one die too, the exchange is again an open one of a dead process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import time

import msgspec
from msgspec import structs

from gateway.ledger.alive import Alive
from gateway.ledger.contract import LedgerDown, Store, Value
from gateway.ledger.journal import Journal
from gateway.ledger.rows import AnyRow, Bill, OpenRow

_log = logging.getLogger("tierway.ledger")

_AT_ONCE = 200
_AT_START_S = 2.0

_INSTANCES = (
    "SELECT o.instance, MAX(i.heard_ms) FROM open_exchanges o LEFT JOIN instances i ON i.instance = o.instance "
    "WHERE o.instance <> ? GROUP BY o.instance"
)
_OPEN = "SELECT exchange_id, instance, seen_ms, bill FROM open_exchanges WHERE instance = ? ORDER BY exchange_id"
_CLAIMED = (
    "SELECT o.exchange_id, o.instance, o.seen_ms, o.bill, e.exchange_id FROM open_exchanges o "
    "LEFT JOIN exchanges e ON e.exchange_id = o.exchange_id WHERE o.exchange_id = ? AND o.instance = ?"
)

_decode_bill = msgspec.json.Decoder(Bill).decode


class Recovery:
    """Closes what others left open: once at the start, and then twice a lease.

    `on_lost` is told of every bill that this process, and no other, has written for a dead one. `ready` says whether
    all rows of this process are where they are read: a claim that waits in a spool is not seen, and nothing is
    finished before it is.
    """

    def __init__(
        self,
        journal: Journal,
        store: Store,
        alive: Alive,
        *,
        lease_s: float,
        on_lost: Callable[[Bill], None],
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._journal = journal
        self._store = store
        self._alive = alive
        self._pause_s = lease_s / 2
        self._on_lost = on_lost
        self._ready = ready
        self._unreadable: set[str] = set()
        self._unfinished: set[str] = set()
        self._untold: dict[str, Bill] = {}
        self._looked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin, before the first exchange. What is wrong is logged and tried again.

        The first look is waited for, but not for a database that does not answer: requests can be served without.
        """
        await asyncio.to_thread(self._alive.open)
        self._task = asyncio.create_task(self._go_on())
        with suppress(TimeoutError):
            async with asyncio.timeout(_AT_START_S):
                await self._looked.wait()

    async def close(self) -> None:
        """End, after the journal is closed."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._alive.close)

    async def once(self) -> int:
        """Close what is to be closed now; return how many exchanges were lost. Raises `LedgerDown`."""
        if not self._ready():
            return 0
        for found in await asyncio.to_thread(self._find):
            await self._claim([one for one in found if self._bill(one) is not None])
        lost = 0
        for start in range(0, len(ids := sorted(self._unfinished)), _AT_ONCE):
            if not self._ready():
                break
            lost += await self._finish(ids[start : start + _AT_ONCE])
        if lost:
            _log.warning("%d exchanges of processes that died were billed at what was last known of them.", lost)
        return lost

    async def _go_on(self) -> None:
        while True:
            await self._try_once()
            self._looked.set()
            await asyncio.sleep(self._pause_s)

    async def _try_once(self) -> None:
        try:
            await self.once()
        except LedgerDown as error:
            _log.warning("What dead processes left open is not billed yet: %s", error)
        except Exception:  # noqa: BLE001 - it is tried again, and nobody else would hear of it
            _log.exception("What dead processes left open could not be billed.")

    async def _claim(self, found: Sequence[OpenRow]) -> None:
        claims = [structs.replace(one, instance=self._journal.instance, seen_ms=one.seen_ms + 1) for one in found]
        # Also what may have been claimed is looked for, now or later.
        self._unfinished.update(one.exchange_id for one in claims)
        await self._journal.append(claims)

    async def _finish(self, ids: Sequence[str]) -> int:
        rows: list[AnyRow] = []
        closed: list[str] = []
        for one, billed in await asyncio.to_thread(self._claimed, ids):
            bill = self._bill(one)
            if bill is None:
                continue
            closed.append(one.exchange_id)
            if not billed:
                # Limits count a bill from when it was made, and this one is made now.
                made = structs.replace(bill.exchange, settled_ms=int(time() * 1000))
                bill = self._untold[one.exchange_id] = structs.replace(bill, exchange=made)
                rows += [*bill.prices, bill.exchange, *bill.attempts]
                if bill.inputs is not None:
                    rows.append(bill.inputs)
        await self._journal.append(rows, closed)
        self._unfinished.difference_update(ids)
        lost = [self._untold.pop(one) for one in ids if one in self._untold]
        for bill in lost:
            self._on_lost(bill)
        return len(lost)

    def _bill(self, row: OpenRow) -> Bill | None:
        try:
            return _decode_bill(row.bill)
        except (msgspec.DecodeError, UnicodeError) as error:
            if row.exchange_id not in self._unreadable:
                self._unreadable.add(row.exchange_id)
                _log.error("The open exchange %s cannot be read, and stays open: %s", row.exchange_id, error)
            return None

    # -- in a thread --------------------------------------------------------------------------------------------------

    def _find(self) -> list[Sequence[OpenRow]]:
        """Return what the dead left open, in parts."""
        with self._store.reading() as reading:
            heard = {str(name): _number(at) for name, at in reading.rows(_INSTANCES, (self._journal.instance,))}
            dead = sorted(self._alive.dead(heard))
            rows = [_open_row(row) for name in dead for row in reading.rows(_OPEN, (name,))]
        return [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]

    def _claimed(self, ids: Sequence[str]) -> list[tuple[OpenRow, bool]]:
        """Return those of these that are this process's now, and whether each was billed meanwhile."""
        found: list[tuple[OpenRow, bool]] = []
        with self._store.reading() as reading:
            for one in ids:
                for *row, billed in reading.rows(_CLAIMED, (one, self._journal.instance)):
                    found.append((_open_row(row), billed is not None))
        return found


def _open_row(row: Sequence[Value]) -> OpenRow:
    return msgspec.convert(dict(zip(OpenRow.__struct_fields__, row, strict=True)), OpenRow)


def _number(value: Value) -> int | None:
    return value if isinstance(value, int) else None
