"""What does a token on a GPU come to at the moment? The work its server lately did, read from the ledger every minute.

Every process reads the same rows, those of all replicas, and so comes to the same price. What a price is made of is
`policies/gpu_price.py`. Until enough was measured, and where nothing can be read, the price stays as it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import time
from typing import Protocol

import msgspec

from gateway.ledger.contract import LedgerDown, Reading, Store
from gateway.ledger.server_hours import last_runs, last_weight, parts_of
from gateway.pricing import HourPrice
from policies.gpu import RunId, Span
from policies.gpu_price import TokenPrice, Trail, blended, decode_weight, moved

_FIRST_LOOK_MS = 6 * 3_600_000
_LATE_MS = 5 * 60_000
"""A row may be written so long after what it tells of: that far back is read again every time."""
_MOST_RUNS = 20_000

_log = logging.getLogger("tierway.trailing")


class Prices(Protocol):
    """The price list that is told."""

    def hours(self, now_s: float) -> Mapping[str, HourPrice]: ...
    def set_provisional(
        self, backend: str, *, input_nusd: int, cached_input_nusd: int, output_nusd: int, now_s: float
    ) -> None: ...


class _Server(msgspec.Struct):
    """What was read of a server until `read_ms`, and what its tokens cost by that."""

    trail: Trail
    read_ms: int
    seen: dict[RunId, int]
    price: TokenPrice | None = None
    hour_nusd: int = 0


class Trailing:
    """Keeps provisional prices by what was lately measured. `store` is only read."""

    def __init__(
        self,
        store: Store,
        prices: Prices,
        *,
        idle_on_requests: bool = False,
        every_s: float = 60.0,
        now_s: Callable[[], float] = time,
    ) -> None:
        self._store = store
        self._prices = prices
        self._idle_on_requests = idle_on_requests
        self._every_s = every_s
        self._now_s = now_s
        self._servers: dict[str, _Server] = {}

    async def keep_pricing(self) -> None:
        """Look for ever."""
        while True:
            try:
                await self.look()
            except LedgerDown as down:
                _log.warning("what GPUs lately did cannot be read now: %s", down)
            await asyncio.sleep(self._every_s)

    async def look(self) -> None:
        """Read what is new and say what tokens cost. Raises `LedgerDown`."""
        now_s = self._now_s()
        hours = self._prices.hours(now_s)
        found = await asyncio.to_thread(self._measure, hours, int(now_s * 1000)) if hours else {}
        for backend, price in found.items():
            self._prices.set_provisional(
                backend,
                input_nusd=price.input_nusd,
                cached_input_nusd=0,
                output_nusd=price.output_nusd,
                now_s=now_s,
            )

    def _measure(self, hours: Mapping[str, HourPrice], now_ms: int) -> dict[str, TokenPrice]:
        """Return the prices that have moved."""
        found = {}
        with self._store.reading() as reading:
            for backend, hour in hours.items():
                server = self._servers.get(backend)
                if server is None:
                    server = self._servers[backend] = _Server(Trail(), now_ms - _FIRST_LOOK_MS, {})
                _read(reading, backend, server, now_ms)
                weight = last_weight(reading, backend)
                price = server.trail.price(
                    hour.hour_nusd,
                    decode_weight=blended(None, decode_weight(server.trail.runs)) if weight is None else weight,
                    now_ms=now_ms,
                    idle_on_runs=self._idle_on_requests,
                )
                if price is None or (hour.hour_nusd == server.hour_nusd and not moved(server.price, price)):
                    continue
                server.price, server.hour_nusd = price, hour.hour_nusd
                found[backend] = price
        return found


def _read(reading: Reading, backend: str, server: _Server, now_ms: int) -> None:
    """Take in what was written since the last time."""
    since_ms = server.read_ms - _LATE_MS
    for run in last_runs(reading, backend, since_ms, _MOST_RUNS):
        if run.id not in server.seen:
            server.seen[run.id] = run.ended_ms
            server.trail.saw_run(run)
    for part in parts_of(reading, backend, Span(since_ms, now_ms)):
        server.trail.saw_part(part)
    server.read_ms = max(server.read_ms, now_ms)
    server.seen = {id_: ended_ms for id_, ended_ms in server.seen.items() if ended_ms > server.read_ms - _LATE_MS}
