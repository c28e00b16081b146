"""What happens to one request, and in which order? The second file to read, after `docs/architecture.md`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from time import monotonic, time
from typing import Any, Literal, TypeVar

import msgspec

from backends.backend import BackendFault, Call, Endpoint, Overloaded, Rejected, TimedOut, Unreachable
from gateway.admission import Admission
from gateway.allowance import Allowance, Asking, used, user_digest
from gateway.bodies import BodyReader
from gateway.body import Asked, Body
from gateway.decision import AttemptRecord, Decision, DecisionStore, Header, answer_headers, summary
from gateway.driver import Full, Line, Mailbox, Run, drive
from gateway.errors import Refusal
from gateway.fleet import Fleet, Scores
from gateway.http import Receive, Scope, header, new_id, read_raw_body, recognise, request_id, trace_headers
from gateway.keys import LiveKeys
from gateway.log import ExchangeLog
from gateway.metrics import Metrics
from gateway.sinks import Send, Sink, make_sink, send_refusal
from gateway.sizing import Sizes
from gateway.telemetry import Tracing
from gateway.wire import make_tap
from policies.access import Caller
from policies.cost import Price, cost_of
from policies.limits import Facts, Use
from routing.cascade import Commit, Ending, Judged, Left, climb
from routing.ladder import Ladder, Route
from routing.plan import PlannedAttempt, RoutePlan, make_plan

_T = TypeVar("_T")


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """All that exchanges share, built once in `gateway.app` and never changed."""

    config: str
    id_prefix: str
    max_body_bytes: int
    keys: LiveKeys
    ladder: Ladder
    prices: Mapping[str, Price]
    sizes: Sizes
    admission: Admission
    user_header: bytes | None = None
    fleet: Fleet
    bodies: BodyReader
    store: DecisionStore
    metrics: Metrics
    log: ExchangeLog
    tracing: Tracing | None = None


async def exchange(gateway: Gateway, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request."""
    this = _Exchange(gateway, endpoint, scope, receive, send)
    ending: Ending | None = None
    try:
        caller = this.caller = await recognise(gateway.keys, scope)
        raw = await read_raw_body(scope, receive, gateway.max_body_bytes)
        body = await gateway.bodies.read(endpoint, raw)
        route = find_route(gateway.ladder, caller, body.asked.model)
        allowance = await this.admit(caller, route, body)
        plan = make_plan(route, choices=body.asked.choices, down=gateway.fleet.down, tie_break=this.tie_break)
        sink = this.open_sink(body, allowance)
        ending = await this.climb(plan, body, sink, allowance)
        decision = this.decide(ending, plan, body, allowance)
        gateway.store.put(decision)
    except Refusal as refusal:
        await this.refuse(refusal)
        return
    finally:
        this.settle(ending)
    await this.close(ending, decision, sink)
    this.learn(route, body.asked)
    this.tell(decision)


def find_route(ladder: Ladder, caller: Caller, name: str) -> Route:
    """Return the route that `name` stands for. Raises `Refusal`: what is not permitted does not exist."""
    route = ladder.find(name)
    if route is None or not caller.may_ask(name, route.name):
        shown = name if len(name) <= 64 else name[:64] + "…"
        raise Refusal("model_not_found", f"The model '{shown}' does not exist or you may not use it.", param="model")
    return route


