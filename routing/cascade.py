"""Is this answer good enough, and if not, what now? One request's climb through its plan.

`climb` is a synchronous generator: commands go out, events come in, an `Ending` is returned. It never waits, reads no
clock and knows no network; whoever drives it performs the commands and reports what happens. What it promises:

* At most one attempt is ever committed, and what was committed is never switched.
* Every started attempt ends in exactly one outcome, losers included, before the ending.
* A doubted answer is kept, paused, until the next tier has its first token; if nothing above can answer, the best
  kept answer is served after all, as degraded. There is no answer only when no tier could give one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from math import inf
from typing import Literal

import msgspec

from routing.confidence import Signals
from routing.plan import PlannedAttempt, RoutePlan

# -- commands ---------------------------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True):
    """Make this call."""

    id: int
    attempt: PlannedAttempt


class Keep(msgspec.Struct, frozen=True):
    """Pause this attempt: read no more of it than it already holds."""

    id: int


class Commit(msgspec.Struct, frozen=True):
    """Let this attempt through to the client, from its first byte."""

    id: int
    confidence: float | None
    degraded: bool


class Cancel(msgspec.Struct, frozen=True):
    """Abort this attempt. It still ends in a `Finished`."""

    id: int


class WakeAt(msgspec.Struct, frozen=True):
    """Send a `Due` at this time."""

    at_s: float


Command = Start | Keep | Commit | Cancel | WakeAt

# -- events -----------------------------------------------------------------------------------------------------------

Outcome = Literal["completed", "failed", "rejected", "full", "cancelled"]
"""`full`: the tier had no room, and nobody was asked."""


class Progress(msgspec.Struct, frozen=True):
    """More of an answer came in: all that is known of it so far, and how many bytes of it are held."""

    id: int
    signals: Signals
    held_bytes: int
    now_s: float


class Finished(msgspec.Struct, frozen=True):
    """An attempt is over. `signals` are those of everything that came."""

    id: int
    outcome: Outcome
    signals: Signals
    now_s: float


class Due(msgspec.Struct, frozen=True):
    """The time of a `WakeAt` has come."""

    now_s: float


class Left(msgspec.Struct, frozen=True):
    """The client has gone."""

    now_s: float


Event = Progress | Finished | Due | Left

# -- ending -----------------------------------------------------------------------------------------------------------


class Judged(msgspec.Struct, kw_only=True):
    """What became of one attempt."""

    id: int
    attempt: PlannedAttempt
    confidence: float | None = None
    doubted: bool = False
    outcome: Outcome | None = None


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How the climb went.

    `answered`: the committed attempt reached its end. `broken`: it did not. `exhausted`: nothing could be committed.
    `abandoned`: the client left first. `last` are commands that are still to be performed; no event follows them.
    """

    kind: Literal["answered", "broken", "exhausted", "abandoned"]
    judged: tuple[Judged, ...]
    last: tuple[Command, ...] = ()
    committed: int | None = None
    degraded: bool = False


Climb = Generator[tuple[Command, ...], Event, Ending]

# `conceded`: accepted after all, without a threshold.
_Verdict = Literal["accepted", "conceded", "doubted", "failed", "rejected", "full", "left"]


def climb(plan: RoutePlan) -> Climb:
    """Climb `plan` until an answer is accepted, or nothing is left to try."""
    return _Climber(plan).run()


