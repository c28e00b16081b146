"""What will a token on a server that costs by the hour come to? What it lately did in, a provisional price out.

    price of a unit of work = price of the hour * time at work / (an hour * work done in that time)

Only the time at work counts: on a server that is nearly idle a token is as dear as when it is alone there, and no
dearer, because idle time is nobody's. Work is counted in thousandths of a prompt token (`policies/gpu.py`); what a
completion token is worth is measured of the runs themselves:

    weight = time of a completion token / time of a prompt token

* The time of a prompt token is the slope of the time to the first token over the length of prompts (Theil and Sen: the
  median of the slopes of all pairs), of the runs that met the fewest others.
* The time of a completion token is the median of the time between two tokens, divided by how many runs were under way
  meanwhile: a server works on them at the same time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate, combinations

import msgspec

from policies.gpu import HOUR_MS, PROMPT_WEIGHT, Part, Run, Span, Worked, apart, joined, work, worked

FIRST_DECODE_WEIGHT = 10_000
"""Before it is measured: a server reads about ten times as many tokens in a second as it writes."""

_LEAST_WEIGHT, _MOST_WEIGHT = 500, 1_000_000
_MOST_RUNS = 800
_MOST_PAIRED = 200
_ENOUGH_RUNS = 16
_ENOUGH_PAIRS = 50
_FAR_TOKENS = 32
"""Prompts that differ by less say nothing of what a token takes."""
_LONG_MS = 20
_NS_PER_MS = 1_000_000

_MINUTE_MS = 60_000
_KEPT_MINUTES = 60
_ENOUGH_BUSY_MS = 5_000
_MOST_LOADED = 10
"""Idle time that is loaded on requests makes a token at most so many times dearer, until the hour is closed."""


class TokenPrice(msgspec.Struct, frozen=True):
    """Nano-dollars per million tokens. A cached prompt token is no work."""

    input_nusd: int
    output_nusd: int


def decode_weight(runs: Iterable[Run]) -> int | None:
    """Return what a completion token takes, in thousandths of a prompt token; None where the runs do not tell."""
    runs = tuple(runs)
    crowd = _Crowd([run.span for run in runs])
    usable = [run for run in runs if _tells(run)]
    usable = usable[:: max(1, -(-len(usable) // _MOST_RUNS))]
    if len(usable) < _ENOUGH_RUNS:
        return None
    reading_ns = _prompt_token_ns(usable, crowd)
    writing_ns = _median([_completion_token_ns(run, crowd) for run in usable])
    if reading_ns is None or writing_ns <= 0:
        return None
    return min(_MOST_WEIGHT, max(_LEAST_WEIGHT, PROMPT_WEIGHT * writing_ns // reading_ns))


def blended(before: int | None, now: int | None) -> int:
    """Return the weight to go by: a new measurement counts for a quarter, the first one for all."""
    if now is None:
        return FIRST_DECODE_WEIGHT if before is None else before
    return now if before is None else (3 * before + now) // 4


def _tells(run: Run) -> bool:
    first = run.first_token_ms
    return (
        first is not None and run.completion_tokens > 1 and run.started_ms <= first and run.ended_ms - first >= _LONG_MS
    )


def _prompt_token_ns(runs: Sequence[Run], crowd: _Crowd) -> int | None:
    """Return nanoseconds for each more prompt token."""
    seen = sorted(
        (crowd.met(Span(run.started_ms, _first(run))), number, run.prompt_tokens, _first(run) - run.started_ms)
        for number, run in enumerate(runs)
    )
    points = [(tokens, took_ms) for _, _, tokens, took_ms in seen[:_MOST_PAIRED]]
    slopes = [
        _NS_PER_MS * (y2 - y1) // (x2 - x1)
        for (x1, y1), (x2, y2) in combinations(points, 2)
        if abs(x2 - x1) >= _FAR_TOKENS
    ]
    if len(slopes) < _ENOUGH_PAIRS:
        return None
    slope_ns = _median(slopes)
    return slope_ns if slope_ns > 0 else None


def _completion_token_ns(run: Run, crowd: _Crowd) -> int:
    writing = Span(_first(run), run.ended_ms)
    return _NS_PER_MS * writing.ms * 1000 // ((run.completion_tokens - 1) * max(1000, crowd.met(writing)))


def _first(run: Run) -> int:
    return run.started_ms if run.first_token_ms is None else run.first_token_ms


def _median(numbers: Sequence[int]) -> int:
    return sorted(numbers)[len(numbers) // 2]


class _Crowd:
    """How many runs are under way, at any time."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._starts = sorted(span.from_ms for span in spans)
        self._ends = sorted(span.until_ms for span in spans)
        self._start_sums = [0, *accumulate(self._starts)]
        self._end_sums = [0, *accumulate(self._ends)]

    def met(self, span: Span) -> int:
        """Return how many there were on average in a span, in thousandths."""
        if span.ms <= 0:
            return 1000 * (bisect_right(self._starts, span.from_ms) - bisect_right(self._ends, span.from_ms))
        return 1000 * (self._until(span.until_ms) - self._until(span.from_ms)) // span.ms

    def _until(self, at_ms: int) -> int:
        """Return how long all runs together took before a moment."""
        begun = bisect_right(self._starts, at_ms)
        ended = bisect_right(self._ends, at_ms)
        return begun * at_ms - self._start_sums[begun] - (ended * at_ms - self._end_sums[ended])


