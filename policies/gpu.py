"""Who pays what of an hour of a server? The price of the hour and what ran in it in, integer nano-dollars out.

A server costs by the hour, whether it works or not. For every hour

    the shares of our runs + idle + the share of work from outside = the price of the hour,

to the nano-dollar, whatever the runs look like. Rules a reader must not break:

* Everything here is integers: milliseconds, tokens, thousandths of a prompt token's work, nano-dollars.
* What an amount spread over time comes to before a moment is rounded down, and a part of it is the difference of two
  such numbers. So the parts of a run in all its hours add up to the run, however its hours are cut.
* What a run was billed before an hour is closed is spread over its time alone, and not over its work: it must come to
  the same whenever it is asked for, also when a later revision of another hour weighs work in another way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

import msgspec

HOUR_MS = 3_600_000
PROMPT_WEIGHT = 1000
"""The work of a prompt token that was not cached. That of a completion token is the weight of its model."""

RunId = tuple[str, int]
"""An exchange and the number of the attempt in it."""


class Span(msgspec.Struct, frozen=True):
    """A time from one moment until just before another, in milliseconds since the epoch."""

    from_ms: int
    until_ms: int

    @property
    def ms(self) -> int:
        """How long it is."""
        return self.until_ms - self.from_ms


class Run(msgspec.Struct, frozen=True):
    """An attempt at the server: prompt tokens without cached ones, and what it was billed before the hour was closed.

    A `first_token_ms` outside of the run is none, and one that ended before it began took no time.
    """

    id: RunId
    started_ms: int
    first_token_ms: int | None
    ended_ms: int
    prompt_tokens: int
    completion_tokens: int
    billed_nusd: int

    @property
    def span(self) -> Span:
        """The time that it took."""
        return Span(self.started_ms, max(self.started_ms, self.ended_ms))

    def billed_within(self, span: Span) -> int:
        """Return the part of what it was billed that falls into a span."""
        return _within(self.billed_nusd, self.span, span)

    def tokens_within(self, span: Span) -> tuple[int, int]:
        """Return its prompt and completion tokens in a span: read until the first token came, written from then on."""
        whole = self.span
        if span.from_ms <= whole.from_ms and whole.until_ms < span.until_ms:
            return self.prompt_tokens, self.completion_tokens
        read = wrote = whole
        if self.first_token_ms is not None and whole.from_ms <= self.first_token_ms < whole.until_ms:
            read, wrote = Span(whole.from_ms, self.first_token_ms), Span(self.first_token_ms, whole.until_ms)
        return _within(self.prompt_tokens, read, span), _within(self.completion_tokens, wrote, span)


class Part(msgspec.Struct, frozen=True):
    """What the server's own counters said of a span, as `watcher` saw them. `busy_ms` is how long it was at work."""

    watcher: str
    span: Span
    prompt_tokens: int
    completion_tokens: int
    busy_ms: int


class Worked(msgspec.Struct, frozen=True, kw_only=True):
    """For how long a server was at work: for our runs, while nobody watched it and while somebody did, and as seen."""

    unwatched_ms: int = 0
    watched_ms: int = 0
    seen_ms: int = 0

    @property
    def busy_ms(self) -> int:
        """All of it.

        While it was watched the longer of both counts: our runs are known to the millisecond, but what others ask of
        it is only seen by sampling. Samples are right in the sum and not one by one, so sums are compared.
        """
        return self.unwatched_ms + max(self.watched_ms, self.seen_ms)

    def __add__(self, other: Worked) -> Worked:
        return Worked(
            unwatched_ms=self.unwatched_ms + other.unwatched_ms,
            watched_ms=self.watched_ms + other.watched_ms,
            seen_ms=self.seen_ms + other.seen_ms,
        )


class Share(msgspec.Struct, frozen=True):
    """What a run pays of an hour."""

    id: RunId
    nusd: int


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """An hour, divided: the sum of `shares`, `idle_nusd` and `outside_nusd` is the price of the hour."""

    shares: tuple[Share, ...]
    idle_nusd: int
    outside_nusd: int
    busy_ms: int

    @property
    def shares_nusd(self) -> int:
        """What all runs pay together."""
        return sum(share.nusd for share in self.shares)


