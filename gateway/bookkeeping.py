"""Who keeps the books of a process? The ledger of the configuration and all that works on it, begun and ended in order.

What blocks, and is not the writing of bills, has a store of its own: one store is used by one thread.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from backends.backend import Counting
from gateway.admission import Admission, Watching
from gateway.alerts import Alerts, alerts_of
from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.secrets import Secret
from gateway.fleet import Member
from gateway.ledger.alive import Alive, Heartbeats, HeldFiles
from gateway.ledger.closing import Closer, ClosingSettings, Leading
from gateway.ledger.contract import Ledger, LedgerDown, Store
from gateway.ledger.journal import Journal
from gateway.ledger.meters import Meters
from gateway.ledger.none import NoLedger
from gateway.ledger.opening import open_store
from gateway.ledger.pruning import Pruner
from gateway.ledger.recovery import Recovery
from gateway.ledger.rows import AdjustmentRow, AnyRow, Bill
from gateway.ledger.spool import SpooledStore
from gateway.ledger.sqlite import SqliteStore
from gateway.ledger.trailing import Trailing
from gateway.limiter import Limiter
from gateway.metrics import Labels, Metrics
from gateway.pricing import Pricing
from gateway.reseeding import Reseeder

if TYPE_CHECKING:
    from gateway.ledger.postgres import PostgresStore

_LOOK_EVERY_S = 1.0
_LATE_S = 60.0

_log = logging.getLogger("tierway.ledger")


def bookkeeping_of(
    loaded: Loaded,
    secret_of: Mapping[noun.SecretRef, Secret],
    *,
    worker: int,
    workers: int,
    pricing: Pricing,
    metrics: Metrics,
) -> Bookkeeping:
    """Return what a process keeps.

    Raises `ConfigError` for a secret that is none, `LedgerDown` where there is no file for a spool.
    """
    instance = secrets.token_hex(8)
    kept = not isinstance(loaded.config.ledger.store, noun.NoLedger)
    alerts = alerts_of(
        loaded, secret_of, instance=instance, store=open_store(loaded) if kept else None, watches=worker == 0
    )
    metrics.include(alerts.numbers)
    books = _Books(loaded, instance, worker=worker, workers=workers, pricing=pricing, alerts=alerts) if kept else None
    if books is not None:
        metrics.include(books.numbers)
    return Bookkeeping(instance, alerts, books)


class Bookkeeping:
    """The ledger of one process. Without `_books` nothing is kept, and there are alerts of budgets alone."""

    def __init__(self, instance: str, alerts: Alerts, books: _Books | None) -> None:
        self.instance = instance
        self._alerts = alerts
        self._books = books

    @property
    def ledger(self) -> Ledger:
        """What exchanges meet."""
        return NoLedger() if self._books is None else self._books.journal

    @property
    def watching(self) -> Watching:
        """What admission tells of budgets."""
        return self._alerts.watching

    async def open(self, limiter: Limiter, admission: Admission, members: Mapping[str, Member]) -> None:
        """Begin, after the limiter and before the first request."""
        if self._books is not None:
            await self._books.open(limiter, admission, members)
        await self._alerts.open()

    async def close(self) -> None:
        """End, with all that is left written; before the limiter."""
        if self._books is not None:
            await self._books.close(self._alerts.close)
        else:
            await self._alerts.close()


class _Books:
    def __init__(
        self, loaded: Loaded, instance: str, *, worker: int, workers: int, pricing: Pricing, alerts: Alerts
    ) -> None:
        self._loaded = loaded
        self._settings = loaded.config.ledger
        self._instance = instance
        self._first = worker == 0
        self._pricing = pricing
        self._alerts = alerts
        self._spool: SpooledStore | None = None
        store = self._store(alone=workers == 1)
        self.journal = Journal(
            store,
            instance=instance,
            when_unwritable=self._settings.when_unwritable,
            lease_s=self._settings.lease,
            commit_within_s=self._settings.commit_within,
        )
        self._recovery = Recovery(
            self.journal,
            self._reader(),
            self._alive(),
            lease_s=self._settings.lease,
            on_lost=self._lost,
            ready=self._all_there,
        )
        self._reseeder: Reseeder | None = None
        self._closer: Closer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._lost_exchanges = 0

    def numbers(self) -> Mapping[str, Mapping[Labels, float]]:
        """Return the numbers for the metrics."""
        numbers: dict[str, Mapping[Labels, float]] = dict(self.journal.numbers())
        numbers["tierway_ledger_lost_total"] = {(): float(self._lost_exchanges)}
        if self._spool is not None:
            numbers["tierway_ledger_spooled_rows"] = {(): float(self._spool.spooled_rows)}
            numbers["tierway_ledger_set_aside_rows"] = {(): float(self._spool.set_aside_rows)}
            numbers["tierway_ledger_primary_down"] = {(): float(not self._spool.primary_up)}
        return numbers

    async def open(self, limiter: Limiter, admission: Admission, members: Mapping[str, Member]) -> None:
        self._reseeder = Reseeder(
            limiter,
            admission,
            self._reader(),
            now_ms=admission.now_ms,
            ready=self._all_there,
        )
        await self.journal.open()
        await self._recovery.open()
        await self._reseeder.at_start()
        self._reseeder.start()
        self._start_work(members)

    async def close(self, close_alerts: Callable[[], Coroutine[Any, Any, None]]) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._reseeder is not None:
            await self._reseeder.close()
        await close_alerts()
        await self.journal.close()
        await self._recovery.close()
        if self._closer is not None:
            self._closer.close()

    # -- its parts ------------------------------------------------------------------------------------------------

    def _start_work(self, members: Mapping[str, Member]) -> None:
        work: list[Coroutine[Any, Any, None]] = [self._watch()]
        by_the_hour = self._by_the_hour()
        if by_the_hour:
            on_requests = self._settings.idle == "requests"
            work.append(Trailing(self._reader(), self._pricing, idle_on_requests=on_requests).keep_pricing())
            if self._first:
                counting = {
                    name: backend for name in by_the_hour if isinstance(backend := members[name].backend, Counting)
                }
                work.append(Meters(counting, self._append, instance=self._instance).keep_watching())
                work.append(self._close_hours(idle_on_requests=on_requests))
        if self._first:
            pruner = Pruner(
                self._reader(),
                keep_s=self._settings.keep_for,
                inputs_s=self._settings.decision_inputs.keep_for,
            )
            work.append(pruner.keep_pruning())
        self._tasks = [asyncio.create_task(one) for one in work]

    def _close_hours(self, *, idle_on_requests: bool) -> Coroutine[Any, Any, None]:
        store = self._reader()
        leading: Leading = lambda: nullcontext(enter_result=True)  # noqa: E731 - the only process that may write the file
        if not isinstance(store, SqliteStore):
            leading = partial(store.leading, "hours")
        self._closer = Closer(
            store,
            self._pricing.hours_of,
            instance=self._instance,
            settings=ClosingSettings(grace_s=self._grace_s(), idle_on_requests=idle_on_requests),
            on_closed=self._closed,
            leading=leading,
        )
        return self._closer.keep_closing()

    def _grace_s(self) -> float:
        """How long after its end all rows of an hour are there: the longest call, and a dead process is waited for."""
        backends = self._loaded.config.backends.values()
        longest_s = max(0.0 if isinstance(one, noun.ScriptedBackend) else one.timeouts.total for one in backends)
        return longest_s + self._settings.lease + _LATE_S

    def _by_the_hour(self) -> frozenset[str]:
        """Return the backends that cost by the hour, now or later."""
        config = self._loaded.config

        def costs(priced: noun.Tier | noun.AnyBackend) -> bool:
            prices = (priced.price, *(later.price for later in priced.later_prices))
            return any(price is not None and price.gpu is not None for price in prices)

        return frozenset(
            name for tier in config.tiers for name in tier.backends if costs(tier) or costs(config.backends[name])
        )

    def _append(self, rows: Sequence[AnyRow]) -> None:
        """Write rows that nobody waits for."""

        async def write() -> None:
            try:
                await self.journal.append(rows)
            except LedgerDown as down:
                _log.warning("what servers counted was not written: %s", down)

        task = asyncio.get_running_loop().create_task(write())
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    def _all_there(self) -> bool:
        """Whether all rows of this process are where others read them."""
        return self._spool is None or not self._spool.spooled_rows

    def _lost(self, bill: Bill) -> None:
        self._lost_exchanges += 1
        if self._reseeder is not None:
            self._reseeder.on_lost(bill)

    def _closed(self, changes: Sequence[AdjustmentRow]) -> None:
        if self._reseeder is not None:
            self._reseeder.on_closed(changes)

    async def _watch(self) -> None:
        """Have somebody told when nothing can be written."""
        down_since_ms = 0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            why = self.journal.unwritable
            if why is None:
                down_since_ms = 0
            else:
                down_since_ms = down_since_ms or int(time() * 1000)
                self._alerts.unwritable(down_since_ms, why)

    # -- its stores -----------------------------------------------------------------------------------------------

    def _reader(self) -> SqliteStore | PostgresStore:
        """Return a store of one's own, to read through and to write beside bills."""
        return open_store(self._loaded)

    def _store(self, *, alone: bool) -> Store:
        store = self._settings.store
        if isinstance(store, noun.PostgresLedger):
            self._spool = SpooledStore(self._reader(), self._path(store.spool), most_bytes=store.spool_size)
            return self._spool
        if isinstance(store, noun.SqliteLedger):
            return SqliteStore(self._path(store.path), shared=not alone)
        raise TypeError("nothing is kept")

    def _alive(self) -> Alive:
        store = self._settings.store
        if isinstance(store, noun.SqliteLedger):
            return HeldFiles(self._path(store.path), self._instance)
        return Heartbeats(self._settings.lease)

    def _path(self, path: str) -> Path:
        return self._loaded.beside(str(Path(path).expanduser()))
