"""What happens to one request, and in which order? The second file to read, after `docs/architecture.md`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from time import monotonic, time
from typing import Any, TypeVar

import msgspec

from backends.backend import BackendFault, Call, Endpoint, Overloaded, Rejected, TimedOut, Unreachable
from gateway.admission import Admission
from gateway.allowance import Allowance, Asking, used, user_digest
from gateway.bodies import BodyReader
from gateway.body import Asked, Body
from gateway.deciding import Matter, decision_of
from gateway.decision import Decision, DecisionStore, Header, Payer, answer_headers, summary
from gateway.driver import Full, Line, Mailbox, Run, drive
from gateway.errors import Refusal
from gateway.fleet import Fleet, Scores
from gateway.http import Receive, Scope, header, new_id, read_raw_body, recognise, request_id, trace_headers
from gateway.keys import LiveKeys
from gateway.ledger.billing import bill_of, inputs_of
from gateway.ledger.contract import Ledger, LedgerDown
from gateway.ledger.rows import Bill, DecisionInputRow, DeliveryRow
from gateway.log import ExchangeLog
from gateway.metrics import Metrics
from gateway.pricing import Pricing
from gateway.sinks import Send, Sink, make_sink, send_refusal
from gateway.sizing import Sizes
from gateway.telemetry import Tracing
from gateway.wire import make_tap
from policies.access import Caller
from policies.cost import cost_of
from policies.limits import Facts, Use
from routing.cascade import Commit, Ending, Left, climb
from routing.features import FEATURES, features_of
from routing.ladder import Ladder, Route
from routing.plan import PlannedAttempt, RoutePlan, make_plan

_LONGEST_USER_CHARS = 256

_T = TypeVar("_T")


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """All that exchanges share, built once in `gateway.app` and never changed."""

    config: str
    id_prefix: str
    instance: str = ""
    max_body_bytes: int
    keys: LiveKeys
    ladder: Ladder
    pricing: Pricing
    sizes: Sizes
    admission: Admission
    user_header: bytes | None = None
    fleet: Fleet
    bodies: BodyReader
    ledger: Ledger
    keep_inputs: bool = True
    store: DecisionStore
    metrics: Metrics
    log: ExchangeLog
    tracing: Tracing | None = None


async def exchange(gateway: Gateway, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request."""
    this = _Exchange(gateway, endpoint, scope, receive, send)
    try:
        caller = this.caller = await recognise(gateway.keys, scope)
        this.require_ledger()
        raw = await read_raw_body(scope, receive, gateway.max_body_bytes)
        body = await gateway.bodies.read(endpoint, raw)
        route = find_route(gateway.ladder, caller, body.asked.model)
        allowance = await this.admit(caller, route, body)
        plan = make_plan(route, choices=body.asked.choices, down=gateway.fleet.down, tie_break=this.tie_break)
        sink = this.open_sink(body, allowance)
        ending = await this.climb(plan, body, sink, allowance)
        decision = await this.record(ending)
        this.settle(ending)
        await this.close(ending, decision, sink)
        this.learn(route, body.asked)
        this.tell(decision)
    except Refusal as refusal:
        await this.refuse(refusal)
    except Exception:
        this.cut("internal_error")
        raise
    finally:
        this.leave()


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
        self._prices = gateway.pricing.at(self._created_at)
        self._matter: Matter | None = None
        self._body: Body | None = None
        self._allowance: Allowance | None = None
        self._ending: Ending | None = None
        self._recorded = False
        self._billed_ms = 0
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
        self._gateway.ledger.refuse("" if self.caller is None else self.caller.key, refusal.code)
        await send_refusal(self._send, refusal, self._headers)
        self._gateway.log.refused(
            request_id=self._request_id.decode(),
            key=None if self.caller is None else self.caller.key,
            path=self._scope["path"],
            code=refusal.code,
            status=refusal.status,
        )

    def require_ledger(self) -> None:
        """Raise `Refusal` while the bill of another request could not be written."""
        if not self._gateway.ledger.accepting:
            raise _no_ledger()

    # -- limits ---------------------------------------------------------------------------------------------------

    async def admit(self, caller: Caller, route: Route, body: Body) -> Allowance:
        """Reserve what the request can come to. Raises `Refusal`."""
        gateway = self._gateway
        named = header(self._scope, gateway.user_header) if gateway.user_header is not None else None
        digest = user_digest(caller.user, named, body.asked.user)
        self._body = body
        self._matter = Matter(
            exchange_id=self._exchange_id,
            request_id=self._request_id.decode("ascii"),
            payer=Payer(
                key=caller.key,
                team=caller.team,
                user=caller.user or (named or b"").decode("utf-8", "replace")[:_LONGEST_USER_CHARS] or body.asked.user,
                user_digest=digest,
                tags=caller.tags,
                metadata=caller.metadata,
            ),
            endpoint=self._endpoint,
            asked=body.asked.model,
            streamed=body.asked.stream,
            route=route,
            prices=self._prices,
            config=gateway.config,
            created_at=self._created_at,
            started_s=self._started_s,
        )
        allowance = self._allowance = Allowance(
            gateway.admission,
            gateway.sizes,
            Asking(
                exchange_id=self._exchange_id,
                caller=caller,
                facts=Facts(
                    key=caller.key,
                    team=caller.team,
                    user=digest,
                    route=route.name,
                    model=body.asked.model,
                ),
                route=route,
                body=body,
                prices=self._prices,
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
        return used(self._runs, self._prices, shown)

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
        """Count what was used, and give back what was not."""
        self._ending = ending
        if self._allowance is not None:
            # At the very time of the bill: what the store counts in a window is what the ledger has in it.
            self._allowance.settle(self._billed_ms)

    def leave(self) -> None:
        """Owe nobody anything, however it went: a bill that nobody waits for is written all the same."""
        if self._watcher is not None:
            self._watcher.cancel()
        # What is still open here is cut by the server, which stops.
        self.cut("shutting_down")
        self.settle(self._ending)

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
                context_tokens=gateway.sizes.window(attempt.tier, attempt.backend),
            )
            return Line(
                member.backend,
                call,
                tap,
                partial(gateway.fleet.report, attempt.backend),
                allowance.door(len(self._runs) + 1, attempt),
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
        gateway.ledger.begin(self._exchange_id, self._bill_so_far)
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

    # -- the record -----------------------------------------------------------------------------------------------

    async def record(self, ending: Ending) -> Decision:
        """Build the record of what was done, and have it kept before the client hears the end."""
        error = self._error(ending).code if ending.kind in ("broken", "exhausted") else None
        decision = self._decided(ending, error)
        try:
            await self._gateway.ledger.write(self._final_bill(decision))
        except LedgerDown:
            if ending.kind == "answered":
                decision = msgspec.structs.replace(decision, ending="broken", error=_no_ledger().code)
            self._gateway.ledger.write_later(self._final_bill(decision))
        self._recorded = True
        self._gateway.store.put(decision)
        return decision

    def cut(self, error: str) -> None:
        """Record an exchange that neither ended nor will, if there is anything to record."""
        if self._recorded or self._matter is None:
            return
        self._recorded = True
        if not self._runs:
            self._gateway.ledger.forget(self._exchange_id)
            return
        decision = msgspec.structs.replace(self._decided(None, error), ending="broken")
        self._gateway.ledger.write_later(self._final_bill(decision))
        self._gateway.store.put(decision)
        self.tell(decision)

    def _decided(self, ending: Ending | None, error: str | None) -> Decision:
        if self._matter is None or self._allowance is None:
            raise TypeError("nothing was asked yet")
        return decision_of(
            self._matter,
            self._runs,
            ending,
            error=error,
            queued_s=self._queued_s(self._allowance),
            now_s=monotonic(),
        )

    def _bill(self, decision: Decision, inputs: DecisionInputRow | None = None) -> Bill:
        gateway = self._gateway
        return bill_of(
            decision,
            instance=gateway.instance,
            now_ms=int(time() * 1000),
            price_row=gateway.pricing.row,
            inputs=inputs,
        )

    def _final_bill(self, decision: Decision) -> Bill:
        gateway, body = self._gateway, self._body
        inputs = None
        if gateway.keep_inputs and body is not None:
            inputs = inputs_of(
                decision,
                feature_version=FEATURES,
                features=features_of(body.rest),
                facts=body.asked,
                down=sorted(gateway.fleet.down),
            )
        bill = self._bill(decision, inputs)
        self._billed_ms = bill.exchange.settled_ms
        return bill

    def _bill_so_far(self) -> Bill:
        return self._bill(self._decided(None, None))

    def _cost_nusd(self, run: Run) -> int:
        return cost_of(self._prices.backends[run.attempt.backend], run.usage).total_nusd

    # -- the end --------------------------------------------------------------------------------------------------

    async def close(self, ending: Ending, decision: Decision, sink: Sink) -> None:
        """Send the last part of the answer, now that the record is kept."""
        if decision.ending != ending.kind:
            await sink.fail(_no_ledger())
        elif ending.kind == "answered" and ending.committed is not None:
            tail = self._runs[ending.committed - 1].tail
            note = summary(decision) if self._note_wanted is not None else None
            await sink.end(tail, self._final_headers(decision), note)
        elif ending.kind == "broken":
            await sink.fail(self._error(ending))
        elif ending.kind == "exhausted":
            await send_refusal(self._send, self._error(ending), [*self._known, *self._final_headers(decision)])
        here = self._watcher is not None and not self._watcher.done()
        self._gateway.ledger.deliver(
            DeliveryRow(
                exchange_id=self._exchange_id,
                delivered=int(here and decision.ending == "answered"),
                total_us=round((monotonic() - self._started_s) * 1e6),
            )
        )

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


def _no_ledger() -> Refusal:
    return Refusal(
        "ledger_unavailable", "The bill of a request cannot be written now. Try again later.", retry_after_s=1
    )


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
