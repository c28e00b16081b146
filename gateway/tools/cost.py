"""What does `tierway cost` do? It reads the ledger of gateway.yaml and says what was spent. No gateway must run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from io import BytesIO
from pathlib import Path

import msgspec

from backends.weights import local_model_ids
from gateway.config.load import load
from gateway.ledger import focus, opencost
from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.opening import open_store
from gateway.ledger.report_forecast import MonthForecast, forecast_month
from gateway.ledger.report_forms import NoParquet, as_json, report_csv, report_parquet
from gateway.ledger.report_query import BUCKETS, DIMENSIONS, BadOption, Query, query_of
from gateway.ledger.report_table import as_table
from gateway.ledger.reports import Line, Report, TooMuch, read_report

FORMATS = ("table", "csv", "json", "parquet", "opencost")
HOUR_MS = 3_600_000
_MOST_READERS = 4
_EXAMPLES = """\
examples:
  tierway cost                                         the month so far
  tierway cost --since 7d --by day,team                a week, by day and team
  tierway cost --by tier,model --filter team=red       where the money of a team goes
  tierway cost --by user --top 10 --forecast           who spends most, and what the month will come to
  tierway cost --since 2026-10 --until 2026-11 --focus --format csv --output october.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what can be typed."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--config", type=Path, default=Path("gateway.yaml"), metavar="FILE", help="default: gateway.yaml"
    )
    parser.add_argument("--since", help="7d, 36h, 2026-11, 2026-11-01 or a time with its zone (default: this month)")
    parser.add_argument("--until", help="as --since, not included (default: now)")
    parser.add_argument("--by", help=f"with commas: {', '.join((*BUCKETS, *DIMENSIONS))}")
    parser.add_argument("--bucket", choices=BUCKETS, help="as hour, day or month in --by")
    parser.add_argument("--timezone", help="where days and months begin, as Europe/Berlin (default: UTC)")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only these, as team=red; - is none; may be repeated: any value of a name, all names",
    )
    parser.add_argument(
        "--idle", choices=("nobody", "teams", "requests"), help="who bears idle GPUs (default: as the file)"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: table, with --focus csv")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, not to standard output")
    parser.add_argument("--top", type=_count, metavar="N", help="only the N dearest lines")
    parser.add_argument("--forecast", action="store_true", help="also what this month will come to")
    parser.add_argument(
        "--focus",
        action="store_true",
        help=f"charges in the columns of FOCUS {focus.VERSION}, for tools of FinOps (csv or parquet)",
    )
    parser.add_argument(
        "--node-prices",
        metavar="FILE",
        help="read no ledger but the metrics of an OpenCost (- for standard input): what its GPUs cost, as `price`",
    )
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:8]) <= 1_000_000):
        raise argparse.ArgumentTypeError("expected a number from 1 to 1000000")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Print or write what is asked; return the exit status."""
    if options.node_prices is not None:
        return _node_prices(options.node_prices)
    loaded = load(options.config, local_model_ids=local_model_ids())
    now_ms = int(time.time() * 1000)
    try:
        words = {
            name: value for name in ("since", "until", "by", "bucket", "timezone") if (value := getattr(options, name))
        }
        query = query_of(words, filters=options.filter, now_ms=now_ms, idle=options.idle or loaded.config.ledger.idle)
        store = open_store(loaded)
        if options.focus:
            content = _focus(options, store, query)
        elif options.format == "opencost":
            content = _opencost(store, query)
        else:
            content = _report(options, store, query, now_ms)
    except BadOption as bad:
        print(f"tierway cost: --{bad.option}: {bad.message}.", file=sys.stderr)
        return 2
    except (LedgerDown, TooMuch, NoParquet) as why:
        print(f"tierway cost: {why}", file=sys.stderr)
        return 1
    if options.output is not None:
        options.output.write_bytes(content)
    else:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    return 0


def _report(options: argparse.Namespace, store: Store, query: Query, now_ms: int) -> bytes:
    form = options.format or "table"
    if form == "parquet":
        _to_a_file(options)
    if options.forecast and form not in ("table", "json"):
        raise BadOption("forecast", "it is shown in a table or as json")
    report = read_report(store, query, readers=max(1, min(_MOST_READERS, os.cpu_count() or 1)))
    lines = dearest(report, options.top)
    month: MonthForecast | None = forecast_month(store, query, now_ms=now_ms) if options.forecast else None
    if form == "table":
        return as_table(report, lines=lines, forecast=month).encode()
    if form == "json":
        return as_json(report, lines=lines, forecast=month) + b"\n"
    if form == "csv":
        return report_csv(report, lines)
    out = BytesIO()
    report_parquet(report, lines, out)
    return out.getvalue()


def dearest(report: Report, count: int | None) -> tuple[Line, ...]:
    """Return the lines that cost most, the dearest first; all of them, in their order, where no count is given."""
    if count is None:
        return report.lines
    return tuple(sorted(report.lines, key=lambda line: -line.cost_nusd)[:count])


def _focus(options: argparse.Namespace, store: Store, query: Query) -> bytes:
    form = options.format or "csv"
    if form not in ("csv", "parquet"):
        raise BadOption("format", "with --focus it is csv or parquet")
    for name in ("by", "top", "forecast"):
        if getattr(options, name):
            raise BadOption(name, "it cannot be used with --focus, whose lines are given")
    if query.filters:
        raise BadOption("filter", "it cannot be used with --focus: an export has everything")
    if form == "parquet":
        _to_a_file(options)
    with store.reading() as reading:
        charges = focus.charges(reading, query)
    if form == "csv":
        return focus.as_csv(charges)
    out = BytesIO()
    focus.as_parquet(charges, out)
    return out.getvalue()


def _opencost(store: Store, query: Query) -> bytes:
    with store.reading() as reading:
        hours = list(opencost.custom_costs(reading, query.since_ms // HOUR_MS, query.until_ms // HOUR_MS, query.idle))
    return msgspec.json.encode(hours) + b"\n"


def _node_prices(file: str) -> int:
    try:
        found = opencost.node_prices(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        print(f"tierway cost: --node-prices: {fault}", file=sys.stderr)
        return 2
    if not found:
        print("tierway cost: --node-prices: no node with GPUs and their price is in it.", file=sys.stderr)
        return 1
    for node in found:
        print(f"{node.node}: price: {{gpu: {{usd_per_hour: {node.usd_per_hour}, count: {node.count}}}}}")
    return 0


def _to_a_file(options: argparse.Namespace) -> None:
    if options.output is None and sys.stdout.isatty():
        raise BadOption("output", "parquet is no text for a terminal; name a file")