class _Exchange:
    """One request's own things: ids, times, runs."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._endpoint = endpoint
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started_s = monotonic()
        self._created_at = time()
        self._exchange_id = new_id(gateway.id_prefix)
        self._request_id = request_id(scope) or self._exchange_id.encode()
        self._runs: list[Run] = []
        self._note_wanted = header(scope, b"x-tierway-include")
        self._mailbox = Mailbox()
        self._watcher: asyncio.Task[None] | None = None
        self._allowance: Allowance | None = None
        self._ending: Ending | None = None
        self.caller: Caller | None = None

    @property
    def tie_break(self) -> int:
        """A number that differs between exchanges and is the same whenever this one is planned again."""
        return int(self._exchange_id[-4:], 16)

    @property
    def _headers(self) -> list[Header]:
        return [
            (b"x-request-id", self._request_id),
            (b"x-tierway-exchange-id", self._exchange_id.encode()),
            (b"x-tierway-config", self._gateway.config.encode()),
        ]

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error that no backend was asked about."""
        self._gateway.metrics.refused(refusal.code)
        await send_refusal(self._send, refusal, self._headers)
        self._gateway.log.refused(
            request_id=self._request_id.decode(),
            key=None if self.caller is None else self.caller.key,
            path=self._scope["path"],
            code=refusal.code,
            status=refusal.status,
        )

    # -- limits ---------------------------------------------------------------------------------------------------

    async def admit(self, caller: Caller, route: Route, body: Body) -> Allowance:
        """Reserve what the request can come to. Raises `Refusal`."""
        gateway = self._gateway
        named = header(self._scope, gateway.user_header) if gateway.user_header is not None else None
        allowance = self._allowance = Allowance(
            gateway.admission,
            gateway.sizes,
            Asking(
                exchange_id=self._exchange_id,
                caller=caller,
                facts=Facts(
                    key=caller.key,
                    team=caller.team,
                    user=user_digest(caller.user, named, body.asked.user),
                    route=route.name,
                    model=body.asked.model,
                ),
                route=route,
                body=body,
            ),
            self._used,
        )
        await allowance.ask(self._while_here)
        return allowance

    def _used(self) -> Use:
        """Return what was used so far. What a client saw, or was about to see when it left, is what it is shown."""
        shown = next((run for run in self._runs if run.committed_s is not None), None)
        ending = self._ending
        if ending is not None and ending.kind == "abandoned" and shown is None and self._runs:
            shown = self._runs[-1]
        return used(self._runs, self._gateway.sizes, shown)

    async def _while_here(self, waiting: Coroutine[Any, Any, _T]) -> _T:
        task, watcher = asyncio.create_task(waiting), self._watch()
        try:
            await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        if task.cancelled():
            raise Refusal("client_closed_request", "The client left while it waited.")
        return task.result()

    def _watch(self) -> asyncio.Task[None]:
        """Begin to look out for the client's departure."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(_watch(self._receive, self._mailbox))
        return self._watcher

    def settle(self, ending: Ending | None) -> None:
        """Count what was used, give back what was not, and look out for the client no more."""
        self._ending = ending
        if self._watcher is not None:
            self._watcher.cancel()
        if self._allowance is not None:
            self._allowance.settle()

    # -- the answer -----------------------------------------------------------------------------------------------

    def open_sink(self, body: Body, allowance: Allowance) -> Sink:
        """Return the way out that the client asked for."""
        headers = self._known = [*self._headers, *allowance.headers()]
        return make_sink(self._send, headers, stream=body.asked.stream, note_in_usage=self._note_wanted == b"usage")

    async def climb(self, plan: RoutePlan, body: Body, sink: Sink, allowance: Allowance) -> Ending:
        """Drive the cascade, and tell it when the client leaves."""
        gateway, asked = self._gateway, body.asked
        trace = trace_headers(self._scope)
        # vLLM serves the lowest number first.
        engine_priority = -self.caller.priority if self.caller is not None else 0

        def make_line(attempt: PlannedAttempt) -> Line:
            member = gateway.fleet.members[attempt.backend]
            scored = plan.route.judged and _takes_scores(member.scores, asked)
            call = Call(
                endpoint=self._endpoint,
                body=body.for_backend(
                    attempt.model,
                    scored=scored,
                    most_tokens=gateway.sizes.most_answer_tokens(
                        plan.route, attempt.tier, asked, strict=allowance.strict
                    ),
                    priority=engine_priority if member.takes_priority else None,
                    metered=asked.stream and member.facts.software == "vllm",
                ),
                stream=asked.stream,
                headers=trace,
            )
            tap = make_tap(
                asked,
                scored=scored,
                read_tokens=plan.route.hold.tokens,
                prompt_tokens=allowance.prompt_tokens(attempt.tier, attempt.model),
            )
            return Line(
                member.backend,
                call,
                tap,
                partial(gateway.fleet.report, attempt.backend),
                allowance.door(len(self._runs) + 1, attempt.tier),
            )

        def make_head(run: Run, commit: Commit) -> list[Header]:
            spent = [one for one in self._runs if one.ended_s is not None]
            return answer_headers(
                tier=run.attempt.tier,
                model=run.attempt.model,
                attempts=sum(one.full is None for one in self._runs),
                confidence=commit.confidence,
                degraded=commit.degraded,
                cost_nusd=sum(self._cost_nusd(one) for one in spent),
                queued_s=self._queued_s(allowance),
            )

        self._watch()
        gateway.metrics.open_exchanges += 1
        try:
            return await drive(
                climb(plan), sink=sink, mailbox=self._mailbox, runs=self._runs, make_line=make_line, make_head=make_head
            )
        except asyncio.CancelledError:
            # The server stops and waits no longer. What was begun must not look complete.
            if any(run.committed_s is not None for run in self._runs):
                await sink.fail(Refusal("shutting_down", "The gateway is stopping."))
            raise
        finally:
            gateway.metrics.open_exchanges -= 1

    def _queued_s(self, allowance: Allowance) -> float:
        return allowance.waited_s + sum(run.waited_s for run in self._runs)

    def decide(self, ending: Ending, plan: RoutePlan, body: Body, allowance: Allowance) -> Decision:
        """Build the record of what was done."""
        now_s = monotonic()
        judged = {one.id: one for one in ending.judged}
        served = self._runs[ending.committed - 1] if ending.committed is not None else None
        attempts = tuple(self._record(run, judged[run.id], ending, plan.route, now_s) for run in self._runs)
        return Decision(
            exchange_id=self._exchange_id,
            request_id=self._request_id.decode("ascii"),
            key=self.caller.key if self.caller is not None else "",
            team=self.caller.team if self.caller is not None else None,
            endpoint=self._endpoint,
            asked=body.asked.model,
            route=plan.route.name,
            streamed=body.asked.stream,
            ending=ending.kind,
            error=self._error(ending).code if ending.kind in ("broken", "exhausted") else None,
            degraded=ending.degraded,
            tier=served.attempt.tier if served is not None else None,
            model=served.attempt.model if served is not None else None,
            confidence=attempts[served.id - 1].confidence if served is not None else None,
            confidence_kind="raw",
            attempts=attempts,
            created_at=self._created_at,
            queued_s=self._queued_s(allowance),
            first_byte_s=None if served is None else self._since_start_s(served.committed_s),
            total_s=now_s - self._started_s,
            config=self._gateway.config,
        )

    def _record(self, run: Run, judged: Judged, ending: Ending, route: Route, now_s: float) -> AttemptRecord:
        confidence = judged.confidence
        if confidence is None and route.judged:
            confidence = route.estimator.score(run.tap.signals)
        usage = run.usage
        return AttemptRecord(
            number=run.id,
            role="answer",
            tier=run.attempt.tier,
            backend=run.attempt.backend,
            model=run.attempt.model,
            outcome=_outcome(judged, accepted=run.id == ending.committed),
            fault=None if run.fault is None else type(run.fault).__name__,
            fault_detail=None if run.fault is None else str(run.fault),
            confidence=confidence,
            doubt_below=run.attempt.doubt_below,
            usage=usage,
            cost=cost_of(self._gateway.prices[run.attempt.tier], usage),
            started_s=run.started_s - self._started_s,
            first_token_s=self._since_start_s(run.first_token_s),
            ended_s=(run.ended_s or now_s) - self._started_s,
            waited_s=run.waited_s,
        )

    def _since_start_s(self, at_s: float | None) -> float | None:
        return None if at_s is None else at_s - self._started_s

    def _cost_nusd(self, run: Run) -> int:
        return cost_of(self._gateway.prices[run.attempt.tier], run.usage).total_nusd

    async def close(self, ending: Ending, decision: Decision, sink: Sink) -> None:
        """Send the last part of the answer, now that the record is kept."""
        if ending.kind == "answered" and ending.committed is not None:
            tail = self._runs[ending.committed - 1].tail
            note = summary(decision) if self._note_wanted is not None else None
            await sink.end(tail, self._final_headers(decision), note)
        elif ending.kind == "broken":
            await sink.fail(self._error(ending))
        elif ending.kind == "exhausted":
            await send_refusal(self._send, self._error(ending), [*self._known, *self._final_headers(decision)])

    def _final_headers(self, decision: Decision) -> list[Header]:
        return answer_headers(
            tier=decision.tier,
            model=decision.model,
            attempts=decision.calls,
            confidence=decision.confidence,
            degraded=decision.degraded,
            cost_nusd=decision.cost_nusd,
            queued_s=decision.queued_s,
        )

    def _error(self, ending: Ending) -> Refusal:
        if ending.kind == "broken":
            return Refusal("stream_broken", "The model's server broke off in the middle of the answer.")
        full = [run.full for run in self._runs if run.full is not None]
        return refusal_for([run.fault for run in self._runs if run.fault is not None], full)

    def learn(self, route: Route, asked: Asked) -> None:
        """Learn from what servers reported how long prompts and answers are."""
        for run in self._runs:
            usage = run.usage
            if run.ended_s is not None and run.tap.complete and not usage.counted:
                self._gateway.sizes.learn(
                    route,
                    run.attempt.model,
                    asked,
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                )

    def tell(self, decision: Decision) -> None:
        """Render the record for the operator."""
        self._gateway.metrics.decided(decision)
        if decision.error is not None:
            self._gateway.metrics.refused(decision.error)
        self._gateway.log.decided(decision)
        if self._gateway.tracing is not None:
            self._gateway.tracing.decided(decision, dict(trace_headers(self._scope)))


async def _watch(receive: Receive, mailbox: Mailbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.put(Left(monotonic()))


def _takes_scores(scores: Scores, asked: Asked) -> bool:
    return scores == "always" or (scores == "not_with_streamed_tools" and not (asked.stream and asked.tools))


def _outcome(
    judged: Judged, *, accepted: bool
) -> Literal["accepted", "doubted", "failed", "rejected", "full", "cancelled"]:
    if judged.outcome in ("failed", "rejected", "full"):
        return judged.outcome
    if accepted:
        return "accepted" if judged.outcome == "completed" else "cancelled"
    return "doubted" if judged.doubted else "cancelled"


def refusal_for(faults: list[BackendFault], full: Sequence[Full] = ()) -> Refusal:
    """Say why no tier could answer.

    One that is full can answer later, whatever was wrong with the others. A refusal by a backend is the client's to
    mend, so it is told whatever else went wrong; a prompt that is too long only where no larger model failed for
    another reason.
    """
    rejections = [fault for fault in faults if isinstance(fault, Rejected)]
    if full and not rejections:
        soonest_s = min((one.retry_after_s for one in full if one.retry_after_s is not None), default=1)
        return Refusal("overloaded", "Every tier that may answer is full. Try again later.", retry_after_s=soonest_s)
    for fault in rejections:
        if not fault.too_long:
            return _rejection(fault)
    if rejections and len(rejections) == len(faults):
        return _rejection(rejections[-1])
    overloads = [fault for fault in faults if isinstance(fault, Overloaded)]
    if overloads:
        waits = [fault.retry_after_s for fault in overloads if fault.retry_after_s is not None]
        return Refusal(
            "upstream_overloaded",
            "Every model that could answer is busy. Try again later.",
            retry_after_s=max(1, round(min(waits))) if waits else 1,
        )
    if faults and all(isinstance(fault, Unreachable) for fault in faults):
        return Refusal("upstream_unavailable", "No model that may answer can be reached.")
    if faults and any(isinstance(fault, TimedOut) for fault in faults):
        return Refusal("upstream_timeout", "The models took too long to answer.")
    return Refusal("upstream_error", "Every model that was asked failed.")


def _rejection(fault: Rejected) -> Refusal:
    if fault.too_long:
        return Refusal("context_length_exceeded", fault.message, param=fault.param or "messages")
    return Refusal(
        "upstream_rejected",
        fault.message,
        param=fault.param,
        status=fault.status,
        shown_code=fault.code,
        keep_code=False,
    )