class Paid(msgspec.Struct, frozen=True):
    """What a run was told of an hour so far: its share by the last revision, and the sum of all changes."""

    share_nusd: int
    changed_nusd: int


_NOTHING = Paid(0, 0)


class Change(msgspec.Struct, frozen=True):
    """What is added to the bill of a run, and the share of the hour that it pays then."""

    id: RunId
    share_nusd: int
    change_nusd: int


def split_hour(
    hour: Span,
    hour_nusd: int,
    runs: Sequence[Run],
    parts: Iterable[Part],
    *,
    decode_weight: int,
    idle_on_runs: bool = False,
) -> Split:
    """Divide the price of an hour by the work done in it.

    `runs` are all that overlap the hour, `parts`, which lie in it, what watchers saw. `decode_weight` is the work of a
    completion token in thousandths of that of a prompt token. The time in which nothing ran is idle, unless it is
    loaded on what did run (`idle_on_runs`), work from outside included. With nothing to divide by, all of it is idle.
    """
    # Of equal remainders the earlier id comes first, and work from outside last.
    runs = sorted(runs, key=attrgetter("id"))
    watched = apart(parts)
    spans = joined(part.span for part in watched)
    busy_ms = min(hour.ms, worked(hour, joined(run.span for run in runs), spans, watched).busy_ms)
    units = [work(*run.tokens_within(hour), decode_weight) for run in runs]
    units.append(work(*_from_outside(runs, watched, spans), decode_weight))
    idle_nusd = 0 if idle_on_runs else hour_nusd * (hour.ms - busy_ms) // hour.ms
    if not any(units):
        idle_nusd, nusd = hour_nusd, units
    else:
        nusd = apportioned(hour_nusd - idle_nusd, units)
    return Split(
        shares=tuple(Share(run.id, share) for run, share in zip(runs, nusd[:-1], strict=True)),
        idle_nusd=idle_nusd,
        outside_nusd=nusd[-1],
        busy_ms=busy_ms,
    )


def changes(hour: Span, runs: Iterable[Run], split: Split, paid: Mapping[RunId, Paid]) -> list[Change]:
    """Return what must be added to the bills of an hour, so that each run has paid its share and no more.

    `paid` is what earlier revisions of this hour told. Of those only what is new is returned, also for a run that is
    no longer in the hour.
    """
    provisional = {run.id: run.billed_within(hour) for run in runs}
    found = []
    for share in split.shares:
        told = paid.get(share.id, _NOTHING)
        change = share.nusd - provisional[share.id] - told.changed_nusd
        if change or told.share_nusd != share.nusd:
            found.append(Change(share.id, share.nusd, change))
    found += [
        Change(id_, 0, -told.changed_nusd)
        for id_, told in sorted(paid.items())
        if id_ not in provisional and told != _NOTHING
    ]
    return found


def work(prompt_tokens: int, completion_tokens: int, decode_weight: int) -> int:
    """Return work in thousandths of that of a prompt token."""
    return PROMPT_WEIGHT * prompt_tokens + decode_weight * completion_tokens


def apportioned(amount: int, weights: Sequence[int]) -> list[int]:
    """Divide an amount by weights, the last units to the largest remainders, of equal ones to the first.

    The parts add up to the amount. Weights are not negative, and one of them is not 0.
    """
    whole = sum(weights)
    shares = [amount * weight // whole for weight in weights]
    remainders = [amount * weight % whole for weight in weights]
    # Sorting is stable, in reverse too: of equal ones the first stays first.
    order = sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)
    for one in order[: amount - sum(shares)]:
        shares[one] += 1
    return shares


