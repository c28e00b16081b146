"""Is the work of others told from ours by the server's counters, with two replicas in front of it?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from time import time

import msgspec
import pytest

from backends.backend import Call, Counters
from backends.vllm import HttpPool, VllmBackend
from gateway.ledger.meters import Meter, Meters
from gateway.ledger.rows import AnyRow, MeterRow
from gateway.ledger.sqlite import SqliteStore
from policies.gpu import HOUR_MS, Part, Run, Span, split_hour
from tests.gateway.ledger.bills import bill_of
from tests.gateway.ledger.test_closing import FROM_MS, USD, Books, price_of
from tests.running import Upstream

HOUR = Span(FROM_MS, FROM_MS + HOUR_MS)
WEIGHT = 4000


# -- simulated: an hour of hundreds of requests, looked at every five seconds -------------------------------------------


def simulated(seed: int, requests: int) -> list[Run]:
    random = Random(seed)
    runs = []
    for number in range(requests):
        started_ms = FROM_MS - 60_000 + random.randrange(HOUR_MS + 120_000)
        first_ms = started_ms + random.randrange(50, 2000)
        ended_ms = first_ms + random.randrange(100, 20_000)
        prompt, completion = random.randrange(20, 4000), random.randrange(1, 500)
        runs.append(Run((f"x{seed}-{number}", 1), started_ms, first_ms, ended_ms, prompt, completion, 1000))
    return runs


def counters_at(at_ms: int, runs: Sequence[Run]) -> Counters:
    """A vLLM counts a prompt when its first token comes, and each token as it is written."""
    read = sum(run.prompt_tokens for run in runs if (run.first_token_ms or 0) <= at_ms)
    wrote = sum(run.tokens_within(Span(0, at_ms))[1] for run in runs)
    running = sum(run.started_ms <= at_ms < run.ended_ms for run in runs)
    return Counters(prompt_tokens=read, completion_tokens=wrote, running=running)


def seen_by(watcher: str, runs: Sequence[Run], first_ms: int, until_ms: int) -> list[MeterRow]:
    meter = Meter("gpu-a", watcher)
    for at_ms in range(first_ms, until_ms, 5000):
        meter.saw(counters_at(at_ms, runs), at_ms)
    return [row for row in meter.rows(all_of_it=True) if row.hour == HOUR.from_ms // HOUR_MS]


def parts_from(rows: Sequence[MeterRow]) -> list[Part]:
    return [
        Part(row.instance, Span(row.from_ms, row.until_ms), row.prompt_tokens, row.completion_tokens, row.busy_ms)
        for row in rows
    ]


@pytest.mark.parametrize("load", [60, 400])
def test_two_replicas_tell_the_work_of_others_and_count_nothing_twice(load: int) -> None:
    ours, others = simulated(1, load), simulated(2, load // 2)
    server = [*ours, *others]
    # One replica watched all the time, the other one was started half way.
    rows = seen_by("one", server, FROM_MS - 3000, HOUR.until_ms + 9000)
    rows += seen_by("two", server, FROM_MS + HOUR_MS // 2 + 1700, HOUR.until_ms + 9000)
    split = split_hour(HOUR, 2 * USD, ours, parts_from(rows), decode_weight=WEIGHT)
    truth = split_hour(HOUR, 2 * USD, server, [], decode_weight=WEIGHT)
    their_share = sum(share.nusd for share in truth.shares if share.id[0].startswith("x2"))
    assert split.shares_nusd + split.idle_nusd + split.outside_nusd == 2 * USD
    assert split.outside_nusd == pytest.approx(their_share, rel=0.06)
    assert split.busy_ms == pytest.approx(truth.busy_ms, rel=0.06)
    alone = split_hour(
        HOUR, 2 * USD, ours, parts_from(seen_by("one", ours, FROM_MS - 3000, HOUR.until_ms)), decode_weight=WEIGHT
    )
    assert alone.outside_nusd < alone.shares_nusd / 100, "what is ours is not taken for others' work"


# -- real: a server's look-alike with counters, two replicas and one who passes both by ----------------------------------

CALL = Call(
    endpoint="chat/completions",
    body=(b'{"model":"m","stream":true,"messages":[{"role":"user","content":"Hi"}]}',),
    stream=True,
)
PROMPT, COMPLETION = 37, 9
"""What the look-alike reports of an answer of 8 words: the end token is billed too."""


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    server = Upstream(["m"], tmp_path, "--interval-ms", "2")
    try:
        yield server
    finally:
        server.kill()


async def asked(backend: VllmBackend, number: int) -> list[AnyRow]:
    """Ask once, and return the rows of it."""
    started_s = time()
    first_s = None
    async with backend.open(CALL) as answer:
        async for _ in answer:
            first_s = first_s or time()
    made = bill_of(number, output=0)
    attempt = msgspec.structs.replace(
        made.attempts[0],
        backend="gpu-a",
        gpu_nusd=1000 + number,
        started_ms=int(1000 * started_s),
        first_token_us=None if first_s is None else int(1e6 * (first_s - started_s)),
        ended_ms=int(1000 * time()) + 1,
        prompt_tokens=PROMPT,
        completion_tokens=COMPLETION,
    )
    return [msgspec.structs.replace(made.exchange, gpu_nusd=attempt.gpu_nusd), attempt]


def test_a_server_with_two_replicas_and_others_in_front(upstream: Upstream, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db")
    books = Books(store)
    hour = int(time()) // 3600

    async def play() -> list[AnyRow]:
        pools = [HttpPool() for _ in range(3)]
        one, two, outside = (VllmBackend(pool, url=upstream.url) for pool in pools)
        rows: list[AnyRow] = []
        watchers = [
            Meters({"gpu-a": backend}, rows.extend, instance=name) for name, backend in (("1", one), ("2", two))
        ]
        try:
            for watcher in watchers:
                assert await watcher.look("gpu-a")
            for first in range(0, 30, 10):
                wave = [asked((one, two, outside)[number % 3], number) for number in range(first, first + 10)]
                for number, bill in zip(range(first, first + 10), await asyncio.gather(*wave), strict=True):
                    rows += bill if number % 3 < 2 else []
                for watcher in watchers:
                    assert await watcher.look("gpu-a")
        finally:
            for pool in pools:
                await pool.close()
        for watcher in watchers:
            rows += watcher._meters["gpu-a"].rows(all_of_it=True)
        return rows

    rows = asyncio.run(play())
    seen = [row for row in rows if isinstance(row, MeterRow)]
    assert sum(row.prompt_tokens for row in seen) == 2 * 30 * PROMPT, "both saw all of it"
    assert sum(row.completion_tokens for row in seen) == 2 * 30 * COMPLETION
    store.write([price_of(at_ms=hour * HOUR_MS).row, *rows])
    books.look(books.closer(), (hour + 2) * 3600 + 61 - FROM_MS / 1000)
    sums = "SUM(shares_nusd), SUM(idle_nusd), SUM(outside_nusd), SUM(hour_nusd), SUM(attempts)"
    ((shares, idle, outside, whole, attempts),) = books.read(f"SELECT {sums} FROM closings")
    store.close()
    assert shares + idle + outside == whole
    assert attempts >= 20
    assert outside == pytest.approx(shares / 2, rel=0.05), "a third of the work came from elsewhere"