class _Climber:
    """The state of one climb. Only `run` and what it delegates to yield."""

    def __init__(self, plan: RoutePlan) -> None:
        self._plan = plan
        self._route = plan.route
        self._judged: list[Judged] = []
        self._open: set[int] = set()
        self._kept: list[int] = []
        self._cancelled: set[int] = set()
        self._refused_by: set[int] = set()
        self._asked_again_to = 0
        self._out: list[Command] = []

    def run(self) -> Climb:
        verdict: _Verdict = "failed"
        for attempts in (self._plan.attempts, self._plan.last_resort):
            verdict = yield from self._ascend(attempts)
            if verdict == "failed" and not self._kept:
                verdict = yield from self._ask_again()
            # Backends that are believed dead are not worth a wait while a doubted answer can be served.
            if verdict != "failed" or self._kept:
                break
        if verdict == "failed" and not self._kept:
            verdict = yield from self._await_cancelled()
        if verdict == "left":
            return (yield from self._close("abandoned"))
        if verdict in ("accepted", "conceded"):
            return (yield from self._serve(self._judged[-1], degraded=verdict == "conceded"))
        if self._kept:
            best = max((self._judged[id_ - 1] for id_ in self._kept), key=_rank)
            return (yield from self._serve(best, degraded=True))
        return (yield from self._close("exhausted"))

    def _ascend(self, attempts: tuple[PlannedAttempt, ...]) -> Generator[tuple[Command, ...], Event, _Verdict]:
        """Try attempts in order. A doubt, a refusal or no room goes to the next tier, a failure to the next backend."""
        lowest = 0
        for number, attempt in enumerate(attempts):
            if attempt.rung < lowest or attempt.rung in self._refused_by:
                continue
            verdict = yield from self._try(attempt)
            if verdict in ("accepted", "left"):
                return verdict
            if verdict == "failed":
                continue
            lowest = attempt.rung + 1
            if verdict in ("rejected", "full"):
                self._refused_by.add(attempt.rung)
            if verdict == "doubted":
                above = any(later.rung >= lowest for later in attempts[number + 1 :])
                self._set_aside(self._judged[-1], keep=self._route.keep_doubted or not above)
        return "failed"

    def _set_aside(self, judged: Judged, *, keep: bool) -> None:
        judged.doubted = True
        # A complete answer costs nothing to keep.
        if keep or judged.id not in self._open:
            self._kept.append(judged.id)
            if judged.id in self._open:
                self._out.append(Keep(judged.id))
        else:
            self._cancel([judged.id])

    def _try(self, attempt: PlannedAttempt) -> Generator[tuple[Command, ...], Event, _Verdict]:
        """Start one attempt and watch it until it can be judged."""
        judged = self._start(attempt)
        latest: Progress | None = None
        deadline_s = inf
        while True:
            event = yield from self._next()
            if isinstance(event, Left):
                return "left"
            if isinstance(event, Finished):
                if event.id != judged.id:
                    continue
                if event.outcome != "completed":
                    return event.outcome if event.outcome in ("rejected", "full") else "failed"
                self._release_kept()
                return self._judge(judged, event.signals)
            if isinstance(event, Progress):
                if event.id != judged.id:
                    continue
                if latest is None:
                    self._release_kept()
                    if attempt.doubt_below is not None:
                        deadline_s = event.now_s + self._route.hold.time_s
                        self._out.append(WakeAt(deadline_s))
                latest = event
            if latest is not None and (
                attempt.doubt_below is None or self._ready(latest, time_up=event.now_s >= deadline_s)
            ):
                return self._judge(judged, latest.signals)

    def _ready(self, latest: Progress, *, time_up: bool) -> bool:
        """Whether enough of every choice is there. Reasoning alone is never enough, unless memory runs out."""
        hold = self._route.hold
        if latest.held_bytes >= hold.size_bytes:
            return True
        if len(latest.signals) < self._plan.choices and not time_up:
            return False
        tokens = 1 if time_up else hold.tokens
        return all(choice.finished or choice.answer_tokens >= tokens for choice in latest.signals.values())

    def _judge(self, judged: Judged, signals: Signals) -> _Verdict:
        judged.confidence = self._route.estimator.score(signals)
        threshold = judged.attempt.doubt_below
        if threshold is None:
            return "accepted"
        if judged.confidence is None:
            return "doubted" if self._route.doubt_unknown else "accepted"
        return "doubted" if judged.confidence < threshold else "accepted"

    def _ask_again(self) -> Generator[tuple[Command, ...], Event, _Verdict]:
        """Every tier above a doubt failed and nothing was kept: the cheapest that did answer is asked once more.

        Where that fails now, so are the backends of its tier that were not needed before.
        """
        doubted = [one.attempt for one in self._judged[self._asked_again_to :] if one.doubted]
        rungs = {attempt.rung for attempt in doubted}
        known = {(one.attempt.rung, one.attempt.backend) for one in self._judged}
        spare = [one for one in self._plan.attempts if one.rung in rungs and (one.rung, one.backend) not in known]
        for attempt in sorted(doubted + spare, key=lambda one: one.rung):
            verdict = yield from self._try(msgspec.structs.replace(attempt, doubt_below=None))
            if verdict == "left":
                return verdict
            if verdict == "accepted":
                return "conceded"
        self._asked_again_to = len(self._judged)
        return "failed"

    def _await_cancelled(self) -> Generator[tuple[Command, ...], Event, _Verdict]:
        """Nothing is left but cancelled attempts: one of them may have been complete before it heard of that."""
        while self._open:
            event = yield from self._next()
            if isinstance(event, Left):
                return "left"
        return "failed"

    def _serve(self, judged: Judged, *, degraded: bool) -> Climb:
        """Commit `judged` and see it to its end."""
        self._kept = [id_ for id_ in self._kept if id_ != judged.id]
        self._cancel(self._kept)
        self._out.append(Commit(judged.id, judged.confidence, degraded))
        if judged.id not in self._open and judged.outcome == "completed":
            return (yield from self._close("answered", judged, degraded=degraded))
        while True:
            event = yield from self._next()
            if isinstance(event, Left):
                return (yield from self._close("abandoned", judged, degraded=degraded))
            if isinstance(event, Finished) and event.id == judged.id:
                kind: Literal["answered", "broken"] = "answered" if event.outcome == "completed" else "broken"
                return (yield from self._close(kind, judged, degraded=degraded))

    def _close(
        self,
        kind: Literal["answered", "broken", "exhausted", "abandoned"],
        committed: Judged | None = None,
        *,
        degraded: bool = False,
    ) -> Climb:
        """Cancel what is still open, wait for its outcomes, and say how it went."""
        self._cancel(sorted(self._open))
        while self._open:
            yield from self._next()
        return Ending(
            kind=kind,
            last=tuple(self._out),
            judged=tuple(self._judged),
            committed=None if committed is None else committed.id,
            degraded=degraded,
        )

    def _start(self, attempt: PlannedAttempt) -> Judged:
        judged = Judged(id=len(self._judged) + 1, attempt=attempt)
        self._judged.append(judged)
        self._open.add(judged.id)
        self._out.append(Start(judged.id, attempt))
        return judged

    def _release_kept(self) -> None:
        """Something better has begun: let go the doubted answers still being written. Complete ones cost nothing."""
        self._cancel([id_ for id_ in self._kept if id_ in self._open])

    def _cancel(self, ids: Iterable[int]) -> None:
        gone = self._open.intersection(ids)
        if not gone:
            return
        self._out.extend(Cancel(id_) for id_ in sorted(gone - self._cancelled))
        self._cancelled |= gone
        self._kept = [id_ for id_ in self._kept if id_ not in gone]

    def _next(self) -> Generator[tuple[Command, ...], Event, Event]:
        """Hand out what is to be done, take one event in and note outcomes."""
        out, self._out = tuple(self._out), []
        event = yield out
        if isinstance(event, Finished) and event.id in self._open:
            self._open.discard(event.id)
            judged = self._judged[event.id - 1]
            judged.outcome = event.outcome
            if event.outcome != "completed":
                self._kept = [id_ for id_ in self._kept if id_ != event.id]
            elif judged.doubted and event.id not in self._kept:
                self._kept.append(event.id)
        return event


def _rank(judged: Judged) -> tuple[bool, float]:
    return (judged.confidence is not None, judged.confidence or 0.0)
