"""How does the operator ask what was spent? `GET /admin/costs`: what `tierway cost` says, as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.errors import Refusal
from gateway.ledger.asking import Desk
from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.report_forecast import forecast_month
from gateway.ledger.report_forms import as_json
from gateway.ledger.report_query import BadOption, Idle, Query, query_of
from gateway.ledger.reports import TooMuch, read_report

_WORDS = ("since", "until", "by", "bucket", "timezone")
_IDLE: tuple[Idle, ...] = ("nobody", "teams", "requests")
_MOST_LINES = 10_000
_AT_ONCE = 2
_LONGEST_S = 60.0


class CostAdmin:
    """The route, over a store. `idle` is who bears idle GPUs where a request does not say."""

    def __init__(self, store: Store, *, idle: Idle = "nobody", now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._idle = idle
        self._now = now
        # A report takes a core for seconds; requests are what the machine is for.
        self._desk = Desk(_AT_ONCE, longest_s=_LONGEST_S)

    def routes(self) -> list[BaseRoute]:
        """Return what goes to `admin_app(..., more_routes=)`."""
        return [Route("/admin/costs", self._costs, methods=["GET"])]

    async def _costs(self, request: Request) -> Response:
        words = {}
        for name in request.query_params:
            if name not in (*_WORDS, "filter", "idle", "top", "forecast"):
                raise _invalid(
                    name[:40], f"there is no such parameter; known are {', '.join(_WORDS)}, filter, idle, top, forecast"
                )
            if name != "filter" and len(request.query_params.getlist(name)) > 1:
                raise _invalid(name, "it is given twice")
            words[name] = request.query_params[name]
        now_ms = int(self._now() * 1000)
        idle = next((one for one in _IDLE if one == words.get("idle", self._idle)), None)
        if idle is None:
            raise _invalid("idle", f"expected one of {', '.join(_IDLE)}")
        top = _number("top", words.get("top"), 1, _MOST_LINES)
        forecast = words.get("forecast", "false")
        if forecast not in ("true", "false"):
            raise _invalid("forecast", "expected true or false")
        try:
            query = query_of(
                {name: words[name] for name in _WORDS if name in words},
                filters=request.query_params.getlist("filter"),
                now_ms=now_ms,
                idle=idle,
            )
        except BadOption as bad:
            raise _invalid(bad.option, bad.message) from None
        content = await self._read(lambda: self._report(query, top, now_ms if forecast == "true" else None))
        return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")

    async def _read(self, report: Callable[[], bytes]) -> bytes:
        try:
            return await self._desk.ask(report)
        except LedgerDown as down:
            raise Refusal("ledger_unavailable", f"The ledger cannot be read now: {down}") from None
        except TimeoutError:
            raise Refusal(
                "ledger_unavailable",
                f"The report was not ready within {_LONGEST_S:g} seconds. Ask for a shorter period.",
            ) from None
        except TooMuch as much:
            raise _invalid("by", str(much)) from None

    def _report(self, query: Query, top: int | None, now_ms: int | None) -> bytes:
        # All groups are needed to tell which are the dearest, so a limit of lines is one of groups then.
        report = read_report(self._store, query, most_lines=_MOST_LINES if top is None else 10 * _MOST_LINES)
        lines = report.lines if top is None else sorted(report.lines, key=lambda line: -line.cost_nusd)[:top]
        month = None if now_ms is None else forecast_month(self._store, query, now_ms=now_ms)
        return as_json(report, lines=lines, forecast=month)


def _number(name: str, text: str | None, least: int, most: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and least <= int(text) <= most):
        raise _invalid(name, f"expected a number from {least} to {most}")
    return int(text)


def _invalid(name: str, message: str) -> Refusal:
    return Refusal("invalid_value", f"Invalid '{name}': {message}.", param=name)