class _Minute:
    """What happened in a minute: runs that ended in it, when any were under way, and what watchers saw of it."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.ran: list[Span] = []
        self.parts: dict[tuple[str, int], Part] = {}


class Trail:
    """The minutes in which a server was lately at work, the last 60 of them, however long ago."""

    def __init__(self) -> None:
        self._minutes: dict[int, _Minute] = {}
        self._runs: deque[Run] = deque(maxlen=_MOST_RUNS)

    @property
    def runs(self) -> Sequence[Run]:
        """The last runs, to measure by."""
        return self._runs

    def saw_run(self, run: Run) -> None:
        """Take in a run that has ended. Its tokens belong to its last minute."""
        span = run.span
        self._runs.append(run)
        last = self._minute(span.until_ms)
        last.prompt_tokens += run.prompt_tokens
        last.completion_tokens += run.completion_tokens
        # One that lasted for longer than what is kept counts no further back.
        first = max(span.from_ms // _MINUTE_MS, span.until_ms // _MINUTE_MS - _KEPT_MINUTES)
        for number in range(first, span.until_ms // _MINUTE_MS + 1):
            from_ms = number * _MINUTE_MS
            self._minute(from_ms).ran.append(Span(max(span.from_ms, from_ms), min(span.until_ms, from_ms + _MINUTE_MS)))
        self._tidy()

    def saw_part(self, part: Part) -> None:
        """Take in what a watcher saw of a minute, or again with more of it. A part lies in one minute."""
        self._minute(part.span.from_ms).parts[part.watcher, part.span.from_ms] = part
        self._tidy()

    def price(
        self, hour_nusd: int, *, decode_weight: int, now_ms: int, idle_on_runs: bool = False
    ) -> TokenPrice | None:
        """Return what tokens cost by what was seen, rounded to two digits; None before enough was."""
        took_ms, done = self._measured(decode_weight)
        if took_ms < _ENOUGH_BUSY_MS or not done:
            return None
        if idle_on_runs:
            since_ms = min(self._minutes) * _MINUTE_MS
            took_ms = min(_MOST_LOADED * took_ms, max(took_ms, now_ms - since_ms))
        whole_nusd = hour_nusd * took_ms * 1_000_000
        return TokenPrice(
            input_nusd=_rounded(whole_nusd * PROMPT_WEIGHT // (HOUR_MS * done)),
            output_nusd=_rounded(whole_nusd * decode_weight // (HOUR_MS * done)),
        )

    def _measured(self, decode_weight: int) -> tuple[int, int]:
        """Return for how long it was at work, and the work it did."""
        ours = watched_ours = seen = 0
        time = Worked()
        for number, minute in self._minutes.items():
            span = Span(number * _MINUTE_MS, (number + 1) * _MINUTE_MS)
            minute.ran = joined(minute.ran)
            parts = apart(minute.parts.values())
            watched = joined(part.span for part in parts)
            time += worked(span, minute.ran, watched, parts)
            units = work(minute.prompt_tokens, minute.completion_tokens, decode_weight)
            ours += units
            if parts:
                watched_ours += units
                seen += sum(work(part.prompt_tokens, part.completion_tokens, decode_weight) for part in parts)
        return time.busy_ms, ours - watched_ours + max(watched_ours, seen)

    def _minute(self, at_ms: int) -> _Minute:
        return self._minutes.setdefault(at_ms // _MINUTE_MS, _Minute())

    def _tidy(self) -> None:
        while len(self._minutes) > _KEPT_MINUTES:
            del self._minutes[min(self._minutes)]


def moved(before: TokenPrice | None, now: TokenPrice) -> bool:
    """Whether a price is to be replaced: less than a tenth more or less is not worth a new version."""
    if before is None:
        return True
    pairs = ((before.input_nusd, now.input_nusd), (before.output_nusd, now.output_nusd))
    return any(10 * abs(new - old) > old for old, new in pairs)


def _rounded(number: int) -> int:
    unit = int(10 ** max(0, len(str(number)) - 2))
    return (number + unit // 2) // unit * unit
