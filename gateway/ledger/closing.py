"""When an hour of a server is over, who writes what everyone pays of it? One leader, once, and again if rows come late.

Rules a reader must not break:

* Of an hour the row of its closing is written first. It is the claim: whoever finds that the row with that revision
  is his own, and nobody else, writes the adjustments that belong to it. Two leaders never both adjust.
* Adjustments follow in small transactions, because a hundred thousand rows in one would hold up every bill for
  seconds. A leader that dies among them leaves an hour whose changes do not come to what its closing says; the next
  revision adds what is missing, because a change is a share less all that was told before.
* It writes to the database itself, never to a spool: two replicas that both believe that they closed an hour would
  both adjust it.
* An hour that is N hours old is looked at every N minutes for rows that came late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import sleep, time

import msgspec

from gateway.ledger.contract import LedgerDown, Reading, Store
from gateway.ledger.rows import AdjustmentRow, ClosingRow
from gateway.ledger.server_hours import (
    GoneServer,
    HourRows,
    changed_nusd,
    closing_at,
    first_known_ms,
    gone_servers,
    hour_of,
    hour_rows,
    last_closings,
    last_weight,
    made_from,
)
from gateway.pricing import HourPrice
from policies.gpu import HOUR_MS, Change, changes, split_hour
from policies.gpu_price import blended, decode_weight

_MINUTE_MS = 60_000
_ROWS_AT_ONCE = 100
_PAUSE_S = 0.01
_DEAD_AFTER_MS = 10 * _MINUTE_MS
"""Adjustments that are missing for so long are written by nobody any more."""
_MOST_LOOKED_AT = 10
_MOST_CLOSED = 24

_log = logging.getLogger("tierway.closing")

HoursOf = Callable[[int], Mapping[str, HourPrice]]
"""What an hour of every GPU's backend costs, by backend. It is called in a thread of its own."""

OnClosed = Callable[[Sequence[AdjustmentRow]], None]
"""Hears of adjustments when they are durable, on the event loop of the one leader, so that budgets take them."""

Leading = Callable[[], AbstractContextManager[bool]]
"""Whether this is the one process that closes hours, for as long as the block runs. Raises `LedgerDown`."""


class ClosingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When hours are closed.

    `grace_s` after its end an hour is closed: longer than a request may take, and than a dead process is waited for.
    `look_back_s`: no hour that is older is closed or looked at; rows must be kept for longer.
    """

    grace_s: float = 720.0
    look_back_s: float = 7 * 24 * 3600.0
    every_s: float = 60.0
    idle_on_requests: bool = False


class Closer:
    """Closes every hour of every server that costs by the hour. `store` is its own, and used by nobody else.

    `instance` names this process and no other one.
    """

    def __init__(
        self,
        store: Store,
        hours_of: HoursOf,
        *,
        instance: str,
        settings: ClosingSettings,
        on_closed: OnClosed | None = None,
        leading: Leading = lambda: nullcontext(enter_result=True),
        now_ms: Callable[[], int] = lambda: int(time() * 1000),
        pause: Callable[[float], None] = sleep,
    ) -> None:
        self._store = store
        self._hours_of = hours_of
        self._instance = instance
        self._settings = settings
        self._on_closed = on_closed or (lambda _: None)
        self._leading = leading
        self._now_ms = now_ms
        self._pause = pause
        self._looked_ms: dict[tuple[str, int], int] = {}
        self._stopping = False

    async def keep_closing(self) -> None:
        """Close hours for ever."""
        while True:
            try:
                await self.look()
            except LedgerDown as down:
                _log.warning("hours of GPUs cannot be closed now: %s", down)
            await asyncio.sleep(self._settings.every_s)

    async def look(self) -> None:
        """Close what is over, and look after what was closed. Raises `LedgerDown`."""
        loop = asyncio.get_running_loop()

        def tell(rows: Sequence[AdjustmentRow]) -> None:
            loop.call_soon_threadsafe(self._on_closed, rows)

        self._stopping = False
        work = loop.run_in_executor(None, self._look, tell)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # A thread cannot be stopped: it is told to, and waited for, so that nothing is written behind our back.
            self._stopping = True
            await asyncio.wait([work])
            raise

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _look(self, tell: OnClosed) -> None:
        with self._leading() as leader:
            if not leader:
                return
            now_ms = self._now_ms()
            current = self._hours_of(now_ms // HOUR_MS)
            with self._store.reading() as reading:
                found = [self._survey(reading, backend, now_ms) for backend in current]
                found += [self._survey(reading, gone.backend, now_ms, gone) for gone in gone_servers(reading, current)]
            # From when on a server costs: from when it was first configured, used or not.
            unknown = [current[one.backend].row for one in found if one.unknown]
            if unknown:
                self._store.write([msgspec.structs.replace(row, at_ms=now_ms) for row in unknown])
            for one in found:
                self._do(one, tell)

    def _do(self, todo: _ToDo, tell: OnClosed) -> None:
        for hour in todo.hours[:_MOST_CLOSED]:
            price = self._hours_of(hour).get(todo.backend, todo.last_price)
            if price is not None and not self._stopping:
                self._close_first(hour, price, tell)
        for closing in todo.late:
            if not self._stopping:
                self._close_again(closing, tell)

    # -- what is to be done -------------------------------------------------------------------------------------------

    def _survey(self, reading: Reading, backend: str, now_ms: int, gone: GoneServer | None = None) -> _ToDo:
        """Find the hours of a server that are over and not closed yet, and those with rows that came late."""
        first = (now_ms - int(1000 * self._settings.look_back_s)) // HOUR_MS
        end = (now_ms - int(1000 * self._settings.grace_s)) // HOUR_MS
        closed = last_closings(reading, backend, first)
        late = []
        for closing in self._due(closed, now_ms):
            if self._is_late(reading, closing, now_ms):
                late.append(closing)
            else:
                self._looked_ms[backend, closing.hour] = now_ms
        known_ms = first_known_ms(reading, backend)
        if closed:
            first = closed[0].hour + 1
        elif known_ms is not None:
            first = max(first, known_ms // HOUR_MS)
        else:
            first = end
        return _ToDo(
            backend=backend,
            unknown=known_ms is None,
            hours=range(first, end if gone is None else min(end, gone.last_hour + 1)),
            late=late,
            last_price=None if gone is None else gone.price,
        )

    def _due(self, closed: Sequence[ClosingRow], now_ms: int) -> list[ClosingRow]:
        """Return closings to look at: an hour that is N hours old every N minutes, the newest first."""
        this_hour = now_ms // HOUR_MS
        oldest = (now_ms - int(1000 * self._settings.look_back_s)) // HOUR_MS
        self._looked_ms = {key: at_ms for key, at_ms in self._looked_ms.items() if key[1] >= oldest}
        due = [
            closing
            for closing in closed
            if now_ms - self._looked_ms.get((closing.backend, closing.hour), 0)
            >= _MINUTE_MS * (this_hour - closing.hour)
        ]
        return due[:_MOST_LOOKED_AT]

    @staticmethod
    def _is_late(reading: Reading, closing: ClosingRow, now_ms: int) -> bool:
        """Whether rows of the hour came late, or a leader died over it."""
        told_nusd = changed_nusd(reading, closing.backend, closing.hour)
        if told_nusd != closing.shares_nusd - closing.provisional_nusd:
            # Who wrote the closing may still be writing.
            return now_ms - closing.at_ms >= _DEAD_AFTER_MS
        return made_from(reading, closing.backend, closing.hour) != closing.made_from

    # -- one hour -----------------------------------------------------------------------------------------------------

    def _close_first(self, hour: int, price: HourPrice, tell: OnClosed) -> None:
        with self._store.reading() as reading:
            rows = hour_rows(reading, price.backend, hour)
            weight = blended(last_weight(reading, price.backend), decode_weight(rows.runs))
        claim = _Claim(
            backend=price.backend,
            hour=hour,
            revision=1,
            tier=price.tier,
            hour_nusd=price.hour_nusd,
            price_version=price.row.version,
            decode_weight=weight,
        )
        self._close(rows, claim, tell)

    def _close_again(self, closing: ClosingRow, tell: OnClosed) -> None:
        """Write another revision. What the hour cost and how work was weighed in it stays as it was."""
        with self._store.reading() as reading:
            rows = hour_rows(reading, closing.backend, closing.hour)
        claim = _Claim(
            backend=closing.backend,
            hour=closing.hour,
            revision=closing.revision + 1,
            tier=closing.tier,
            hour_nusd=closing.hour_nusd,
            price_version=closing.price_version,
            decode_weight=closing.decode_weight,
        )
        self._close(rows, claim, tell)

    def _close(self, rows: HourRows, claim: _Claim, tell: OnClosed) -> None:
        span = hour_of(claim.hour)
        split = split_hour(
            span,
            claim.hour_nusd,
            rows.runs,
            rows.parts,
            decode_weight=claim.decode_weight,
            idle_on_runs=self._settings.idle_on_requests,
        )
        told = changes(span, rows.runs, split, rows.paid)
        closing = ClosingRow(
            backend=claim.backend,
            hour=claim.hour,
            revision=claim.revision,
            tier=claim.tier,
            at_ms=self._now_ms(),
            hour_nusd=claim.hour_nusd,
            shares_nusd=split.shares_nusd,
            idle_nusd=split.idle_nusd,
            outside_nusd=split.outside_nusd,
            busy_ms=split.busy_ms,
            attempts=len(rows.runs),
            price_version=claim.price_version,
            instance=self._instance,
            provisional_nusd=sum(run.billed_within(span) for run in rows.runs),
            decode_weight=claim.decode_weight,
            made_from=rows.made_from,
        )
        if not self._claimed(closing):
            return
        self._write(_adjustments(claim, told, rows), tell)
        self._looked_ms[claim.backend, claim.hour] = closing.at_ms
        _log.info(
            "closed hour %d of %s, revision %d: %d attempts", claim.hour, claim.backend, claim.revision, len(rows.runs)
        )

    def _claimed(self, closing: ClosingRow) -> bool:
        self._store.write([closing])
        with self._store.reading() as reading:
            return closing_at(reading, closing.backend, closing.hour, closing.revision) == closing

    def _write(self, rows: Sequence[AdjustmentRow], tell: OnClosed) -> None:
        """Write adjustments, so many that others get their turn, and tell of each lot when it is durable."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            if self._stopping:
                return
            lot = rows[start : start + _ROWS_AT_ONCE]
            self._store.write(lot)
            tell(lot)
            if start + _ROWS_AT_ONCE < len(rows):
                self._pause(_PAUSE_S)


class _ToDo(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done for a server. `last_price` is that of one that is not in the configuration any more."""

    backend: str
    unknown: bool
    hours: range
    late: list[ClosingRow]
    last_price: HourPrice | None


class _Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be closed, at which price."""

    backend: str
    hour: int
    revision: int
    tier: str
    hour_nusd: int
    price_version: str
    decode_weight: int


def _adjustments(claim: _Claim, told: Iterable[Change], rows: HourRows) -> list[AdjustmentRow]:
    found = []
    for change in told:
        origin = rows.origins[change.id]
        found.append(
            AdjustmentRow(
                exchange_id=change.id[0],
                number=change.id[1],
                hour=claim.hour,
                revision=claim.revision,
                backend=claim.backend,
                share_nusd=change.share_nusd,
                change_nusd=change.change_nusd,
                at_ms=origin.at_ms,
                key_name=origin.key_name,
                team=origin.team,
                route=origin.route,
                tier=origin.tier,
                shown=origin.shown,
            )
        )
    return found
