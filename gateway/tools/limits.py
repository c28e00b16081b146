"""What does `tierway limits` do? It tells a store that has lost its data what was spent before."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from backends.weights import local_model_ids
from gateway.admission import Admission
from gateway.config import model as noun
from gateway.config.load import Loaded, load
from gateway.config.secrets import resolve_all
from gateway.metrics import Metrics
from gateway.rules import limits_of
from gateway.seeding import TotalsError, entries_of, read_totals
from gateway.state import state_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what can be typed."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    seed = actions.add_parser(
        "seed",
        help="tell the store what budgets had spent before it lost its data",
        description="Tell the store what budgets had spent before it lost its data. The first time after each loss "
        "counts, however often and from wherever it is done. Each total is that of the present window.",
        epilog='FILE is JSON: {"totals": [{"limit": "monthly", "scope": {"team": "search"}, "usd": "12.34"}]}',
    )
    seed.add_argument("file", type=Path, metavar="FILE", help="the totals, - for standard input")
    seed.add_argument("--config", type=Path, default=Path("gateway.yaml"), help="default: gateway.yaml")
    seed.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Seed the store; 0 where the totals counted or had been counted."""
    loaded = load(options.config, local_model_ids=local_model_ids())
    if not isinstance(loaded.config.state, noun.RedisState):
        print("tierway: this configuration keeps its state in memory, which has no totals to be told.", file=sys.stderr)
        return 2
    data = sys.stdin.buffer.read() if str(options.file) == "-" else options.file.read_bytes()
    try:
        return asyncio.run(_seed(loaded, data))
    except TotalsError as fault:
        print(f"tierway: {fault}", file=sys.stderr)
        return 2


async def _seed(loaded: Loaded, data: bytes) -> int:
    state = state_of(loaded, resolve_all(loaded), worker=0, workers=1)
    admission = Admission(
        state.limiter,
        limits_of(loaded.config),
        partition=loaded.config.state.partition if isinstance(loaded.config.state, noun.RedisState) else "deployment",
        metrics=Metrics(),
    )
    by_partition = entries_of(read_totals(data), admission)
    await state.limiter.open()
    try:
        if state.limiter.state not in ("shared", "unseeded"):
            print("tierway: the store does not answer.", file=sys.stderr)
            return 1
        for partition, entries in by_partition.items():
            counted = await state.limiter.seed(partition, entries)
            said = "counted" if counted else "had its totals already; nothing was changed"
            print(f"{partition}: {len(entries)} totals, {said}.")
    finally:
        await state.limiter.close()
        await state.close()
    return 0
