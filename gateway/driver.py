"""Who performs what the cascade decides? Starts calls, watches clocks and the client, reports back.

The driver owns every task and timer of an exchange: when `drive` returns or raises, all calls it opened are closed.
Each attempt runs in a task of its own, a *run*; before the commit it holds what comes, after it the run itself writes
to the sink, so that a slow client slows its backend down and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Protocol

import msgspec

from backends.backend import (
    Backend,
    BackendFault,
    Broken,
    Call,
    Rejected,
)
from gateway.decision import Header
from gateway.sinks import Sink
from gateway.wire import Tap, TokenUsage
from routing.cascade import (
    Cancel,
    Climb,
    Command,
    Commit,
    Due,
    Ending,
    Event,
    Finished,
    Keep,
    Outcome,
    Progress,
    Start,
    WakeAt,
)
from routing.plan import PlannedAttempt

# A role and a few empty chunks come before an answer; nothing of this size does.
_MOST_BEFORE_ANSWER_BYTES = 1024 * 1024


class Mailbox:
    """Events on their way to the cascade: many put, one gets."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event; never waits."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Event:
        """Wait for the next event."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()


class Full(Exception):  # noqa: N818 - an outcome like any other
    """The tier has no room for this attempt. `retry_after_s` says when it may have."""

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Door(Protocol):
    """What an attempt on a tier goes through."""

    async def enter(self, usage: Callable[[], TokenUsage]) -> None:
        """Wait for room. Raises `Full`. `usage` tells at any time what the attempt has used."""
        ...

    def leave(self, usage: TokenUsage) -> None:
        """Make room again. Called once for each time it was entered."""
        ...


class Line(msgspec.Struct, frozen=True):
    """What an attempt is made of: whom to ask, what, and how to read the answer. `report` is told how it went.

    `door` is None where the tier takes as many as come.
    """

    backend: Backend
    call: Call
    tap: Tap
    report: Callable[[BackendFault | None], None]
    door: Door | None = None


class Run:
    """One attempt under way: its call, what it holds, and how it went."""

    def __init__(self, id_: int, attempt: PlannedAttempt, line: Line, sink: Sink, mailbox: Mailbox) -> None:
        self.id = id_
        self.attempt = attempt
        self.tap = line.tap
        self.tail: list[bytes] = []
        self.fault: BackendFault | None = None
        self.full: Full | None = None
        self.waited_s = 0.0
        self.started_s = monotonic()
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.committed_s: float | None = None
        self._line = line
        self._sink = sink
        self._mailbox = mailbox
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._committed = False
        self._used: TokenUsage | None = None
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._never_began)

    # -- what the driver does with it -----------------------------------------------------------------------------

    def keep(self) -> None:
        """Read no more until committed or cancelled."""
        self._may_read.clear()

    def cancel(self) -> None:
        """Abort the call."""
        self._task.cancel()

    async def closed(self) -> None:
        """Wait until the call is closed."""
        await asyncio.wait([self._task])

    def raise_own_fault(self) -> None:
        """Raise what no backend can be blamed for."""
        if self._task.done() and not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error

    async def commit(self) -> None:
        """Write what is held, and let the rest through as it comes."""
        self.committed_s = monotonic()
        while self._held:
            data, self._held = b"".join(self._held), []
            await self._sink.write(data)
        self._committed = True
        self._may_read.set()

    # -- its own task ---------------------------------------------------------------------------------------------

    @property
    def usage(self) -> TokenUsage:
        """What it has used so far. One that never began an answer used nothing that could be told."""
        if self._used is not None:
            return self._used
        return self.tap.usage() if self.tap.begun else TokenUsage()

    async def _run(self) -> None:
        outcome: Outcome = "failed"
        inside = False
        try:
            if self._line.door is not None:
                await self._line.door.enter(lambda: self.usage)
                inside = True
                now_s = monotonic()
                self.waited_s, self.started_s = now_s - self.started_s, now_s
            await self._answer()
            outcome = "completed"
        except Full as full:
            self.full, outcome = full, "full"
        except Rejected as fault:
            self.fault, outcome = fault, "rejected"
        except BackendFault as fault:
            self.fault = fault
            if self.tap.complete:
                # What came after the end of the answer, a bill at most, does not make it less of an answer.
                outcome = "completed"
        except asyncio.CancelledError:
            # Nobody awaits this task for its result: a cancelled attempt is an outcome, told like any other.
            outcome = "cancelled"
        finally:
            self._used = self.usage
            self.ended_s = monotonic()
            if inside and self._line.door is not None:
                self._line.door.leave(self.usage)
            if outcome not in ("cancelled", "full"):
                self._line.report(self.fault)
            self._mailbox.put(Finished(self.id, outcome, self.tap.signals, self.ended_s))

    def _never_began(self, _task: asyncio.Task[None]) -> None:
        """End an attempt that was cancelled before its first step: nobody would hear of it otherwise."""
        if self.ended_s is None:
            self.ended_s = monotonic()
            self._mailbox.put(Finished(self.id, "cancelled", self.tap.signals, self.ended_s))

    async def _answer(self) -> None:
        async with self._line.backend.open(self._line.call) as stream:
            async for chunks in stream:
                if self._committed:
                    await self._pass(chunks)
                else:
                    await self._hold(chunks)
        if not self.tap.ended:
            raise Broken("its stream ended before its answer did")

    async def _pass(self, chunks: list[bytes]) -> None:
        tap = self.tap
        out: list[bytes] = []
        try:
            for chunk in chunks:
                passed = tap.feed(chunk)
                if passed is not None:
                    # From the last finish_reason on everything waits for the record: clients stop reading there.
                    (self.tail if tap.complete else out).append(passed)
        finally:
            # Also what came in good order just before a fault.
            if out:
                await self._sink.write(out[0] if len(out) == 1 else b"".join(out))

    async def _hold(self, chunks: list[bytes]) -> None:
        tap = self.tap
        for chunk in chunks:
            passed = tap.feed(chunk)
            # Comments keep a connection alive; nobody waits for those that come before the first byte.
            if passed is not None and not passed.startswith(b":"):
                (self.tail if tap.complete else self._held).append(passed)
                self._held_bytes += len(passed)
        if not tap.begun:
            if self._held_bytes > _MOST_BEFORE_ANSWER_BYTES:
                raise Broken("it sends much, but no answer")
            return
        now_s = monotonic()
        if self.first_token_s is None:
            self.first_token_s = now_s
        if not tap.complete:
            self._mailbox.put(Progress(self.id, tap.signals, self._held_bytes, now_s))
            # The cascade hears of it first; a doubted answer is read no further.
            await asyncio.sleep(0)
        await self._may_read.wait()


LineMaker = Callable[[PlannedAttempt], Line]
HeadMaker = Callable[[Run, Commit], list[Header]]


async def drive(
    climb: Climb, *, sink: Sink, mailbox: Mailbox, runs: list[Run], make_line: LineMaker, make_head: HeadMaker
) -> Ending:
    """Perform `climb` until its ending. `runs` is filled with every attempt, in order."""
    performer = _Performer(sink, mailbox, runs, make_line, make_head)
    try:
        commands = next(climb)
        while True:
            for command in commands:
                await performer.perform(command)
            commands = climb.send(await mailbox.get())
    except StopIteration as stop:
        ending: Ending = stop.value
        for command in ending.last:
            await performer.perform(command)
        for run in runs:
            run.raise_own_fault()
        return ending
    finally:
        await performer.close()


class _Performer:
    def __init__(
        self, sink: Sink, mailbox: Mailbox, runs: list[Run], make_line: LineMaker, make_head: HeadMaker
    ) -> None:
        self._sink = sink
        self._mailbox = mailbox
        self._runs = runs
        self._make_line = make_line
        self._make_head = make_head
        self._timer: asyncio.TimerHandle | None = None

    async def perform(self, command: Command) -> None:
        match command:
            case Start(id_, attempt):
                self._runs.append(Run(id_, attempt, self._make_line(attempt), self._sink, self._mailbox))
            case Commit(id_):
                run = self._runs[id_ - 1]
                await self._sink.begin(partial(self._make_head, run, command))
                await run.commit()
            case Keep(id_):
                self._runs[id_ - 1].keep()
            case Cancel(id_):
                self._runs[id_ - 1].cancel()
            case WakeAt(at_s):
                self._stop_timer()
                delay_s = max(0.0, at_s - monotonic())
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._due)

    def _due(self) -> None:
        self._mailbox.put(Due(monotonic()))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def close(self) -> None:
        """Close every call that is still open, whatever the reason."""
        self._stop_timer()
        for run in self._runs:
            if run.ended_s is None:
                run.cancel()
        for run in self._runs:
            if run.ended_s is None:
                await run.closed()
