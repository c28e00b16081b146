"""What does one request, and one event of a stream, cost the gateway? Measured in CPU time, beside a bare ASGI app.

The gateway has one core to itself; the scripted upstream and the load generator have the others. Every round runs
every phase once, so that a noisy minute of the machine touches all of them; the table shows medians over the rounds.
Compare figures of one run with each other, and those of two machines by way of the reference rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import pstats
import resource
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

if not __package__:  # run by its path: the folder that holds `loadtests` is not on the path of modules yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtests.processes import DidNotStartError, Process, ask, cpu_s, free_port, wait_until_ready
from tests.servers.postgres import running_postgres
from tests.servers.process import ServerMissingError
from tests.servers.redis import running_redis

KEY = "tw-bench-loopback-only"
CONFIG = """\
backends:
  bench-small: {{kind: vllm, url: "http://127.0.0.1:{upstream}", model: scripted-small}}
  bench-large: {{kind: vllm, url: "http://127.0.0.1:{upstream}", model: scripted-large}}
  bench-bulk: {{kind: vllm, url: "http://127.0.0.1:{bulk}", model: scripted-bulk}}
tiers:
  - {{name: small, backends: [bench-small], price: {{input: 0.1, output: 0.2}}}}
  - {{name: large, backends: [bench-large], price: {{input: 1, output: 2}}}}
  - {{name: bulk, backends: [bench-bulk], price: {{input: 1, output: 2}}}}
routes:
  auto:
    steps:
      - {{tier: small, doubt_below: 0.5}}
      - {{tier: large}}
keys:
  - {{name: bench, sha256: "{digest}"}}
ledger: {ledger}
{limits}"""
NO_LEDGER = "{store: {kind: none}}"
SQLITE = '{{store: {{kind: sqlite, path: "{file}"}}}}'
POSTGRES = '{{store: {{kind: postgres, dsn: {{from: file, path: "{dsn}"}}, spool: "{file}"}}}}'
LIMITS = """\
limits:
  - name: bench
    scope: {{key: each}}
    requests: {{limit: 100000000, per: hour}}
    tokens: {{limit: 900000000, per: hour}}
    concurrent: 100000
    spend: {{usd: 1000000}}