def joined(spans: Iterable[Span]) -> list[Span]:
    """Return the time that is in any of these spans, in order and without overlap."""
    found: list[Span] = []
    from_ms = until_ms = None
    for span in sorted(spans, key=attrgetter("from_ms")):
        if until_ms is not None and span.from_ms <= until_ms:
            until_ms = max(until_ms, span.until_ms)
            continue
        if from_ms is not None and until_ms is not None:
            found.append(Span(from_ms, until_ms))
        from_ms, until_ms = span.from_ms, span.until_ms
    if from_ms is not None and until_ms is not None:
        found.append(Span(from_ms, until_ms))
    return found


def apart(parts: Iterable[Part]) -> list[Part]:
    """Choose parts that do not overlap, so that what several watchers saw counts once.

    Whoever watched longest is believed; the others only fill the gaps.
    """
    parts = [part for part in parts if part.span.ms > 0]
    watched_ms: dict[str, int] = {}
    for part in parts:
        watched_ms[part.watcher] = watched_ms.get(part.watcher, 0) + part.span.ms
    chosen: list[Part] = []
    taken: list[Span] = []
    for watcher in sorted(watched_ms, key=lambda one: (-watched_ms[one], one)):
        free_from = 0
        for part in sorted((one for one in parts if one.watcher == watcher), key=_in_order):
            if part.span.from_ms >= free_from and not _overlaps(part.span, taken):
                chosen.append(part)
                free_from = part.span.until_ms
        taken = joined(part.span for part in chosen)
    return sorted(chosen, key=lambda part: part.span.from_ms)


def worked(within: Span, ran: Sequence[Span], watched: Sequence[Span], parts: Iterable[Part]) -> Worked:
    """Return when a server was at work, of the time `within`.

    `ran` is when our runs were under way and `watched` when the server was watched, both joined.
    """
    ours_ms = _common_ms(ran, [within])
    ours_watched_ms = _common_ms(_cut(ran, within), watched)
    return Worked(
        unwatched_ms=ours_ms - ours_watched_ms,
        watched_ms=ours_watched_ms,
        seen_ms=sum(min(part.busy_ms, part.span.ms) for part in parts),
    )


def _from_outside(runs: Sequence[Run], parts: Sequence[Part], watched: Sequence[Span]) -> tuple[int, int]:
    """Return the tokens that the server counted and that are not ours."""
    prompt_tokens = sum(part.prompt_tokens for part in parts)
    completion_tokens = sum(part.completion_tokens for part in parts)
    ends_ms = [span.until_ms for span in watched]
    for run in runs:
        for span in watched[bisect_left(ends_ms, run.started_ms) :]:
            if span.from_ms > run.span.until_ms:
                break
            read, wrote = run.tokens_within(span)
            prompt_tokens -= read
            completion_tokens -= wrote
    return max(0, prompt_tokens), max(0, completion_tokens)


def _within(amount: int, spread: Span, span: Span) -> int:
    return _before(amount, spread, span.until_ms) - _before(amount, spread, span.from_ms)


def _before(amount: int, spread: Span, at_ms: int) -> int:
    if at_ms <= spread.from_ms:
        return 0
    if at_ms >= spread.until_ms:
        return amount
    return amount * (at_ms - spread.from_ms) // spread.ms


def _cut(spans: Iterable[Span], within: Span) -> list[Span]:
    cut = (Span(max(one.from_ms, within.from_ms), min(one.until_ms, within.until_ms)) for one in spans)
    return [one for one in cut if one.ms > 0]


def _common_ms(one: Sequence[Span], other: Sequence[Span]) -> int:
    """Return how long two lists of joined spans overlap."""
    total_ms = here = there = 0
    while here < len(one) and there < len(other):
        mine, yours = one[here], other[there]
        total_ms += max(0, min(mine.until_ms, yours.until_ms) - max(mine.from_ms, yours.from_ms))
        if mine.until_ms <= yours.until_ms:
            here += 1
        else:
            there += 1
    return total_ms


def _in_order(part: Part) -> tuple[int, ...]:
    return part.span.from_ms, -part.span.until_ms, part.prompt_tokens, part.completion_tokens, part.busy_ms


def _overlaps(span: Span, taken: Sequence[Span]) -> bool:
    return _common_ms([span], taken) > 0
