"""Who tells the limits what was spent, when they have forgotten it? The ledger, through a task of every process.

A store that has lost its data begins another epoch, with a `cut` ten minutes before. Bills made before the cut are
told as totals, later ones each by its name, and a last word ends it. Any number of replicas may do that at the same
time, and any of them may die of it:

* Totals are told in parts by account, each under a name of the epoch, so each part counts once.
* A bill counts once under its name, whoever tells it: the replica that settles it, or any replica that read it.
* What is told belongs to one epoch, and counts in no other.
* For ten minutes after the last word every name is kept. The ledger is read again in that time: what was not to be
  seen at first (its process died, or its row was still on the way) is told then.

What is not seen: rows from before the cut that reached the ledger later than the totals were made, because they lay in
a spool for more than ten minutes. `tierway ledger verify` shows such a difference.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from random import random
from zlib import crc32

import msgspec

from gateway.admission import Admission
from gateway.ledger import rows
from gateway.ledger.contract import LedgerDown, Reading, Store
from gateway.ledger.spent import Spending, entry_of
from gateway.limiter import Limiter, Told, Unseeded
from policies.accounts import Budget, Entry, Rolling, Rule
from policies.books import Charge, Tell

_PARTS = 4096
_READ_AT_ONCE = 2048
_MOST_KEPT = 100_000
_FOR_EVER_MS = 1 << 52
_KNOWN_FOR_MS = 45 * 60_000
"""For so long and a little longer a reservation is known that was left open."""
_LAST_MS = 60_000

_log = logging.getLogger("tierway.limits")

Telling = tuple[str, Told]
"""What is told, and to which partition."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`passes_s` are the times after seeding at which the ledger is read again: in the ten minutes after it.

    A start waits `start_within_s` for rows of its own that are not yet where others read them.

    Replicas begin up to `spread_s` apart, because one is enough. Whoever the ledger has not heard of for `dead_s` is
    taken for dead; who that is, is looked for every `dead_every_s`, and what is done then harms none that lives.
    """

    every_s: float = 0.25
    start_within_s: float = 5.0
    dead_s: float = 90.0
    dead_every_s: float = 30.0
    spread_s: float = 0.5
    retry_s: float = 2.0
    passes_s: tuple[float, ...] = (60.0, 480.0)
    pass_within_s: float = 100.0


class Reseeder:
    """Watches a limiter, and tells it from a ledger what it does not know. One a process, on its event loop.

    `now_ms` is the time, `ready` whether all rows of this process are where the others read them.
    """

    def __init__(
        self,
        limiter: Limiter,
        admission: Admission,
        store: Store,
        *,
        now_ms: Callable[[], int],
        ready: Callable[[], bool] = lambda: True,
        settings: Settings | None = None,
    ) -> None:
        self._limiter = limiter
        self._spending = Spending(admission)
        self._store = store
        self._now_ms = now_ms
        self._ready = ready
        self._settings = settings or Settings()
        # Of one thread: what is read in parts is read by the same one.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tierway-seed")
        self._watching: asyncio.Task[None] | None = None
        self._passes: list[tuple[float, int, Unseeded]] = []
        self._due_s: dict[Unseeded, float] = {}
        self._claimed: set[str] = set()
        self._look_for_dead_s = 0.0
        self._dead: dict[str, int] = {}
        # Hours whose changes are still being written.
        self._closing: dict[tuple[str, int, int], None] = {}
        self._told_of: deque[Callable[[Reading], Iterator[Telling]] | Sequence[Telling]] = deque(maxlen=_MOST_KEPT)
        self.seeded = 0
        self.failed = 0

    async def at_start(self) -> None:
        """Tell what was spent before this process; before its first request. Raises nothing where it cannot."""
        if not self._spending.any:
            return
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._settings.start_within_s
        while not self._ready() and loop.time() < until_s:  # noqa: ASYNC110 - what another thread brings about
            await asyncio.sleep(self._settings.every_s)
        try:
            if self._limiter.state == "memory":
                await self._count_at_start()
            elif self._ready():
                self._due_s.update((one, loop.time()) for one in self._limiter.unseeded)
                await self._seed(self._limiter.unseeded)
        except LedgerDown as fault:
            _log.warning("budgets cannot be read from the ledger yet: %s", fault)

    def start(self) -> None:
        """Begin to watch."""
        if self._spending.any:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """End."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- what others find out: called from any thread -------------------------------------------------------------

    def on_lost(self, bill: rows.Bill) -> None:
        """Take note that an exchange whose process died was billed: its reservation gives way to that."""
        if self._spending.any:
            self._told_of.append(tuple(self._spending.bills_of(bill.exchange, bill.attempts, now_ms=self._now_ms())))

    def on_closed(self, changes: Sequence[rows.AdjustmentRow]) -> None:
        """Take note that an hour of a server was closed: budgets take its changes once all of them are durable."""
        if self._spending.any:
            self._closing.update(((one.backend, one.hour, one.revision), None) for one in changes)

    def _closed(self, found: Sequence[tuple[str, int, int]], reading: Reading) -> Iterator[Telling]:
        now_ms = self._now_ms()
        for backend, hour, revision in found:
            closing = self._spending.closing(reading, backend, hour, revision, now_ms=now_ms)
            if closing is not None:
                del self._closing[backend, hour, revision]
                # Told until the store has heard it, and counted once.
                self._told_of.append(tuple(self._spending.changes(reading, closing, now_ms=now_ms)))
        return iter(())

    def _unsettled(self, instance: str, since_ms: int, reading: Reading) -> Iterator[Telling]:
        bills = self._spending.bills(reading, now_ms=self._now_ms(), from_ms=since_ms, instance=instance)
        # Of what is not known any more it is sure that it was settled.
        return ((partition, msgspec.structs.replace(bill, missing=False)) for partition, bill in bills)

    def _settle_dead(self, reading: Reading) -> Iterator[Telling]:
        """Yield what processes that died wrote last: they may not have come to settle it."""
        now_ms = self._now_ms()
        dead_ms = now_ms - int(self._settings.dead_s * 1000)
        query = "SELECT instance, heard_ms FROM instances WHERE heard_ms >= ? AND heard_ms < ?"
        for instance, heard_ms in reading.rows(query, (dead_ms - _KNOWN_FOR_MS, dead_ms)):
            if isinstance(heard_ms, int) and self._dead.get(str(instance)) != heard_ms:
                self._dead[str(instance)] = heard_ms
                from_ms = heard_ms - _LAST_MS
                self._told_of.append(tuple(self._unsettled(str(instance), from_ms, reading)))
        return iter(())

    # -- the task -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.every_s)
            try:
                await self._look()
            except LedgerDown as fault:
                self.failed += 1
                _log.warning("budgets wait for the ledger: %s", fault)
                await asyncio.sleep(self._settings.retry_s)
            except Exception:  # noqa: BLE001 - see below
                # The outermost boundary of this task: budgets that were not told are told by the next one.
                self.failed += 1
                _log.exception("cannot tell the limits what was spent")
                await asyncio.sleep(self._settings.retry_s)

    async def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        waiting = self._limiter.unseeded
        for one in waiting:
            self._due_s.setdefault(one, now_s + random() * self._settings.spread_s)  # noqa: S311 - only spreads replicas
        for one in [one for one in self._due_s if one not in waiting]:
            # Whoever has done it: it may die before it reads again.
            del self._due_s[one]
            self._passes += [(now_s + after_s, number, one) for number, after_s in enumerate(self._settings.passes_s)]
        due = tuple(one for one in waiting if self._due_s[one] <= now_s)
        if due and self._ready():
            await self._seed(due)
        for planned in [planned for planned in self._passes if planned[0] <= now_s]:
            due_s, number, one = planned
            # It may have been down and not done; then there will be others.
            if one not in waiting:
                await self._read_again(number, one, due_s + self._settings.pass_within_s)
            self._passes.remove(planned)
        if self._limiter.state == "shared" and now_s >= self._look_for_dead_s:
            self._look_for_dead_s = now_s + self._settings.dead_every_s
            await self._through(self._settle_dead, self._tell_to_any)
        if self._closing:
            await self._through(partial(self._closed, tuple(self._closing)), self._tell_to_any)
        while self._told_of and await self._tell_kept():
            pass

    async def _tell_kept(self) -> bool:
        found = self._told_of[0]
        if callable(found):
            done = await self._through(found, self._tell_to_any)
        else:
            done = await self._tell_to_any(found)
        if done:
            self._told_of.popleft()
        return done

    async def _tell_to_any(self, tellings: Sequence[Telling]) -> bool:
        unseeded = {one.partition for one in self._limiter.unseeded}
        for partition, operation in tellings:
            # What is taken back must have been counted before.
            if partition in unseeded or await self._limiter.tell(partition, (operation,)) is None:
                return False
        return True

    # -- seeding --------------------------------------------------------------------------------------------------

    async def _seed(self, waiting: Sequence[Unseeded]) -> None:
        """Tell these partitions all that the ledger knows."""
        wanted = {one.partition: one for one in waiting}

        async def take(tellings: Sequence[Telling]) -> bool:
            await self._tell(tellings, wanted)
            return bool(wanted)

        if not waiting or not await self._through(partial(self._all_of, dict(wanted)), take):
            return
        for name, one in wanted.items():
            if await self._limiter.end_seeding(name, one.epoch):
                self.seeded += 1
                _log.warning("the budgets of %s were told again from the ledger", name)

    async def _tell(self, tellings: Sequence[Telling], wanted: dict[str, Unseeded]) -> int:
        by_partition: dict[str, list[Told]] = {}
        for partition, operation in tellings:
            if partition in wanted:
                by_partition.setdefault(partition, []).append(operation)
        counted = 0
        for partition, operations in by_partition.items():
            told = await self._limiter.tell(partition, operations, epoch=wanted[partition].epoch)
            if told is None:
                # It went down, or has lost its data again: it is found again, with another epoch.
                del wanted[partition]
            counted += told or 0
        return counted

    def _all_of(self, wanted: Mapping[str, Unseeded], reading: Reading) -> Iterator[Telling]:
        """Yield what came after the cut of each partition, and the totals up to it.

        What closed hours changed comes last: nothing can be taken back that has not been counted.
        """
        now_ms = self._now_ms()
        first_ms = min(one.cut_ms for one in wanted.values())
        sums = _Sums()
        for one in self._spending.totals(reading, now_ms=now_ms, before_ms=first_ms):
            if one.partition in wanted:
                sums.add(one.partition, entry_of(one.account, one.nusd, now_ms), one.at_ms)

        def after_cut(bills: Iterable[tuple[str, Tell]]) -> Iterator[Telling]:
            # The partitions are not cut at quite the same time: what is too early is among the totals of some.
            for partition, bill in bills:
                if partition in wanted and bill.at_ms >= wanted[partition].cut_ms:
                    yield partition, bill
                elif partition in wanted:
                    times_ms = bill.times_ms or (bill.at_ms,) * len(bill.entries)
                    for entry, at_ms in zip(bill.entries, times_ms, strict=True):
                        sums.add(partition, entry, at_ms)

        yield from after_cut(self._spending.bills(reading, now_ms=now_ms, from_ms=first_ms))
        changes = tuple(after_cut(self._changes(reading, first_ms, now_ms)))
        for partition, part, entries, times_ms in sums.parts():
            yield partition, Charge(f"seed/{wanted[partition].epoch}/{part}", entries, times_ms)
        yield from changes

    def _after(self, reading: Reading, from_ms: int, now_ms: int) -> Iterator[tuple[str, Tell]]:
        yield from self._spending.bills(reading, now_ms=now_ms, from_ms=from_ms)
        yield from self._changes(reading, from_ms, now_ms)

    def _changes(self, reading: Reading, from_ms: int, now_ms: int) -> Iterator[tuple[str, Tell]]:
        for closing in self._spending.closings(reading, from_ms=from_ms, now_ms=now_ms):
            yield from self._spending.changes(reading, closing, now_ms=now_ms)

    async def _read_again(self, number: int, one: Unseeded, until_s: float) -> None:
        """Tell what was not to be seen when the totals were made. One replica is enough, and any may."""
        claim = Charge(f"again/{one.epoch}/{number}", ())
        if claim.id not in self._claimed and not await self._limiter.tell(one.partition, (claim,), epoch=one.epoch):
            return
        self._claimed.add(claim.id)
        counted, wanted = 0, {one.partition: one}

        async def take(tellings: Sequence[Telling]) -> bool:
            nonlocal counted
            counted += await self._tell(tellings, wanted)
            return bool(wanted) and asyncio.get_running_loop().time() < until_s

        if not await self._through(lambda reading: self._after(reading, one.cut_ms, self._now_ms()), take):
            _log.warning("the ledger was not read again to the end for %s", one.partition)
        if counted:
            _log.warning("%d bills of %s had not been told before", counted, one.partition)

    async def _count_at_start(self) -> None:
        now_ms = self._now_ms()
        # What was found out until now is durable, and so among the totals.
        self._told_of.clear()
        self._closing.clear()

        def read(reading: Reading) -> Iterator[Telling]:
            sums = _Sums()
            for one in self._spending.totals(reading, now_ms=now_ms, before_ms=_FOR_EVER_MS):
                sums.add(one.partition, entry_of(one.account, one.nusd, now_ms), one.at_ms)
            for partition, part, entries, times_ms in sums.parts():
                yield partition, Charge(f"start/{partition}/{part}", entries, times_ms)

        async def take(tellings: Sequence[Telling]) -> bool:
            for partition, operation in tellings:
                await self._limiter.tell(partition, (operation,))
            return True

        await self._through(read, take)

    # -- reading --------------------------------------------------------------------------------------------------

    async def _through(
        self,
        read: Callable[[Reading], Iterator[Telling]],
        take: Callable[[Sequence[Telling]], Awaitable[bool]],
    ) -> bool:
        """Have `take` take all that `read` yields from one reading, part by part; False: it wanted no more."""
        loop, opened = asyncio.get_running_loop(), ExitStack()

        def begin() -> Iterator[Telling]:
            return read(opened.enter_context(self._store.reading()))

        try:
            tellings = await loop.run_in_executor(self._thread, begin)
            while part := await loop.run_in_executor(self._thread, lambda: list(islice(tellings, _READ_AT_ONCE))):
                if not await take(part):
                    return False
            return True
        finally:
            # Not waited for: who is cancelled here does not wait for a database.
            self._thread.submit(opened.close)


