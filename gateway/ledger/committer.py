"""How do the rows of many get into one commit? Those that come while one is on its way go together in the next.

All state is the event loop's; one thread does what blocks: it is handed a batch, and hands back how that went. What
nobody waits for is kept until it is written; what somebody waited for in vain is kept only where it is to be served.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from time import monotonic

import msgspec

from gateway.ledger.contract import BadRows, LedgerDown, Store
from gateway.ledger.rows import AnyRow

_log = logging.getLogger("tierway.ledger")

_MOST_ROWS = 1000
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_LAST_PAUSE_S = 0.01
_LONG_S = 30.0
_WEIGHT = 0.1


class Write:
    """What is to be written together: rows, and the open exchanges that are closed by them.

    It is kept until it is written if `kept`. Who insists is told of a failure whatever the operator wants.
    """

    __slots__ = ("closed", "future", "insisted", "kept", "rows", "since_s")

    def __init__(
        self,
        rows: Sequence[AnyRow],
        closed: Sequence[str] = (),
        *,
        future: asyncio.Future[None] | None = None,
        kept: bool = False,
        insisted: bool = False,
    ) -> None:
        self.rows = rows
        self.closed = closed
        self.future = future
        self.kept = kept
        self.insisted = insisted
        self.since_s = 0.0

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.closed)

    def waited_for(self) -> bool:
        return self.future is not None and not self.future.done()


class Numbers(msgspec.Struct):
    """What has been done so far. Seconds are those of commits that succeeded."""

    rows: int = 0
    commits: int = 0
    failures: int = 0
    dropped: int = 0
    commit_s: float = 0.0


class _Outcome(msgspec.Struct, frozen=True):
    """How a batch went: why it failed, or which of it could not be written for its own fault."""

    error: LedgerDown | None = None
    bad: tuple[tuple[int, LedgerDown], ...] = ()
    took_s: float = 0.0


class Committer:
    """Writes to a store, from a thread of its own, one batch after the other.

    `serve`: nobody who waits is ever told that a write failed. `patience_s` is how long anybody waits at most.
    `company()` says whether others are under way whose rows may come soon. `probe()` makes something to write, to
    find out whether the store is well again; `well_again()` is called when it is.
    """

    def __init__(
        self,
        store: Store,
        *,
        serve: bool,
        gather_s: float,
        patience_s: float,
        most_kept_rows: int,
        company: Callable[[], bool],
        probe: Callable[[], Write],
        well_again: Callable[[], None],
    ) -> None:
        self._store = store
        self._serve = serve
        self._gather_s = gather_s
        self._patience_s = patience_s
        self._most_kept_rows = most_kept_rows
        self._company = company
        self._probe = probe
        self._well_again = well_again
        self._waiting: deque[Write] = deque()
        self._kept: deque[Write] = deque()
        self._kept_rows = 0
        self._batch: list[Write] = []
        self._began_s: float | None = None
        self._timer: asyncio.Handle | None = None
        self._retrying = False
        self._pause_s = _FIRST_PAUSE_S / 2
        self._well_s = monotonic()
        self._interval_s = 1.0
        self._last_s = monotonic()
        self._jobs: SimpleQueue[list[Write] | None] = SimpleQueue()
        self._idle = asyncio.Event()
        self._ended = asyncio.Event()
        self._dropping = False
        self.why: LedgerDown | None = None
        self.numbers = Numbers()

    @property
    def down(self) -> bool:
        """Whether what was last tried could not be written."""
        return self.why is not None

    @property
    def stuck(self) -> bool:
        """Whether the store has not answered for longer than anybody waits."""
        return self._began_s is not None and monotonic() - self._began_s > self._patience_s

    @property
    def waiting_rows(self) -> int:
        """Rows that are not durable yet, and open exchanges that are not closed yet."""
        return self._kept_rows + sum(one.size for many in (self._waiting, self._batch) for one in many)

    def open(self) -> None:
        """Start the thread."""
        loop = asyncio.get_running_loop()
        self._idle.set()
        # Not waited for when the program ends: it may hang with its store.
        Thread(target=self._work, args=(loop,), name="ledger", daemon=True).start()

    def submit(self, write: Write) -> None:
        """Have something written with the next batch; later, where nobody waits for it and the store is not well."""
        self._arrived(write)
        self._idle.clear()
        if write.future is None and self.down:
            if write.kept:
                self._keep(write, self._kept.append)
            return
        self._waiting.append(write)
        if self._began_s is None and (self._timer is None or self._retrying):
            self._plan()

    async def close(self, within_s: float) -> None:
        """Write what is left, within a time, and end the thread, which closes the store."""
        self._pause_s = _LAST_PAUSE_S
        if self._began_s is None and (self._waiting or self._kept):
            self._plan()
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
                self._jobs.put(None)
                await self._ended.wait()
        except TimeoutError:
            self._jobs.put(None)
            if left := self.waiting_rows:
                _log.error("The ledger is closed with %d rows unwritten: they are lost. %s", left, self.why or "")
        if self._timer is not None:
            self._timer.cancel()

    def expire(self) -> None:
        """Wait no more where somebody has waited for too long. To be called now and then."""
        before_s = monotonic() - self._patience_s
        late = [one for one in (*self._batch, *self._waiting) if one.since_s < before_s and one.waited_for()]
        if not late and (self.down or not self.stuck):
            return
        error = LedgerDown(f"The store of the ledger did not answer within {self._patience_s:g} s.")
        self._failed(error)
        for one in late:
            self._tell(one, error)
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            if one.waited_for():
                self._waiting.append(one)
                continue
            self._tell(one, error)
            if one.kept:
                self._keep(one, self._kept.append)

    # -- gathering ----------------------------------------------------------------------------------------------------

    def _arrived(self, write: Write) -> None:
        write.since_s = now_s = monotonic()
        if write.future is not None:
            self._interval_s += _WEIGHT * (min(1.0, now_s - self._last_s) - self._interval_s)
            self._last_s = now_s

    def _plan(self) -> None:
        """Begin the next batch at the end of this turn, or wait a little for company where company is likely.

        A commit costs ten times what a row does, most of it in the sync.
        """
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._retrying = not self._waiting
        if self._retrying:
            self._timer = loop.call_later(self._pause_s if self.down else 0.0, self._begin)
        elif self._interval_s < self._gather_s and self._company():
            left_s = self._waiting[0].since_s + self._gather_s - monotonic()
            self._timer = loop.call_later(max(0.0, left_s), self._begin)
        else:
            self._timer = loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._timer = None
        rows = 0
        while self._waiting and rows < _MOST_ROWS:
            self._batch.append(self._waiting.popleft())
            rows += self._batch[-1].size
        while self._kept and rows < _MOST_ROWS:
            self._batch.append(self._kept.popleft())
            rows += self._batch[-1].size
            self._kept_rows -= self._batch[-1].size
        if not self._batch:
            self._batch.append(self._probe())
        self._began_s = monotonic()
        self._jobs.put(self._batch)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        def tell(callback: Callable[[], None]) -> None:
            try:
                loop.call_soon_threadsafe(callback)
            except RuntimeError:
                _log.debug("The event loop has ended before the ledger.")

        while (batch := self._jobs.get()) is not None:
            outcome = self._commit(batch)
            tell(partial(self._done, outcome))
        try:
            self._store.close()
        finally:
            tell(self._ended.set)

    def _commit(self, batch: Sequence[Write]) -> _Outcome:
        began_s = monotonic()
        try:
            self._write(batch)
        except BadRows as error:
            return self._commit_apart(batch, error)
        except LedgerDown as error:
            return _Outcome(error=error)
        except Exception as error:  # noqa: BLE001 - a fault of ours in this thread would leave everybody waiting
            _log.exception("The store of the ledger failed in a way that it should not.")
            return _Outcome(error=LedgerDown(f"The store of the ledger failed: {error!r}"))
        return _Outcome(took_s=monotonic() - began_s)

    def _commit_apart(self, batch: Sequence[Write], error: LedgerDown) -> _Outcome:
        """Find out who spoils a batch, so that the others are written."""
        if len(batch) == 1:
            return _Outcome(bad=((0, error),))
        bad: list[tuple[int, LedgerDown]] = []
        began_s = monotonic()
        for place, one in enumerate(batch):
            outcome = self._commit([one])
            if outcome.error is not None:
                return outcome  # to write the others again later changes nothing
            bad += [(place, why) for _, why in outcome.bad]
        return _Outcome(bad=tuple(bad), took_s=monotonic() - began_s)

    def _write(self, batch: Sequence[Write]) -> None:
        rows = [row for one in batch for row in one.rows]
        closed = [exchange_id for one in batch for exchange_id in one.closed]
        self._store.write(rows, closed)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _done(self, outcome: _Outcome) -> None:
        batch, self._batch, self._began_s = self._batch, [], None
        if outcome.error is not None:
            self._failed(outcome.error)
            self.numbers.failures += 1
            for one in reversed(batch):
                self._tell(one, outcome.error)
                if one.kept:
                    self._keep(one, self._kept.appendleft)
        else:
            self._succeeded(batch, outcome)
        if not (self._waiting or self._kept):
            self._idle.set()
        if self._waiting or self._kept or self.down:
            self._plan()

    def _succeeded(self, batch: list[Write], outcome: _Outcome) -> None:
        for place, error in reversed(outcome.bad):
            one = batch.pop(place)
            self.numbers.dropped += len(one.rows)
            _log.error("Rows of %s were dropped: %s", _names(one), error)
            if one.waited_for():
                self._tell(one, error)
        for one in batch:
            if one.future is not None and not one.future.done():
                one.future.set_result(None)
            self.numbers.rows += len(one.rows)
        self.numbers.commits += 1
        self.numbers.commit_s += outcome.took_s
        if self.why is not None:
            self.why, self._dropping, self._well_s = None, False, monotonic()
            _log.warning("The ledger is written again; %d rows are still to be written.", self.waiting_rows)
            self._well_again()

    def _failed(self, error: LedgerDown) -> None:
        if self.why is None:
            what = "go on, and their rows are kept in memory" if self._serve else "are refused"
            _log.error("The ledger cannot be written, and requests %s: %s", what, error)
        # Also where it is well now and then, for a moment, it is asked less and less often.
        long_well = self.why is None and monotonic() - self._well_s > _LONG_S
        self._pause_s = _FIRST_PAUSE_S if long_well else min(_LONGEST_PAUSE_S, 2 * self._pause_s)
        self.why = error

    def _tell(self, one: Write, error: LedgerDown) -> None:
        """Tell whoever waits that it was in vain."""
        if one.future is None:
            return
        if one.future.cancelled():
            one.kept = not one.insisted  # nobody is left to do anything about it
        elif one.future.done():
            return
        elif self._serve and not one.insisted:
            one.kept = True
            one.future.set_result(None)
        else:
            one.future.set_exception(error)

    def _keep(self, one: Write, put: Callable[[Write], None]) -> None:
        put(one)
        self._kept_rows += one.size
        while self._kept_rows > self._most_kept_rows:
            oldest = self._kept.popleft()
            self._kept_rows -= oldest.size
            if not self._dropping:
                _log.error("Too many rows wait for the ledger: from %s on the oldest are lost.", _names(oldest))
            self._dropping = True
            self.numbers.dropped += len(oldest.rows)


def _names(one: Write) -> str:
    """Return the keys of what is to be written, for an operator."""
    return ", ".join(":".join(str(getattr(row, part)) for part in row.KEY) for row in one.rows[:3])
