"""How does a person read a report? As a table that is aligned, with a line of totals and some plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from gateway.ledger.report_forecast import MonthForecast
from gateway.ledger.report_forms import moment, notes
from gateway.ledger.reports import Line, Report
from policies.cost import usd

_NUSD = 1_000_000_000
_WIDEST = 40
_HEADS = ("requests", "answered", "calls", "tokens in", "tokens out", "cost $", "wasted $", "saved $", "$ an answer")


def as_table(report: Report, *, lines: Sequence[Line] | None = None, forecast: MonthForecast | None = None) -> str:
    """Render a report for a terminal."""
    return "\n".join((*_table(report, lines), *_sentences(report, forecast))) + "\n"


def _table(report: Report, lines: Sequence[Line] | None) -> Iterator[str]:
    query = report.query
    shown = report.lines if lines is None else lines
    period = f"{moment(query.since_ms, query.zone)} to {moment(query.until_ms, query.zone)}"
    yield f"{period}, {query.timezone}"
    yield ""
    if not report.total.exchanges and not report.lines:
        yield "Nothing was asked in this time."
        return
    named: list[str] = [*([query.bucket] if query.bucket else []), *query.by]
    # All amounts of a column have as many places as the largest one needs.
    places = _places(report.total.cost_nusd)
    rows = [(*_named(report, line), *_figures(line, places)) for line in shown]
    total = (*(["total"] + [""] * len(named))[: max(1, len(named))], *_figures(report.total, places))
    heads = (
        *(named or [""]),
        *(f"{one} + idle" if one == "cost $" and report.total.idle_nusd else one for one in _HEADS),
    )
    if not named:
        rows = []
    widths = [max(len(row[place]) for row in (heads, *rows, total)) for place in range(len(heads))]
    texts = max(1, len(named))

    def put(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    yield put(heads)
    yield "  ".join("-" * width for width in widths)
    yield from map(put, rows)
    left = len(report.lines) - len(shown)
    if left:
        yield f"({left} more)"
    if rows:
        yield "  ".join("-" * width for width in widths)
    yield put(total)


def _named(report: Report, line: Line) -> list[str]:
    query = report.query
    names = [name if name is not None else "-" for name in line.names]
    shown = ["".join(one if one.isprintable() else "?" for one in name) for name in names]
    shown = [name if len(name) <= _WIDEST else name[: _WIDEST - 1] + "…" for name in shown]
    if query.bucket is None or line.start_ms is None:
        return shown
    at = datetime.fromtimestamp(line.start_ms / 1000, UTC).astimezone(query.zone)
    form = {"hour": "%Y-%m-%d %H:%M", "day": "%Y-%m-%d", "month": "%Y-%m"}[query.bucket]
    return [at.strftime(form), *shown]


def _figures(line: Line, places: int) -> list[str]:
    cost = _money(line.cost_nusd, places) + (f" + {_money(line.idle_nusd, places)}" if line.idle_nusd else "")
    return [
        f"{line.exchanges:,}",
        "-" if not line.exchanges else f"{100 * line.answered / line.exchanges:.1f} %",
        f"{line.calls:,}",
        f"{line.prompt_tokens:,}",
        f"{line.completion_tokens:,}",
        cost,
        _money(line.wasted_nusd, places),
        _money(line.savings_nusd, places),
        "-" if line.cost_per_answer_nusd is None else _money(line.cost_per_answer_nusd, 9 if places > 6 else 6),
    ]


def _places(nusd: int) -> int:
    """Return how many decimal places show four digits of an amount or more: cents of what is hundreds of dollars."""
    dollars = abs(nusd) / _NUSD
    return 2 if dollars >= 100 else 4 if dollars >= 1 else 6 if dollars >= 0.01 else 9


def _money(nusd: int, places: int) -> str:
    """Return dollars, rounded half to even; only for people."""
    step = 10 ** (9 - places)
    whole, rest = divmod(abs(nusd), step)
    whole += rest * 2 > step or (rest * 2 == step and whole % 2)
    dollars, part = divmod(whole, 10**places)
    return f"{'-' if nusd < 0 and whole else ''}{dollars:,}.{part:0{places}d}"


def _sentences(report: Report, forecast: MonthForecast | None) -> Iterator[str]:
    total = report.total
    yield ""
    if total.baseline_nusd:
        saved = total.savings_nusd
        share = f"{100 * abs(saved) / total.baseline_nusd:.0f} %"
        came = f"${_money(abs(saved), _places(saved))} ({share}) {'was saved' if saved >= 0 else 'more was spent'}"
        dearest = f"${_money(total.baseline_nusd, _places(total.baseline_nusd))}"
        yield f"The dearest tier of each route alone would have cost {dearest}: {came}."
    yield from notes(report)
    for one in report.servers:
        parts = ", ".join(f"{name} ${usd(getattr(one, f'{name}_nusd'))}" for name in ("shares", "idle", "outside"))
        yield f"Server {one.backend}: {one.hours} closed hours for ${usd(one.hour_nusd)}: {parts}."
    if report.refused:
        yield "Refused: " + ", ".join(f"{one.requests:,} {one.code}" for one in report.refused) + "."
    if forecast is not None:
        yield _forecast(forecast)


def _forecast(month: MonthForecast) -> str:
    found = month.forecast
    if not found.hours:
        return "There is nothing to forecast from."
    places = _places(found.expected_nusd)
    low, high = _money(found.low_nusd, places), _money(found.high_nusd, places)
    return (
        f"By the end of the month: ${_money(found.expected_nusd, places)} "
        f"(four times of five ${low} to ${high}), of which ${_money(found.spent_nusd, places)} is spent; "
        f"learned from {found.hours} hours."
    )
