"""What did a model really generate, and for whom? A scripted upstream in this process that keeps books of its own.

A request says in its prompt how it is to be answered (`Plan`); nothing of the gateway's counting is believed. It speaks
as `loadtests/upstream.py` does and can, as vLLM, tell the usage in every event of a stream.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import msgspec
import uvloop

from loadtests.playing import Counts, Programme
from loadtests.transcript import Answer, Asked, Kind, Order, Script, encode
from loadtests.upstream import Connection, Request, Upstream

_PLAN = re.compile(rb"<<([\w-]+) (\d+) ((\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+))>>")
_TURNS = 4
_CONTINUOUS = b'"continuous_usage_stats":true'


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is to be answered; `tag` and `number` say which it is. `doubt`: the negative log of how sure."""

    tag: str
    number: int = 0
    tokens: int = 8
    prompt_tokens: int = 37
    interval_ms: float = 0
    delay_ms: float = 0
    doubt: float = 0.05

    @property
    def text(self) -> str:
        """The prompt that says so."""
        how = f"{self.tokens} {self.prompt_tokens} {self.interval_ms:g} {self.delay_ms:g} {self.doubt:g}"
        return f"<<{self.tag} {self.number} {how}>>"


class Served(msgspec.Struct, kw_only=True, eq=False):
    """One request that reached a model: what it generated. A stream that was left has what was sent of it."""

    tag: str
    number: int
    model: str
    prompt_tokens: int
    began_s: float
    tokens: int = 0
    ended_s: float | None = None
    whole: bool = False
    "It was answered to its end."


class Metered(Upstream):
    """An upstream that notes everything. With `tells` it tells the usage in every event where it is asked to."""

    def __init__(self, models: Iterable[str], *, tells: bool) -> None:
        super().__init__(list(models), Script(), 0)
        self.port = 0
        self.served: list[Served] = []
        self.peaks: Counter[str] = Counter()
        "The most that were open at a time, by tag and by model."
        self._by_tag: dict[str, set[Served]] = {}
        self._by_model: dict[str, set[Served]] = {}
        self._tells = tells
        self._played: dict[tuple[bytes, str, bool], Programme] = {}
        self.continuous = False
        "Whether the request that is being looked at asks for its usage in every event."

    def programme(self, asked: Asked) -> Programme:
        found = _PLAN.search(bytes(asked.messages))
        if found is None:
            return super().programme(asked)
        tells = self._tells and self.continuous
        known = found[3], asked.model, tells
        if known not in self._played:
            script = Script(
                tokens=int(found[4]),
                prompt_tokens=int(found[5]),
                interval_ms=float(found[6]),
                head_delay_ms=float(found[7]),
                # What is doubted is doubted of the small model.
                logprob=-float(found[8]) if asked.model == self.models[0] else -0.05,
            )
            self._played[known] = _Telling(script) if tells else Programme(script)
        return self._played[known]

    def begin(self, served: Served) -> None:
        """Note that a request is open, and beside which others.

        Of those that had left when this one came some are heard of a little later, as a connection that was reset is;
        so they are counted after a few turns of the loop.
        """
        self.served.append(served)
        for whose, mine in ((served.tag, self._by_tag), (served.model, self._by_model)):
            beside = mine.setdefault(whose, set())
            beside.add(served)
            self._later(_TURNS, whose, frozenset(beside))

    def _later(self, turns: int, whose: str, beside: frozenset[Served]) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._later, turns - 1, whose, beside)
        else:
            # One that climbs may have a call open on each of two tiers.
            still = {(one.number, one.tag) for one in beside if one.ended_s is None}
            self.peaks[whose] = max(self.peaks[whose], len(still))

    def end(self, served: Served) -> None:
        """Note that it is open no more."""
        served.ended_s = monotonic()
        self._by_tag[served.tag].remove(served)
        self._by_model[served.model].remove(served)

    def open(self, tag: str) -> int:
        """Return how many of a tag are open now."""
        return len(self._by_tag.get(tag, ()))

    def of(self, tag: str) -> list[Served]:
        """Return what was served for one tag."""
        return [one for one in self.served if one.tag == tag]


class _Telling(Programme):
    """A programme whose events carry the usage so far, as vLLM's do with `continuous_usage_stats`."""

    def answer(self, order: Order) -> Answer:
        found = super().answer(order)
        if not order.stream or any(b'"usage"' in rest for rest, token in found.events[:1] if not token):
            return found
        told: list[tuple[bytes, int]] = []
        tokens = 0
        for rest, token in found.events:
            tokens += token > 0
            if b'"usage":{' in rest:
                told.append((rest, token))
                continue
            usage = {
                "prompt_tokens": self.script.prompt_tokens,
                "total_tokens": self.script.prompt_tokens + tokens,
                "completion_tokens": tokens,
            }
            told.append((rest.removesuffix(b"}\n\n") + b',"usage":' + encode(usage) + b"}\n\n", token))
        return msgspec.structs.replace(found, events=told)


class _Connection(Connection):
    """A connection that notes what becomes of each of its requests."""

    def __init__(self, upstream: Metered) -> None:
        super().__init__(upstream)
        self._metered = upstream
        self._own = Counts()
        self._served: Served | None = None

    @property
    def counts(self) -> Counts:
        return self._own

    def _complete(self, kind: Kind, request: Request) -> None:
        found = _PLAN.search(request.body)
        if found is not None:
            asked = self._metered.decode(request.body)
            self._served = Served(
                tag=found[1].decode(),
                number=int(found[2]),
                model=asked.model,
                prompt_tokens=int(found[5]),
                began_s=monotonic(),
            )
            self._own.tokens = 0
            self._metered.begin(self._served)
        self._metered.continuous = _CONTINUOUS in request.body.replace(b" ", b"")
        super()._complete(kind, request)

    def answered(self) -> None:
        self._close(whole=True)
        super().answered()

    def failed(self, *, reset: bool) -> None:
        self._close(whole=False)
        super().failed(reset=reset)

    def _peer_left(self) -> None:
        self._close(whole=False)
        super()._peer_left()

    def _close(self, *, whole: bool) -> None:
        served, self._served = self._served, None
        if served is not None:
            served.tokens, served.whole = self._own.tokens, whole
            self._metered.end(served)


@contextmanager
def metered(*models: str, tells: bool = True, kind: type[Metered] = Metered) -> Iterator[Metered]:
    """Run an upstream in a thread of its own, with an event loop of its own."""
    upstream = kind(models, tells=tells)
    ready, loops = threading.Event(), list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]()

    async def serve() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(upstream), "127.0.0.1", 0, backlog=1024)
        upstream.port = server.sockets[0].getsockname()[1]
        loops.append((loop, stopped))
        ready.set()
        await stopped.wait()
        server.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield upstream
    finally:
        ((loop, stopped),) = loops
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)


def chat_fields(plan: Plan, *, filler: int = 0) -> dict[str, Any]:
    """Return the messages that ask for `plan`, longer by `filler` characters."""
    return {"messages": [{"role": "user", "content": plan.text + "x" * filler}]}