class _Sums:
    """What accounts have spent, at the beginnings of the slots and windows that they count in."""

    def __init__(self) -> None:
        self._rules: dict[tuple[str, str], Rule] = {}
        self._sums: dict[tuple[str, str], dict[int, int]] = {}

    def add(self, partition: str, entry: Entry, at_ms: int) -> None:
        """Add what was spent (`taken`) at a time."""
        place, rule = (partition, entry.account), entry.rule
        if isinstance(rule, Rolling):
            at_ms -= at_ms % rule.slot_ms
        elif isinstance(rule, Budget):
            at_ms = max((start for start in rule.starts_ms if start <= at_ms), default=0)
        self._rules[place] = rule
        sums = self._sums.setdefault(place, {})
        sums[at_ms] = sums.get(at_ms, 0) + entry.taken

    def parts(self) -> Iterator[tuple[str, int, tuple[Entry, ...], tuple[int, ...]]]:
        """Yield partition, part, entries and their times: an account is always in the same part, whoever adds it up."""
        parts: dict[tuple[str, int], list[tuple[str, str]]] = {}
        for place in self._sums:
            parts.setdefault((place[0], crc32(place[1].encode()) % _PARTS), []).append(place)
        for (partition, part), places in parts.items():
            amounts = [
                (place, at_ms, nusd) for place in places for at_ms, nusd in self._sums[place].items() if nusd > 0
            ]
            entries = tuple(Entry(place[1], self._rules[place], nusd, shadow=True) for place, _, nusd in amounts)
            yield partition, part, entries, tuple(at_ms for _, at_ms, _ in amounts)
