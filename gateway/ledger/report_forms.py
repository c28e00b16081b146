"""How is a report shown? As JSON, CSV and parquet for machines, as a table for people.

Money is exact for machines: decimal dollars with up to nine places, written from integer nano-dollars. Names go into
CSV so that no spreadsheet takes one for a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import BinaryIO

import msgspec

from gateway.ledger.report_forecast import MonthForecast
from gateway.ledger.reports import Line, Report
from policies.cost import usd

Cell = str | int | None
Record = dict[str, Cell]

COUNTS = (
    "exchanges",
    "answered",
    "failed",
    "calls",
    "estimated",
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
)
MONEY = (
    "input",
    "cached_input",
    "output",
    "gpu",
    "adjusted",
    "cost",
    "cost_per_answer",
    "wasted",
    "baseline",
    "savings",
    "provisional",
    "idle",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
HONEST = (
    "The tokens of the answers that were shown were repriced: a larger model might have answered longer or shorter."
)


class NoParquet(Exception):  # noqa: N818 - the message says what to do
    """The library that writes parquet is not installed."""


def records(report: Report) -> list[Record]:
    """Return the lines: `start` where there are buckets, the dimensions, counts, and money in dollars as text."""
    return [record(report, line) for line in report.lines]


def record(report: Report, line: Line) -> Record:
    """Return one line, or the total."""
    named: Record = {}
    if report.query.bucket is not None and line.start_ms is not None:
        named["start"] = moment(line.start_ms, report.query.zone)
    named |= zip(report.query.by, line.names, strict=False)
    named |= {name: getattr(line, name) for name in COUNTS}
    named |= {f"{name}_usd": _usd(getattr(line, f"{name}_nusd")) for name in MONEY}
    return named


def as_json(report: Report, *, forecast: MonthForecast | None = None, lines: Sequence[Line] | None = None) -> bytes:
    """Render a report whole, or only some of its lines."""
    query = report.query
    shown = report.lines if lines is None else lines
    content: dict[str, object] = {
        "object": "tierway.costs",
        "since": moment(query.since_ms, query.zone),
        "until": moment(query.until_ms, query.zone),
        "timezone": query.timezone,
        "by": query.by,
        "bucket": query.bucket,
        "filters": {one.dimension: one.values for one in query.filters},
        "idle": query.idle,
        "data": [record(report, line) for line in shown],
        "total": record(report, report.total),
        "servers": [
            {
                "backend": one.backend,
                "tier": one.tier,
                "closed_hours": one.hours,
                "busy_s": one.busy_ms / 1000,
                **{f"{part}_usd": usd(getattr(one, f"{part}_nusd")) for part in ("hour", "shares", "idle", "outside")},
            }
            for one in report.servers
        ],
        "idle_left_usd": usd(report.idle_left_nusd),
        "outside_usd": usd(report.outside_nusd),
        "refused": None if report.refused is None else {one.code: one.requests for one in report.refused},
        "notes": notes(report),
    }
    if forecast is not None:
        content["forecast"] = forecast_record(forecast, query.zone)
    return msgspec.json.encode(content)


def forecast_record(month: MonthForecast, zone: tzinfo) -> dict[str, object]:
    """Return a forecast in the words of the reports."""
    found = month.forecast
    return {
        "since": moment(month.since_ms, zone),
        "until": moment(month.until_ms, zone),
        "spent_usd": usd(found.spent_nusd),
        "expected_usd": usd(found.expected_nusd),
        "low_usd": usd(found.low_nusd),
        "high_usd": usd(found.high_nusd),
        "interval": 0.8,
        "learned_from_hours": found.hours,
    }


def notes(report: Report) -> list[str]:
    """Return what a reader must know to take the figures for what they are."""
    total, query = report.total, report.query
    found = [HONEST] if total.baseline_nusd else []
    if total.provisional_nusd:
        found.append(f"${usd(total.provisional_nusd)} of GPU time is provisional: its hours are not closed yet.")
    if total.estimated:
        found.append(
            f"{total.estimated} of {total.exchanges} requests are estimated: "
            "their process died before it could bill them."
        )
    if "tag" in query.by:
        found.append("A request with several tags stands in several lines: lines do not add up to the total.")
    if report.idle_left_nusd:
        found.append(f"GPU servers stood idle for ${usd(report.idle_left_nusd)}, which is in no line.")
    if report.outside_nusd:
        found.append(
            f"GPU servers did work that was not tierway's for ${usd(report.outside_nusd)}, which is in no line."
        )
    return found


def moment(at_ms: int, zone: tzinfo) -> str:
    """Return a moment as ISO 8601 with its offset."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(zone)
    return at.isoformat(timespec="milliseconds" if at_ms % 1000 else "seconds").replace("+00:00", "Z")


def _usd(nusd: int | None) -> str | None:
    return None if nusd is None else usd(nusd)


# -- files ------------------------------------------------------------------------------------------------------------


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Cell]], *, texts: Sequence[str]) -> bytes:
    """Render rows as CSV (RFC 4180, UTF-8); None is an empty field.

    The columns of `texts` hold names that others chose: where one would be a formula it gets a `'` in front.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([safe(row[name]) if name in texts else row[name] for name in columns])
    return out.getvalue().encode()


def safe(cell: Cell) -> Cell:
    """Return a name as a spreadsheet takes it for a name."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def report_csv(report: Report, lines: Sequence[Line]) -> bytes:
    """Render the lines of a report."""
    columns = list(
        record(report, msgspec.structs.replace(report.total, start_ms=0, names=("",) * len(report.query.by)))
    )
    return as_csv(columns, [record(report, line) for line in lines], texts=report.query.by)


def report_parquet(report: Report, lines: Sequence[Line], out: BinaryIO) -> None:
    """Write the lines of a report: money as decimal(38, 9). Raises `NoParquet`."""
    rows = [record(report, line) for line in lines]
    columns = list(
        record(report, msgspec.structs.replace(report.total, start_ms=0, names=("",) * len(report.query.by)))
    )
    kinds = {name: "money" if name.endswith("_usd") else "count" if name in COUNTS else "text" for name in columns}
    write_parquet(kinds, rows, out)


def write_parquet(kinds: Mapping[str, str], rows: Sequence[Mapping[str, Cell]], out: BinaryIO) -> None:
    """Write rows; the kind of a column is `text`, `count`, `time` (ISO 8601, kept in UTC), `money` or `quantity`.

    Money has 9 decimal places, quantities 18. Raises `NoParquet`.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - optional, and slow to load
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise NoParquet("parquet needs a library that is not installed: pip install 'tierway[parquet]'") from None
    types = {
        "text": pa.string(),
        "count": pa.int64(),
        "time": pa.timestamp("ms", tz="UTC"),
        "money": pa.decimal128(38, 9),
        "quantity": pa.decimal128(38, 18),
    }
    arrays = [pa.array([_typed(row[name], kind) for row in rows], type=types[kind]) for name, kind in kinds.items()]
    schema = pa.schema([(name, types[kind]) for name, kind in kinds.items()])
    parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), out)


def _typed(cell: Cell, kind: str) -> object:
    if cell is None or kind in ("text", "count"):
        return cell
    if kind == "time":
        return datetime.fromisoformat(str(cell))
    return Decimal(str(cell))
