"""What does `tierway ledger` do? It looks after the ledger that gateway.yaml names. No gateway must run."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec

from backends.weights import local_model_ids
from gateway import budgets
from gateway.admission import Admission
from gateway.config import model as noun
from gateway.config.load import Loaded, load
from gateway.config.secrets import resolve_all
from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.invoice import Comparison, InvoiceError, Matter, Sums, compare, read_invoice
from gateway.ledger.opening import open_store
from gateway.ledger.report_forms import NoParquet
from gateway.ledger.retention import export, prune
from gateway.ledger.spent import Spending
from gateway.ledger.verify import Finding, verify
from gateway.metrics import Metrics
from gateway.reseeding import Reseeder
from gateway.rules import limits_of
from gateway.shared_limiter import SharedLimiter
from gateway.state import State, state_of
from policies.cost import usd

Run = Callable[[argparse.Namespace, Loaded], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what can be typed."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")

    def action(name: str, run: Run, what: str) -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        one.add_argument(
            "--config", type=Path, default=Path("gateway.yaml"), metavar="FILE", help="default: gateway.yaml"
        )
        one.set_defaults(run=_guarded(run))
        return one

    one = action("verify", _verify, "look for gaps, orphans, wrong sums and costs, and budgets that differ")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.add_argument("--no-budgets", action="store_true", help="do not look at the state store")
    one = action("seed", _seed, "tell a state store that has lost its data what was spent")
    one.add_argument(
        "--anew", action="store_true", help="have it forget what it believes first: all budgets are counted again"
    )
    action("migrate", _migrate, "make the tables, or bring them up to date")
    one = action("prune", _prune, "delete old rows; nothing of the last eight days but inputs of decisions")
    one.add_argument(
        "--before", type=_day, metavar="DATE", help="what was settled before this day (default: by ledger.keep_for)"
    )
    one.add_argument(
        "--inputs-before",
        type=_day,
        metavar="DATE",
        help="inputs of decisions from before this day (default: by ledger.decision_inputs.keep_for)",
    )
    one = action("export", _export, "write rows to files, one for each table and day")
    one.add_argument("--before", type=_day, metavar="DATE", required=True, help="what was settled before this day")
    one.add_argument("--from", dest="since", type=_day, metavar="DATE", help="and on this day or later")
    one.add_argument("--format", choices=("csv", "jsonl", "parquet"), default="csv", help="default: csv")
    one.add_argument("--inputs", action="store_true", help="also inputs of decisions: personal data")
    one.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="default: here")
    one = action("invoice", _invoice, "compare a provider's invoice with the ledger")
    one.add_argument("file", type=Path, metavar="FILE", help="the invoice as CSV with a header; FOCUS is known too")
    one.add_argument(
        "--column",
        action="append",
        default=[],
        type=_column,
        metavar="WHAT=HEADER",
        help="where a header is not known; WHAT is time, model, amount, currency, input, cached, output or request",
    )
    one.add_argument(
        "--tolerance", type=int, default=0, metavar="NUSD", help="nano-dollars that may differ (default: 0)"
    )
    one.add_argument("--json", action="store_true", help="as JSON")


def _guarded(run: Run) -> Callable[[argparse.Namespace], int]:
    def guarded(options: argparse.Namespace) -> int:
        try:
            return run(options, load(options.config, local_model_ids=local_model_ids()))
        except (LedgerDown, NoParquet, InvoiceError) as fault:
            print(f"tierway: {fault}", file=sys.stderr)
            return 2

    return guarded


def _now_ms() -> int:
    return int(time.time() * 1000)


def _day(text: str) -> int:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no day like 2026-11-01") from None
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000


def _column(text: str) -> tuple[str, str]:
    what, found, header = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not WHAT=HEADER")
    return what, header


# -- verify -----------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace, loaded: Loaded) -> int:
    store = open_store(loaded)
    findings: list[Finding] = []
    with store.reading() as reading:
        for finding in verify(reading, now_ms=_now_ms(), lease_ms=int(loaded.config.ledger.lease * 1000)):
            findings.append(finding)
            if not options.json:
                _say(finding)
    if not options.no_budgets:
        finding = asyncio.run(_budgets(loaded, store))
        findings.append(finding)
        if not options.json:
            _say(finding)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    return int(any(finding.wrong for finding in findings))


def _say(finding: Finding) -> None:
    said = "BAD" if finding.wrong else "ok "
    counted = f"{finding.wrong:,} of {finding.looked_at:,} wrong" if finding.wrong else f"{finding.looked_at:,}"
    print(f"{said} {finding.check}: {finding.note or counted}")
    for example in finding.examples:
        print(f"      {example}")
    if finding.wrong > len(finding.examples):
        print(f"      and {finding.wrong - len(finding.examples):,} more")


async def _budgets(loaded: Loaded, store: Store) -> Finding:
    name = "every budget stands where the ledger says"
    if not isinstance(loaded.config.state, noun.RedisState):
        return Finding(check=name, looked_at=0, wrong=0, note="not looked at: they are in the memory of the gateway")
    state, admission = _limits(loaded)
    await state.limiter.open()
    try:
        if state.limiter.state not in ("shared", "unseeded"):
            return Finding(check=name, looked_at=0, wrong=1, note="the state store does not answer")
        return await budgets.compare(state.limiter, admission, store, now_ms=_now_ms)
    finally:
        await state.limiter.close()
        await state.close()


def _limits(loaded: Loaded) -> tuple[State, Admission]:
    state = state_of(loaded, resolve_all(loaded), worker=0, workers=1)
    partition = loaded.config.state.partition if isinstance(loaded.config.state, noun.RedisState) else "deployment"
    return state, Admission(state.limiter, limits_of(loaded.config), partition=partition, metrics=Metrics())


# -- seed, migrate ----------------------------------------------------------------------------------------------------


def _seed(options: argparse.Namespace, loaded: Loaded) -> int:
    if not isinstance(loaded.config.state, noun.RedisState):
        print("tierway: this configuration keeps its state in memory: it is told at every start.", file=sys.stderr)
        return 2
    return asyncio.run(_seed_store(loaded, anew=options.anew))


async def _seed_store(loaded: Loaded, *, anew: bool) -> int:
    store = open_store(loaded)
    state, admission = _limits(loaded)
    limiter = state.limiter
    reseeder = Reseeder(limiter, admission, store, now_ms=_now_ms)
    await limiter.open()
    try:
        if limiter.state not in ("shared", "unseeded") or not isinstance(limiter, SharedLimiter):
            print("tierway: the state store does not answer.", file=sys.stderr)
            return 1
        for name in sorted(await asyncio.to_thread(_partitions, Spending(admission), store)):
            await limiter.look(name, ())
            if anew and not await limiter.lose(name):
                print(f"tierway: {name} could not be told to begin anew.", file=sys.stderr)
                return 1
        waiting = limiter.unseeded
        await reseeder.at_start()
        if left := limiter.unseeded:
            print(f"tierway: not told: {', '.join(one.partition for one in left)}. See the log.", file=sys.stderr)
            return 1
        for one in waiting:
            print(f"{one.partition}: told what was spent.")
        if not waiting:
            print("The state store has its totals already; nothing was changed. With --anew they are counted again.")
    finally:
        await reseeder.close()
        await limiter.close()
        await state.close()
    return 0


def _partitions(spending: Spending, store: Store) -> set[str]:
    with store.reading() as reading:
        return {one.partition for one in spending.totals(reading, now_ms=_now_ms(), before_ms=1 << 52)}


def _migrate(_options: argparse.Namespace, loaded: Loaded) -> int:
    store = open_store(loaded)
    store.write([])
    store.close()
    print("The tables are up to date.")
    return 0


# -- prune, export ----------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace, loaded: Loaded) -> int:
    now_ms, settings = _now_ms(), loaded.config.ledger
    before_ms, inputs_before_ms = options.before, options.inputs_before
    if before_ms is None and inputs_before_ms is None:
        before_ms = None if settings.keep_for is None else now_ms - int(settings.keep_for * 1000)
        inputs_before_ms = now_ms - int(settings.decision_inputs.keep_for * 1000)
    store = open_store(loaded)
    try:
        gone = prune(store, before_ms=before_ms, inputs_before_ms=inputs_before_ms, now_ms=now_ms)
    finally:
        store.close()
    print(f"Deleted {gone['exchanges']:,} exchanges and {gone['decision_inputs']:,} inputs of decisions.")
    return 0


def _export(options: argparse.Namespace, loaded: Loaded) -> int:
    options.into.mkdir(parents=True, exist_ok=True)
    with open_store(loaded).reading() as reading:
        for one in export(
            reading,
            options.into,
            before_ms=options.before,
            form=options.format,
            inputs=options.inputs,
            from_ms=options.since,
        ):
            print(f"{one.path}: {one.rows:,} rows")
    return 0


# -- invoice ----------------------------------------------------------------------------------------------------------


def _invoice(options: argparse.Namespace, loaded: Loaded) -> int:
    columns: Mapping[str, str] = dict(options.column)
    with (
        open_store(loaded).reading() as reading,
        options.file.open(encoding="utf-8-sig", errors="replace", newline="") as lines,
    ):
        result = compare(reading, read_invoice(lines, columns), tolerance_nusd=options.tolerance)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    else:
        _say_comparison(result)
    return int(bool(result.differing or result.only_invoice or result.only_ledger or result.bad))


def _say_comparison(result: Comparison) -> None:
    for bad in result.bad:
        print(f"unreadable      {bad}")
    for said, matters in (
        ("differs", result.differing),
        ("only invoiced", result.only_invoice),
        ("not invoiced", result.only_ledger),
    ):
        for one in matters:
            print(f"{said:<15} {one.what}: {_both(one)}")
    over = result.invoice.nusd - result.ledger.nusd
    print(
        f"{result.matched:,} agree, {len(result.differing):,} differ, {len(result.only_invoice):,} only invoiced, "
        f"{len(result.only_ledger):,} only in the ledger, {len(result.bad):,} lines unreadable."
    )
    print(f"Invoice ${usd(result.invoice.nusd)}, ledger ${usd(result.ledger.nusd)}: {_signed(over)}.")


def _both(one: Matter) -> str:
    both = (("invoice", one.invoice), ("ledger", one.ledger))
    said = ", ".join(f"{name} {_sums(sums)}" for name, sums in both if sums is not None)
    return f"{said}: {_signed(one.over_nusd)}"


def _sums(sums: Sums) -> str:
    tokens = (sums.input_tokens, sums.cached_tokens, sums.output_tokens)
    said = "/".join("?" if one is None else str(one) for one in tokens)
    return f"${usd(sums.nusd)} ({said} tokens)"


def _signed(nusd: int) -> str:
    return f"{'+' if nusd >= 0 else '-'}${usd(abs(nusd))}"
