"""What did a server do, by its own count? Its counters, asked every few seconds and kept by the minute.

Only they tell the work that did not come through this gateway. A gap is kept as a gap: what happened while nobody
could ask is not guessed, and another replica that could ask may fill it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import time

import msgspec

from backends.backend import BackendFault, Counters, Counting
from gateway.ledger.rows import MeterRow

_MINUTE_MS = 60_000
_HOUR_MS = 3_600_000
_LONGEST_GAP_MS = 60_000
"""Counters that were asked for longer ago say nothing of when they went on."""
_CLOCKS_MS = 10_000
"""By how much the clocks of two machines may differ."""
_NO_COUNTERS_PAUSE_S = 60.0

_log = logging.getLogger("tierway.meters")

Write = Callable[[Sequence[MeterRow]], None]


class _Part(msgspec.Struct, kw_only=True):
    """A part of a minute that was watched without a gap."""

    from_ms: int
    until_ms: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    busy_ms: int = 0
    restarts: int = 0


class Meter:
    """One server as one process watches it: told what its counters said and when, it tells what to keep."""

    def __init__(self, backend: str, instance: str) -> None:
        self._backend = backend
        self._instance = instance
        self._last: tuple[Counters, int] | None = None
        self._part: _Part | None = None
        self._done: list[_Part] = []

    def saw(self, counters: Counters, now_ms: int) -> None:
        """Take in what the server counted until now."""
        last, self._last = self._last, (counters, now_ms)
        if last is None or not 0 < now_ms - last[1] <= _LONGEST_GAP_MS:
            return
        before, since_ms = last
        restarted = _restarted(before, counters)
        if restarted and counters.started_s is not None and 1000 * counters.started_s < since_ms - _CLOCKS_MS:
            # Another server than the one before, which was there all the time: what it did in between is not known.
            return
        went_on = counters if restarted else _difference(before, counters)
        # Whether it works is seen at both ends: each stands for half of the time between them.
        busy_ms = (now_ms - since_ms) * ((before.running > 0) + (counters.running > 0)) // 2
        self._add(since_ms, now_ms, went_on, busy_ms, restarted=restarted)

    def missed(self) -> None:
        """Note that the server could not be asked: from here until it can there is a gap."""
        self._last = None

    def rows(self, *, all_of_it: bool = False) -> list[MeterRow]:
        """Return what is complete, each once. With `all_of_it` also the minute under way, because nothing follows."""
        if all_of_it and self._part is not None:
            self._done.append(self._part)
            self._part = None
        done, self._done = self._done, []
        return [
            MeterRow(
                backend=self._backend,
                hour=part.from_ms // _HOUR_MS,
                instance=self._instance,
                from_ms=part.from_ms,
                until_ms=part.until_ms,
                prompt_tokens=part.prompt_tokens,
                completion_tokens=part.completion_tokens,
                busy_ms=part.busy_ms,
                ready_ms=part.until_ms - part.from_ms,
                restarts=part.restarts,
            )
            for part in done
        ]

    def _add(self, from_ms: int, until_ms: int, went_on: Counters, busy_ms: int, *, restarted: bool) -> None:
        """Divide what happened between two looks by the minutes it may belong to, evenly."""
        for start_ms, end_ms in _minutes(from_ms, until_ms):
            piece = (start_ms - from_ms, end_ms - from_ms, until_ms - from_ms)
            part = self._part_at(start_ms)
            part.until_ms = end_ms
            part.prompt_tokens += _piece_of(went_on.prompt_tokens, *piece)
            part.completion_tokens += _piece_of(went_on.completion_tokens, *piece)
            part.busy_ms += _piece_of(busy_ms, *piece)
        part.restarts += restarted

    def _part_at(self, at_ms: int) -> _Part:
        part = self._part
        if part is None or part.until_ms != at_ms or at_ms % _MINUTE_MS == 0:
            if part is not None:
                self._done.append(part)
            part = self._part = _Part(from_ms=at_ms, until_ms=at_ms)
        return part


def _restarted(before: Counters, now: Counters) -> bool:
    return (
        now.started_s != before.started_s
        or now.prompt_tokens < before.prompt_tokens
        or now.completion_tokens < before.completion_tokens
    )


def _difference(before: Counters, now: Counters) -> Counters:
    return Counters(
        prompt_tokens=now.prompt_tokens - before.prompt_tokens,
        completion_tokens=now.completion_tokens - before.completion_tokens,
        running=now.running,
    )


def _piece_of(amount: int, begin_ms: int, end_ms: int, whole_ms: int) -> int:
    """Return a piece of an amount that is spread over `whole_ms`; the pieces add up."""
    return amount * end_ms // whole_ms - amount * begin_ms // whole_ms


def _minutes(from_ms: int, until_ms: int) -> Iterator[tuple[int, int]]:
    while from_ms < until_ms:
        end_ms = min(until_ms, (from_ms // _MINUTE_MS + 1) * _MINUTE_MS)
        yield from_ms, end_ms
        from_ms = end_ms


class Meters:
    """Watches servers for ever. `write` keeps rows without waiting; `instance` names this process in them.

    One process of a machine is enough, and several of them, or of several machines, count nothing twice.
    """

    def __init__(
        self,
        servers: Mapping[str, Counting],
        write: Write,
        *,
        instance: str,
        every_s: float = 5.0,
        now_ms: Callable[[], int] = lambda: int(time() * 1000),
    ) -> None:
        self._servers = servers
        self._write = write
        self._every_s = every_s
        self._now_ms = now_ms
        self._meters = {name: Meter(name, instance) for name in servers}

    async def keep_watching(self) -> None:
        """Ask every server for ever, each at its own pace: one that hangs delays no other."""
        try:
            await asyncio.gather(*(self._watch(name) for name in self._servers))
        finally:
            self._write([row for meter in self._meters.values() for row in meter.rows(all_of_it=True)])

    async def _watch(self, name: str) -> None:
        while True:
            counts = await self.look(name)
            await asyncio.sleep(self._every_s if counts else max(self._every_s, _NO_COUNTERS_PAUSE_S))

    async def look(self, name: str) -> bool:
        """Ask one server once; return whether it is one that counts, as far as is known."""
        meter = self._meters[name]
        try:
            counters = await self._servers[name].counters()
        except BackendFault as fault:
            _log.debug("the counters of %s cannot be had: %s", name, fault)
            meter.missed()
            return True
        if counters is None:
            meter.missed()
            return False
        meter.saw(counters, self._now_ms())
        if rows := meter.rows():
            self._write(rows)
        return True
