"""How does much travel with little? Operations of one partition, gathered into batches that each are one round trip.

What is put here within one turn of the event loop goes together, and what comes while a batch is under way goes with
the next one. What nobody waits for rides along, or goes by itself a little later.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from gateway.limiter import Closed, Numbers, Order, SoFar
from gateway.limits_script import Answer, Beat
from gateway.redis_store import ConnectionDropped, ServerChanged, StoreDown
from gateway.store_session import Session
from policies.operations import Done, Granted, Operation, Refused

MOST_IN_BATCH = 64
_MOST_BATCHES = 2
_LINGER_S = 0.005

_log = logging.getLogger("tierway.limits")


class Pending:
    """One operation on its way. `due_s`: when its caller must have an answer; 0: as long as a batch may take."""

    __slots__ = ("answer", "due_s", "left", "operation", "order", "so_far")

    def __init__(
        self,
        operation: Operation | Beat,
        order: Order | None = None,
        so_far: SoFar | None = None,
        answer: asyncio.Future[Granted | Refused | Closed | Done] | None = None,
        due_s: float = 0.0,
    ) -> None:
        self.operation = operation
        self.order = order
        self.so_far = so_far
        self.answer = answer
        self.due_s = due_s
        self.left = False


class Batches:
    """The way to the store. `flowing`: whether batches may leave; what is put meanwhile waits.

    Of every batch that leaves, exactly one is told: it was `answered`, it was `not_done` (another server answers, or
    its data is another), it was `not_answered` and why, or it was given back by `abandon`. `beat` gives the sign of
    life that is due, which goes first.
    """

    def __init__(
        self,
        session: Session,
        *,
        beat: Callable[[], Beat | None],
        answered: Callable[[list[Pending], Sequence[Answer]], None],
        not_done: Callable[[list[Pending]], None],
        not_answered: Callable[[list[Pending], str], None],
        numbers: Numbers,
    ) -> None:
        self.flowing = False
        self._session = session
        self._beat = beat
        self._answered = answered
        self._not_done = not_done
        self._not_answered = not_answered
        self._numbers = numbers
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Pending] = deque()
        self._sent: dict[asyncio.Task[None], list[Pending]] = {}
        self._flushing: asyncio.Handle | None = None
        self._at_once = False

    @property
    def busy(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._sent)

    @property
    def waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self._queue)

    def put(self, pending: Pending, *, at_once: bool) -> None:
        """Queue it, to leave at the end of this turn of the loop or, if nobody waits for it, a little later."""
        self._queue.append(pending)
        if self.flowing:
            self._schedule(at_once=at_once)

    def put_back(self, pending: Pending) -> None:
        """Queue it before all others."""
        self._queue.appendleft(pending)

    def take(self) -> list[Pending]:
        """Take everything that is queued."""
        queued = list(self._queue)
        self._queue.clear()
        return queued

    def abandon(self) -> list[list[Pending]]:
        """Wait for no batch any more, and return those under way."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        sent, self._sent = self._sent, {}
        current = asyncio.current_task(self._loop)
        for task in sent:
            if task is not current:
                task.cancel()
        return list(sent.values())

    def flush_soon(self) -> None:
        """Send a batch, even if there is nothing to say but a sign of life."""
        self._schedule(at_once=True)

    async def drain(self, within_s: float) -> None:
        """Wait until everything has left and was answered, but not for ever."""
        give_up_s = self._loop.time() + within_s
        while self.flowing and (self._queue or self._sent) and self._loop.time() < give_up_s:
            self._flush()
            if self._sent:
                await asyncio.wait(list(self._sent), timeout=within_s)

    def _schedule(self, *, at_once: bool) -> None:
        if self._flushing is not None:
            if not at_once or self._at_once:
                return
            self._flushing.cancel()
        self._at_once = at_once
        if at_once:
            self._flushing = self._loop.call_soon(self._flush)
        else:
            self._flushing = self._loop.call_later(_LINGER_S, self._flush)

    def _flush(self) -> None:
        """Send a batch. A second one leaves beside the first only when it is full."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        while self.flowing and len(self._sent) < _MOST_BATCHES:
            if self._sent and len(self._queue) < MOST_IN_BATCH:
                break
            batch = self._next()
            if not batch:
                return
            task = self._loop.create_task(self._send(batch))
            self._sent[task] = batch
            task.add_done_callback(partial(self._ended, batch))
        # What stays behind waits no longer for that.
        due_s = self._loop.time() + self._session.timeout_s
        for pending in self._queue:
            pending.due_s = pending.due_s or due_s

    def _next(self) -> list[Pending]:
        beat = self._beat()
        batch = [] if beat is None else [Pending(beat)]
        queue = self._queue
        while queue and len(batch) < MOST_IN_BATCH:
            pending = queue.popleft()
            if not pending.left:
                batch.append(pending)
        return batch

    async def _send(self, batch: list[Pending]) -> None:
        due_s = self._loop.time() + self._session.timeout_s
        for one in batch:
            if one.due_s and one.due_s < due_s:
                due_s = one.due_s
        try:
            try:
                answers = await self._run(batch, due_s)
            except ConnectionDropped:
                # Every operation may be done twice, and a connection that breaks says little of its server.
                answers = await self._run(batch, due_s)
        except ServerChanged:
            self._over()
            self._not_done(batch)
        except StoreDown as fault:
            self._over()
            self._not_answered(batch, str(fault))
        else:
            self._over()
            self._answered(batch, answers)
        if self._queue:
            self._flush()

    async def _run(self, batch: list[Pending], due_s: float) -> list[Answer]:
        self._numbers.batches += 1
        self._numbers.operations += len(batch)
        return await self._session.run([one.operation for one in batch], within_s=due_s - self._loop.time())

    def _over(self) -> None:
        """Forget the batch of the current task."""
        task = asyncio.current_task()
        if task is not None:
            self._sent.pop(task, None)

    def _ended(self, batch: list[Pending], task: asyncio.Task[None]) -> None:
        """Tell of a batch at which something happened that should not."""
        abandoned = self._sent.pop(task, None) is None
        if task.cancelled():
            if not abandoned:
                self._not_answered(batch, "cancelled")
        elif (fault := task.exception()) is not None:
            _log.error("a batch came to no good end", exc_info=fault)
            self._not_answered(batch, f"{type(fault).__name__}: {fault}")