state: {state}
"""
MANY_TABLES = ("exchanges", "attempts", "adjustments", "closings")
LEDGERS = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
MEMORY = "{kind: memory}"
REDIS = '{{kind: redis, addresses: ["127.0.0.1:{port}"], password: {{from: file, path: "{file}"}}, timeout: 2s}}'
AIM_REQUEST_US = 130.0
AIM_EVENT_US = 13.0
MEGABYTE = 1_000_000


class Phase(msgspec.Struct, frozen=True):
    """One kind of load."""

    name: str
    target: str
    model: str
    requests: int
    concurrency: int
    stream: bool = False
    one_token: bool = False
    interval_ms: float = 0


class Sample(msgspec.Struct, frozen=True):
    """One phase in one round."""

    cpu_us: float
    """CPU of the measured process for each request."""
    store_cpu_us: float
    """CPU of Redis for each request, where the limits are kept there."""
    events: float
    """Events of each request."""
    requests_per_s: float
    events_per_s: float
    events_per_read: float
    first_byte_p50_ms: float
    first_byte_p99_ms: float
    client_busy: float


class Row(msgspec.Struct, frozen=True):
    """One line of the table."""

    what: str
    unit: str
    values: list[float]
    aim: float | None = None

    def text(self) -> str:
        middle, low, high = statistics.median(self.values), min(self.values), max(self.values)
        aim = "" if self.aim is None else f"{self.aim:10.0f}"
        return f"{self.what:<58}{self.unit:>8}{middle:10.1f}{low:10.1f}{high:10.1f}{aim}"


class Gap(msgspec.Struct, frozen=True):
    """The gaps between the events of a stream while other clients post large bodies."""

    what: str
    posted: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class Report(msgspec.Struct, frozen=True):
    """How long a report took: the command as a whole, its start included."""

    what: str
    wall_s: float
    cpu_s: float


class Bench:
    """The processes of a run and what is asked of them."""

    def __init__(self, asked: argparse.Namespace, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._tokens = asked.tokens
        cores = sorted(os.sched_getaffinity(0))
        self.gateway_core = cores[:1]
        self.other_cores = cores[1:] or cores
        self.upstream = self._start_upstream("upstream", ["scripted-small", "scripted-large"])
        self.bulk = self._start_upstream("bulk", ["scripted-bulk"])
        self.profile_file = folder / "gateway.prof" if asked.profile else None
        self.gateway_port, self.gateway = self._start_gateway("gateway", profiled=True)
        self._redis = stack.enter_context(running_redis())
        os.sched_setaffinity(self._redis.pid, self.other_cores)
        password = folder / "password"
        password.write_text(self._redis.password)
        redis = REDIS.format(port=self._redis.port, file=password)
        events = ["--events", str(self._tokens), "--interval-ms", str(asked.interval_ms)]
        self._measured = {
            "gateway": (self.gateway_port, self.gateway),
            "sqlite": self._start_gateway("sqlite", ledger=SQLITE.format(file=folder / "ledger.db")),
            "postgres": self._start_gateway("postgres", ledger=self._postgres()),
            "memory": self._start_gateway("memory", limits=LIMITS.format(state=MEMORY)),
            "redis": self._start_gateway("redis", limits=LIMITS.format(state=redis)),
            "reference": self._start_reference("reference", "/", events),
            "relay": self._start_reference("relay", "/health", ["--relay-to", str(self.upstream)]),
        }

    def _postgres(self) -> str:
        """Start a PostgreSQL and return the ledger that is kept there."""
        server = self._stack.enter_context(running_postgres())
        dsn = self._folder / "dsn"
        dsn.write_text(server.url)
        return POSTGRES.format(dsn=dsn, file=self._folder / "spool.db")

    def _start(self, name: str, argv: Sequence[str], cores: Sequence[int], *, talks: bool = False) -> Process:
        return self._stack.enter_context(Process(name, argv, cores, self._folder, talks=talks))

    def _start_upstream(self, name: str, models: list[str]) -> int:
        argv = ["-m", "loadtests.upstream", "--until-eof", "--tokens", str(self._tokens)]
        for model in models:
            argv += ["--model", model]
        port: int = self._start(name, argv, self.other_cores, talks=True).line(20)["port"]
        return port

    def _start_gateway(
        self, name: str, *, limits: str = "", ledger: str = NO_LEDGER, profiled: bool = False
    ) -> tuple[int, Process]:
        config = self._folder / f"{name}.yaml"
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        config.write_text(
            CONFIG.format(upstream=self.upstream, bulk=self.bulk, digest=digest, limits=limits, ledger=ledger)
        )
        port = free_port()
        argv = ["-m", "gateway.cli", "serve", "--config", str(config), "--port", str(port)]
        if self.profile_file is not None and profiled:
            argv = ["-m", "cProfile", "-o", str(self.profile_file), *argv]
        process = self._start(name, argv, self.gateway_core)
        wait_until_ready(process, port, "/readyz", 60)
        return port, process

    def _start_reference(self, name: str, path: str, arguments: Sequence[str]) -> tuple[int, Process]:
        port = free_port()
        process = self._start(name, ["-m", "loadtests.reference", "--port", str(port), *arguments], self.gateway_core)
        wait_until_ready(process, port, path, 20)
        return port, process

    def pace(self, interval_ms: float) -> None:
        """Set the time between two tokens of the upstream."""
        status, _, body = ask(self.upstream, "POST", "/__script", {"script": {"interval_ms": interval_ms}})
        if status != 200:
            raise DidNotStartError(f"the upstream refused its script: {body!r}")

    def check(self) -> None:
        """See that what is measured is what the table says: one attempt, confidence read, log-probabilities stripped.

        Raise `DidNotStartError` otherwise.
        """
        body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
        for streamed in (False, True):
            path = "/v1/chat/completions"
            status, headers, answer = ask(self.gateway_port, "POST", path, body | {"stream": streamed}, KEY)
            seen = {name: headers.get(f"x-tierway-{name}") for name in ("tier", "attempts", "confidence")}
            sure = seen["confidence"] is not None and float(seen["confidence"]) > 0.5
            if status != 200 or seen["tier"] != "small" or seen["attempts"] != "1" or not sure:
                raise DidNotStartError(f"auto did not accept its first tier: {status} {seen} {answer[:500]!r}")
            if b'"logprob"' in answer:
                raise DidNotStartError("the log-probabilities were not stripped")

    def client(self, name: str, port: int, arguments: Sequence[str]) -> Process:
        """Start a load generator that waits for the word to begin."""
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        argv = ["-m", "loadtests.client", url, "--key", KEY, "--wait", *arguments]
        process = self._start(name, argv, self.other_cores, talks=True)
        process.line(20)
        return process

    def run(self, phase: Phase) -> Sample:
        """Run one phase and read the CPU time before and after. Raise `DidNotStartError` if a request failed."""
        port, measured = self._measured[phase.target]
        self.pace(phase.interval_ms)
        arguments = ["--model", phase.model, "--requests", str(phase.requests)]
        arguments += ["--concurrency", str(phase.concurrency)]
        arguments += ["--stream"] if phase.stream else []
        arguments += ["--max-tokens", "1"] if phase.one_token else []
        with self.client("client", port, arguments) as client:
            time.sleep(0.05)  # for the connections to be accepted
            before, store_before = cpu_s(measured.pid), cpu_s(self._redis.pid)
            client.say("go")
            report = client.line(120)
            used_s, store_s = cpu_s(measured.pid) - before, cpu_s(self._redis.pid) - store_before
        if report["errors"] or not report["completed"]:
            raise DidNotStartError(f"{phase.name}: {report['errors']}\n{measured.last_words()}")
        completed = report["completed"]
        return Sample(
            cpu_us=used_s / completed * 1e6,
            store_cpu_us=store_s / completed * 1e6,
            events=report["events"] / completed,
            requests_per_s=report["requests_per_s"],
            events_per_s=report["events_per_s"],
            events_per_read=report["events"] / (report["reads"] or 1),
            first_byte_p50_ms=report["first_byte_ms"]["p50"],
            first_byte_p99_ms=report["first_byte_ms"]["p99"],
            client_busy=report["cpu_s"] / report["elapsed_s"],
        )

    def gaps(self, what: str, body_bytes: int, seconds: float, *, direct: bool = False) -> Gap:
        """Watch four streams of a token each 5 ms while two clients post bodies of a size, none when it is 0.

        `direct` streams pass the gateway by: what they show is the noise of the machine.
        """
        self.pace(5)
        tokens = int(seconds / 0.005)
        ask(self.upstream, "POST", "/__script", {"script": {"interval_ms": 5, "tokens": tokens}})
        ask(self.bulk, "POST", "/__script", {"script": {"tokens": 1}})
        watch = ["--stream", "--gaps", "--requests", "4", "--concurrency", "4", "--time-s", str(seconds * 4)]
        model, port = ("scripted-small", self.upstream) if direct else ("small", self.gateway_port)
        with ExitStack() as stack:
            streams = stack.enter_context(self.client("streams", port, [*watch, "--model", model]))
            posts = None
            if body_bytes:
                post = ["--model", "bulk", "--body-bytes", str(body_bytes), "--requests", "100000"]
                post += ["--concurrency", "2", "--time-s", str(seconds)]
                posts = stack.enter_context(self.client("posts", self.gateway_port, post))
            streams.say("go")
            if posts is not None:
                posts.say("go")
            found = streams.line(seconds * 4 + 20)
            posted: dict[str, Any] = {"completed": 0, "errors": {}}
            if posts is not None:
                posted = posts.line(seconds + 20)
        refused = {reason: count for reason, count in posted["errors"].items() if reason != "out of time"}
        if found["errors"] or refused or (body_bytes and not posted["completed"]):
            raise DidNotStartError(f"{what}: {found['errors']} {posted['errors']}\n{self.gateway.last_words()}")
        gap = found["gap_ms"]
        return Gap(what, posted["completed"], gap["p50"], gap["p99"], gap["max"])


def reports(folder: Path, exchanges: int) -> tuple[float, list[Report]]:
    """Fill a file of SQLite with so many requests and ask for reports.

    Return how many rows a second were written, and how long each report took.
    """
    file, config = folder / "many.db", folder / "many.yaml"
    written = _timed([sys.executable, "-m", "tests.gateway.ledger.many_rows", str(file), str(exchanges)])
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    config.write_text(
        CONFIG.format(upstream=9, bulk=9, digest=digest, limits="", ledger=SQLITE.format(file=file)), encoding="utf-8"
    )
    command = [sys.executable, "-m", "gateway.cli", "cost", "--config", str(config), "--since", "2025-11-01"]
    command += ["--until", "2025-12-01", "--output", str(folder / "report")]
    found = []
    for by in ("", "tier", "team", "day,key", "model"):
        _timed([*command, *(["--by", by] if by else [])])  # once for the cache
        wall_s, cpu_s = _timed([*command, *(["--by", by] if by else [])])
        found.append(Report(f"report by {by or 'nothing, the total'}", wall_s, cpu_s))
    with sqlite3.connect(file) as db:
        rows = sum(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in MANY_TABLES)  # noqa: S608
    return rows / written[0], found


def _timed(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return how long it took, and its CPU time."""
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
    wall_s, after = time.monotonic() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_reports(exchanges: int, rows_a_second: float, found: Sequence[Report]) -> None:
    """Print what was found."""
    print(f"\nrows a second into SQLite, made and synced by one process: {rows_a_second:.0f}")
    print(f"{f'{exchanges} requests in SQLite, the command as a whole':<58}{'wall s':>10}{'CPU s':>10}")
    for one in found:
        print(f"{one.what:<58}{one.wall_s:10.2f}{one.cpu_s:10.2f}")


