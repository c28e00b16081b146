"""What does an exchange meet when it turns to the ledger? The front of it in one process, on the event loop.

It gathers what is to be written, keeps account of the exchanges under way, and says from time to time that this
process lives. What blocks is the committer's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic as _monotonic
from time import time as _time
from typing import Literal

from gateway.ledger.committer import Committer, Write
from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.refusals import Refusals
from gateway.ledger.rows import AnyRow, Bill, DeliveryRow, InstanceRow
from gateway.ledger.snapshots import Snapshots

_log = logging.getLogger("tierway.ledger")

_TICK_S = 0.1
_DELIVERIES_S = 1.0
_REFUSALS_S = 10.0
_HEARTBEATS_PER_LEASE = 4

Labels = tuple[str, ...]


class Journal:
    """The `Ledger` of one process, which writes to `store`.

    `instance` names this very process, and no other before or after it. What cannot be written is kept in memory, up
    to `most_kept_rows`, and tried again. `patience_s` is how long a write may take before it counts as failed.
    """

    def __init__(
        self,
        store: Store,
        *,
        instance: str,
        when_unwritable: Literal["refuse", "serve"] = "refuse",
        lease_s: float = 30.0,
        commit_within_s: float = 0.005,
        patience_s: float = 5.0,
        most_kept_rows: int = 100_000,
        now: Callable[[], float] = _time,
        monotonic: Callable[[], float] = _monotonic,
    ) -> None:
        self.instance = instance
        self._refuse = when_unwritable == "refuse"
        self._heartbeat_s = lease_s / _HEARTBEATS_PER_LEASE
        self._now = now
        self._monotonic = monotonic
        self._snapshots = Snapshots(instance)
        self._refusals = Refusals(instance)
        self._deliveries: list[DeliveryRow] = []
        self._prices: set[str] = set()
        self._heard_ms = 0
        self._heartbeat_due_s = self._deliveries_due_s = self._refusals_due_s = 0.0
        self._writing = 0
        self._ticking: asyncio.Task[None] | None = None
        self._committer = Committer(
            store,
            serve=not self._refuse,
            gather_s=commit_within_s,
            patience_s=patience_s,
            most_kept_rows=most_kept_rows,
            company=lambda: len(self._snapshots) > self._writing,
            probe=lambda: Write([self._heartbeat()]),
            well_again=self._snapshots.say_again,
        )

    @property
    def accepting(self) -> bool:
        return not (self._refuse and self._committer.down)

    @property
    def unwritable(self) -> str | None:
        """Why rows cannot be written now; None where they can."""
        why = self._committer.why
        return None if why is None else str(why)

    async def open(self) -> None:
        """Begin. Where the store cannot be written, that is logged and tried again; `accepting` tells."""
        self._committer.open()
        with suppress(LedgerDown):
            await self.append([self._heartbeat()])
        self._ticking = asyncio.create_task(self._tick_on())

    async def close(self, within_s: float = 5.0) -> None:
        """Write all that is left, exchanges under way as they stand, and close the store."""
        if self._ticking is not None:
            self._ticking.cancel()
        for exchange_id, bill in self._snapshots.left():
            if bill is not None:
                self.write_later(bill)
            else:
                self._snapshots.forget(exchange_id)  # its row, if there is one, is for the next start
        self._tell_deliveries()
        self._tell_refusals()
        await self._committer.close(within_s)

    # -- what an exchange says ----------------------------------------------------------------------------------------

    def begin(self, exchange_id: str, so_far: Callable[[], Bill]) -> None:
        self._snapshots.begin(exchange_id, so_far, self._monotonic())

    async def write(self, bill: Bill) -> None:
        committer, exchange_id = self._committer, bill.exchange.exchange_id
        if not self._refuse and (committer.down or committer.stuck):
            self.write_later(bill)
            return
        if committer.stuck:
            raise committer.why or LedgerDown("The store of the ledger does not answer.")
        self._snapshots.end(exchange_id)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writing += 1
        try:
            committer.submit(self._bill(bill, future=future))
            await future
        except asyncio.CancelledError:
            self._snapshots.forget(exchange_id)  # it is written even so
            raise
        finally:
            self._writing -= 1
        if not committer.down:
            self._prices.update(price.version for price in bill.prices)
        self._snapshots.forget(exchange_id)

    def write_later(self, bill: Bill) -> None:
        write = self._bill(bill)
        self._snapshots.forget(bill.exchange.exchange_id)
        self._committer.submit(write)

    def forget(self, exchange_id: str) -> None:
        if self._snapshots.forget(exchange_id):
            self._committer.submit(Write((), [exchange_id], kept=True))

    def deliver(self, delivery: DeliveryRow) -> None:
        self._deliveries.append(delivery)

    def refuse(self, key: str, code: str) -> None:
        self._refusals.add(key, code, self._now())

    # -- what others say ----------------------------------------------------------------------------------------------

    async def append(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        """Return when these rows are durable, whatever they are. Raises `LedgerDown` where they may not be."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._committer.submit(Write(rows, closed, future=future, insisted=True))
        await future

    def numbers(self) -> Mapping[str, Mapping[Labels, float]]:
        """Return the numbers for the metrics."""
        numbers = self._committer.numbers
        return {
            "tierway_ledger_rows_total": {(): float(numbers.rows)},
            "tierway_ledger_commits_total": {(): float(numbers.commits)},
            "tierway_ledger_commit_seconds_total": {(): numbers.commit_s},
            "tierway_ledger_failures_total": {(): float(numbers.failures)},
            "tierway_ledger_dropped_total": {(): float(numbers.dropped)},
            "tierway_ledger_unwritable": {(): float(self._committer.down)},
            "tierway_ledger_waiting": {(): float(self._committer.waiting_rows + len(self._deliveries))},
        }

    # -- from time to time --------------------------------------------------------------------------------------------

    async def _tick_on(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.tick()
            except Exception:  # noqa: BLE001 - nothing that is told now and then may end the telling
                _log.exception("The ledger could not tell what it tells from time to time.")

    def tick(self) -> None:
        """Do what is due. Called ten times a second."""
        now_s = self._monotonic()
        self._committer.expire()
        rows: list[AnyRow] = [*self._snapshots.rows(now_s, int(self._now() * 1000))]
        if not self._committer.down:
            if now_s >= self._heartbeat_due_s:
                self._heartbeat_due_s = now_s + self._heartbeat_s
                rows.append(self._heartbeat())
            if rows:
                self._committer.submit(Write(rows))
        if now_s >= self._deliveries_due_s:
            self._deliveries_due_s = now_s + _DELIVERIES_S
            self._tell_deliveries()
        if now_s >= self._refusals_due_s:
            self._refusals_due_s = now_s + _REFUSALS_S
            self._tell_refusals()

    def _tell_deliveries(self) -> None:
        if self._deliveries:
            deliveries, self._deliveries = self._deliveries, []
            self._committer.submit(Write(deliveries, kept=True))

    def _tell_refusals(self) -> None:
        rows = self._refusals.rows()
        if rows:
            self._committer.submit(Write(rows, kept=True))

    def _heartbeat(self) -> InstanceRow:
        # Every one is another than the last, whatever the clock does: by that others know that this process lives.
        self._heard_ms = max(self._heard_ms + 1, int(self._now() * 1000))
        return InstanceRow(instance=self.instance, heard_ms=self._heard_ms)

    def _bill(self, bill: Bill, future: asyncio.Future[None] | None = None) -> Write:
        exchange_id = bill.exchange.exchange_id
        rows: list[AnyRow] = [one for one in bill.prices if one.version not in self._prices]
        rows.append(bill.exchange)
        rows += bill.attempts
        if bill.inputs is not None:
            rows.append(bill.inputs)
        closed = (exchange_id,) if self._snapshots.written(exchange_id) else ()
        return Write(rows, closed, future=future, kept=future is None)