def phases(asked: argparse.Namespace) -> list[Phase]:
    """List every load of a round, in their order."""
    whole = {"requests": asked.requests, "concurrency": 16}
    short = {"requests": asked.requests // 2, "concurrency": 16, "stream": True, "one_token": True}
    streams = {"requests": asked.streams, "concurrency": 32, "stream": True, "interval_ms": asked.interval_ms}
    found = []
    for target, model in (
        ("gateway", "small"),
        ("gateway", "auto"),
        ("reference", "constant"),
        ("relay", "scripted-small"),
    ):
        name = model if target == "gateway" else target
        found += [
            Phase(f"{name} whole", target, model, **whole),
            Phase(f"{name} one token", target, model, **short),
            Phase(f"{name} stream", target, model, **streams),
        ]
        if target != "reference":
            found.append(Phase(f"{name} unpaced", target, model, requests=asked.streams, concurrency=8, stream=True))
    # Beside the same without limits, so that a noisy moment touches all three.
    at = next(number for number, phase in enumerate(found) if phase.name == "small whole") + 1
    found[at:at] = [
        *(Phase(f"{state} limits whole", state, "small", **whole) for state in ("memory", "redis")),
        *(Phase(f"{store} ledger whole", store, "small", **whole) for store in LEDGERS),
        *(
            Phase(f"{store} ledger alone", store, "small", requests=asked.requests // 4, concurrency=1)
            for store in ("gateway", *LEDGERS)
        ),
    ]
    return found


def rows_of(samples: dict[str, list[Sample]]) -> list[Row]:
    """Work the samples into the lines of the table."""

    def per_event(name: str) -> list[float]:
        """Take the request off: what a longer stream costs more, for each event it has more."""
        pairs = zip(samples[f"{name} stream"], samples[f"{name} one token"], strict=True)
        return [(long.cpu_us - short.cpu_us) / (long.events - short.events) for long, short in pairs]

    def each(name: str, field: str) -> list[float]:
        return [float(getattr(sample, field)) for sample in samples[name]]

    def gross(name: str) -> list[float]:
        return [sample.cpu_us / sample.events for sample in samples[name]]

    def above(dear: list[float], cheap: list[float]) -> list[float]:
        return [one - other for one, other in zip(dear, cheap, strict=True)]

    relayed_event, relayed_request = per_event("relay"), each("relay whole", "cpu_us")
    costs, speeds = [], []
    for n, whole, stream in (
        ("small", "plain tier", "a plain stream"),
        ("auto", "auto, confidence read", "an auto stream, log-probabilities stripped"),
    ):
        request, event = each(f"{n} whole", "cpu_us"), per_event(n)
        costs += [
            Row(f"whole request, {whole}", "us", request, AIM_REQUEST_US),
            Row("  above bytes relayed unread", "us", above(request, relayed_request)),
            Row("  the same, streamed, of one token", "us", each(f"{n} one token", "cpu_us")),
            Row(f"event of {stream}", "us", event, AIM_EVENT_US),
            Row("  above bytes relayed unread", "us", above(event, relayed_event)),
            Row("  with its share of the request", "us", gross(f"{n} stream")),
            Row("  with its share of the request, unpaced", "us", gross(f"{n} unpaced"), AIM_EVENT_US),
        ]
        speeds += [
            Row(f"whole requests, {whole}", "1/s", each(f"{n} whole", "requests_per_s")),
            Row(f"events of {stream}, unpaced", "1/s", each(f"{n} unpaced", "events_per_s")),
            Row("  events a read at the client, paced", "", each(f"{n} stream", "events_per_read")),
            Row("  first byte of 32 paced streams, p50", "ms", each(f"{n} stream", "first_byte_p50_ms")),
            Row("  first byte of 32 paced streams, p99", "ms", each(f"{n} stream", "first_byte_p99_ms")),
        ]
    free = each("small whole", "cpu_us")
    for state, where in (("memory", "memory"), ("redis", "Redis")):
        limited = each(f"{state} limits whole", "cpu_us")
        costs += [
            Row(f"whole request, plain tier, four limits in {where}", "us", limited),
            Row("  above the same without limits", "us", above(limited, free)),
        ]
    costs.append(Row("  CPU of Redis itself", "us", each("redis limits whole", "store_cpu_us")))
    alone = {field: each("gateway ledger alone", field) for field in ("first_byte_p50_ms", "first_byte_p99_ms")}
    busy = {field: each("small whole", field) for field in alone}
    for store, where in LEDGERS.items():
        kept = each(f"{store} ledger whole", "cpu_us")
        costs += [
            Row(f"whole request, plain tier, ledger in {where}", "us", kept),
            Row("  above the same without a ledger", "us", above(kept, free)),
        ]
        for which, without, many in (("alone", alone, "one at a time"), ("whole", busy, "16 at a time")):
            for field, name in (("first_byte_p50_ms", "p50"), ("first_byte_p99_ms", "p99")):
                added = above(each(f"{store} ledger {which}", field), without[field])
                speeds.append(Row(f"wait for the ledger in {where}, {many}, {name}", "ms", added))
        speeds.append(Row(f"whole requests, ledger in {where}", "1/s", each(f"{store} ledger whole", "requests_per_s")))
    references = [
        Row("reference: whole request, bare uvicorn", "us", each("reference whole", "cpu_us")),
        Row("reference: whole request, bytes relayed unread", "us", relayed_request),
        Row("reference: event, bare uvicorn", "us", per_event("reference")),
        Row("reference: event, bytes relayed unread", "us", relayed_event),
        Row("  with its share of the request, unpaced", "us", gross("relay unpaced")),
        Row("reference: whole requests, bare uvicorn", "1/s", each("reference whole", "requests_per_s")),
    ]
    return costs + speeds + references


def print_profile(file: Path) -> None:
    """Print where the gateway spent its time, by function and by module. Its start and its idle waits are in it."""
    stats = pstats.Stats(str(file))
    stats.sort_stats("tottime").print_stats(40)
    profile: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = vars(stats)["stats"]
    by_module: dict[str, float] = {}
    for (path, _, _), (_, _, own_s, _, _) in profile.items():
        module = "/".join(Path(path).parts[-2:])
        by_module[module] = by_module.get(module, 0) + own_s
    for module, own_s in sorted(by_module.items(), key=lambda found: -found[1])[:20]:
        print(f"{own_s:8.3f} s  {module}")


def print_tables(rows: list[Row], gaps: list[Gap]) -> None:
    """Print what was found."""
    if rows:
        title = "CPU of the gateway is user + system, all threads"
        print(f"\n{title:<58}{'unit':>8}{'median':>10}{'min':>10}{'max':>10}{'aim':>10}")
    for row in rows:
        print(row.text())
    if gaps:
        title = "gaps between events of four streams, a token each 5 ms"
        print(f"\n{title:<58}{'posted':>8}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
    for gap in gaps:
        print(f"{gap.what:<58}{gap.posted:8d}{gap.p50_ms:10.1f}{gap.p99_ms:10.1f}{gap.max_ms:10.1f}")


def measure(asked: argparse.Namespace, stack: ExitStack, folder: Path) -> dict[str, Any]:
    """Start everything, run all rounds, and return what was found."""
    if asked.only == "report":
        found = reports(folder, asked.exchanges)
        print_reports(asked.exchanges, *found)
        return {"rows_a_second": found[0], "reports": msgspec.to_builtins(found[1])}
    bench = Bench(asked, stack, folder)
    bench.check()
    chosen = [phase for phase in phases(asked) if asked.only is None or asked.only in phase.name]
    rounds = 1 if asked.profile else asked.rounds
    print(f"gateway on core {bench.gateway_core}, all else on {bench.other_cores}; {rounds} rounds", flush=True)
    for phase in chosen:
        bench.run(msgspec.structs.replace(phase, requests=max(phase.concurrency, phase.requests // 8)))
    samples: dict[str, list[Sample]] = {phase.name: [] for phase in chosen}
    for number in range(rounds):
        for phase in chosen:
            sample = bench.run(phase)
            samples[phase.name].append(sample)
            print(f"  round {number + 1}  {phase.name:<22}{sample.cpu_us:10.1f} us a request", flush=True)
    gaps = []
    if asked.only == "big" or (asked.only is None and not asked.profile):
        seconds = asked.big_s
        gaps = [
            bench.gaps("nobody posts", 0, seconds),
            bench.gaps("bodies of 1 MB posted by two clients", MEGABYTE, seconds),
            bench.gaps("bodies of 16 MB posted by two clients", 16 * MEGABYTE, seconds),
            bench.gaps("16 MB, the streams pass the gateway by (noise)", 16 * MEGABYTE, seconds, direct=True),
        ]
    # Interrupted, it unwinds and writes its profile; terminated, it may end by the signal.
    bench.gateway.stop(signal.SIGINT)
    if bench.profile_file is not None:
        print_profile(bench.profile_file)
    rows = rows_of(samples) if asked.only is None else []
    print_tables(rows, gaps)
    return {
        "machine": {"python": platform.python_version(), "kernel": platform.release(), "cores": os.cpu_count()},
        "rows": msgspec.to_builtins(rows),
        "gaps": msgspec.to_builtins(gaps),
        "samples": msgspec.to_builtins(samples),
    }


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description="CPU time of the gateway for each request and each event.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000, help="whole requests of a phase")
    parser.add_argument("--streams", type=int, default=64, help="streams of a phase")
    parser.add_argument("--tokens", type=int, default=150, help="tokens of an answer")
    parser.add_argument("--interval-ms", type=float, default=5, help="between two tokens of a paced stream")
    parser.add_argument("--big-s", type=float, default=4, help="seconds of each row of gaps")
    parser.add_argument(
        "--only", help="only phases with this in their name, e.g. 'auto stream', or 'big', or 'report'; no table"
    )
    parser.add_argument("--exchanges", type=int, default=1_000_000, help="requests in the ledger that is reported on")
    parser.add_argument("--profile", action="store_true", help="one round with the gateway under cProfile; top 40")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            found = measure(asked, stack, Path(folder))
        except (DidNotStartError, ServerMissingError) as problem:
            sys.exit(f"bench: {problem}")
        if asked.json is not None:
            asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
