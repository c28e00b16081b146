"""What did it cost, whom, where and what for? Rows of the ledger in, a report out that adds up to the nano-dollar.

What a line says of money and tokens is of all calls of its requests: those whose answer was not shown too. By tier, by
backend or by model, money and tokens stand where the call was made; a request, its ending and what its answer would
have cost on the dearest tier (`baseline_nusd`) stand where the answer came from. Every part is counted once, so lines
add up to the total; only by tag they do not: a request with two tags stands in two lines.

`baseline_nusd` reprices the tokens of the answer that was shown. A larger model might have said more, or less.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from gateway.ledger import report_sql as sql
from gateway.ledger.contract import Reading, Store, Value
from gateway.ledger.report_query import (
    HOUR_MS,
    OF_ATTEMPTS,
    Dimension,
    Query,
    Span,
    bucket_start,
    spans_of,
)
from gateway.ledger.report_servers import Closings, Server, divided_idle, last_closings, servers_of
from gateway.ledger.report_sql import Names, integer, names_of

_K = TypeVar("_K")

MOST_LINES = 1_000_000
_DAY_HOURS = 24
_MANY_HOURS = 4 * _DAY_HOURS


class TooMuch(Exception):  # noqa: N818 - it is an answer to whoever asked
    """A report would have more lines than it may have. The message says what to ask for instead."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line: all requests of a bucket that have the same names.

    `names` are the values of the dimensions asked for, None for what has none. `start_ms` is when the bucket begins,
    None without buckets. Of `gpu_nusd`, `provisional_nusd` is of hours that are not closed; `adjusted_nusd` is what
    closed hours changed. `wasted_nusd` is what calls cost (adjusted) whose answer was not shown. `idle_nusd` is in none
    of these: what idle servers cost, as far as it is attributed to this line.
    """

    start_ms: int | None = None
    names: Names = ()
    exchanges: int = 0
    answered: int = 0
    failed: int = 0
    calls: int = 0
    estimated: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    input_nusd: int = 0
    cached_input_nusd: int = 0
    output_nusd: int = 0
    gpu_nusd: int = 0
    wasted_nusd: int = 0
    baseline_nusd: int = 0
    adjusted_nusd: int = 0
    provisional_nusd: int = 0
    idle_nusd: int = 0

    @property
    def cost_nusd(self) -> int:
        """What it came to, adjusted. Without idle servers."""
        return self.input_nusd + self.cached_input_nusd + self.output_nusd + self.gpu_nusd + self.adjusted_nusd

    @property
    def savings_nusd(self) -> int:
        """What was saved against asking the dearest tier alone; below 0 where it cost more."""
        return self.baseline_nusd - self.cost_nusd

    @property
    def cost_per_answer_nusd(self) -> int | None:
        """What an answer that was accepted cost, all that was wasted on the way included; None without one."""
        return None if self.answered == 0 else (2 * self.cost_nusd + self.answered) // (2 * self.answered)


_MEASURES: tuple[str, ...] = Line.__struct_fields__[2:]
_PLACES = {name: place for place, name in enumerate(_MEASURES)}
_SHIFTED = slice(_PLACES["prompt_tokens"], _PLACES["gpu_nusd"] + 1)
_MONEY = slice(_PLACES["input_nusd"], _PLACES["gpu_nusd"] + 1)
_CALLS, _WASTED = _PLACES["calls"], _PLACES["wasted_nusd"]
_ADJUSTED, _PROVISIONAL, _IDLE = _PLACES["adjusted_nusd"], _PLACES["provisional_nusd"], _PLACES["idle_nusd"]
_READ = 3 + len(sql.SUMMED)


class Refused(msgspec.Struct, frozen=True):
    """How many requests were refused for one reason."""

    code: str
    requests: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a query. `lines` are in order of time, then the dearest first.

    `total` is of all lines, each request once. `servers` are hours of GPU servers that began within the period, whoever
    used them; `idle_left_nusd` is what of their idle time is attributed to no line. `refused` is None where filters
    other than by key are set: a refused request has nothing else.
    """

    query: Query
    lines: tuple[Line, ...]
    total: Line
    servers: tuple[Server, ...]
    idle_left_nusd: int
    refused: tuple[Refused, ...] | None

    @property
    def outside_nusd(self) -> int:
        """What servers cost for work that was not tierway's."""
        return sum(one.outside_nusd for one in self.servers)


_Key = tuple[int, Names]
_Groups = dict[_Key, list[int]]


def read_report(store: Store, query: Query, *, readers: int = 1, most_lines: int = MOST_LINES) -> Report:
    """Read a report; blocks. With `readers` parts of the period are read at the same time, each as it is at a moment.

    Raises `LedgerDown`, and `TooMuch`.
    """
    spans = _shared_out(spans_of(query), readers)

    def read(span: Span) -> _Groups:
        with store.reading() as reading:
            return _Part(reading, query, span, most_lines).groups()

    groups: _Groups = {}
    with ThreadPoolExecutor(min(readers, len(spans))) as pool:
        for part in pool.map(read, spans):
            for key, amounts in part.items():
                _add(groups, key, amounts)
    hours = -(-query.since_ms // HOUR_MS), -(-query.until_ms // HOUR_MS)
    with store.reading() as reading:
        last = last_closings(reading, *hours)
        idle_left_nusd = _bear_idle(reading, query, last, groups)
        refused = _refused(reading, query)
    lines = _lines(query, groups)
    if len(lines) > most_lines:
        raise _too_much(most_lines)
    return Report(
        query=query,
        lines=lines,
        total=_line(None, (), _sum(groups.values())),
        servers=servers_of(last),
        idle_left_nusd=idle_left_nusd,
        refused=refused,
    )


def _shared_out(spans: Sequence[Span], readers: int) -> list[Span]:
    """Cut long spans of whole hours, so that there is one for every reader."""
    found: list[Span] = []
    for span in spans:
        hours = span.end_hour - span.first_hour
        parts = readers if span.whole and hours >= _MANY_HOURS else 1
        cuts = [span.first_hour + hours * one // parts for one in range(parts + 1)]
        found += (
            [
                Span(one, other, span.offset_ms, one * HOUR_MS, other * HOUR_MS)
                for one, other in itertools.pairwise(cuts)
            ]
            if parts > 1
            else [span]
        )
    return found


# -- requests and calls -----------------------------------------------------------------------------------------------


class _Part:
    """What is read of one span, in one moment. Groups carry all dimensions, those only filtered by too."""

    def __init__(self, reading: Reading, query: Query, span: Span, most_lines: int) -> None:
        self._reading = reading
        self._query = query
        self._span = span
        self._most = most_lines
        self._groups: _Groups = {}

    def groups(self) -> _Groups:
        dimensions = self._query.dimensions
        asked = self._span, self._query.bucket, dimensions, self._query.filters
        names = slice(1, 1 + len(dimensions))
        for row in self._rows(sql.exchanges(*asked)):
            self._find(row, names)[:_READ] = map(integer, row[names.stop :])
        if OF_ATTEMPTS & set(dimensions):
            self._move(sql.not_shown(*asked), len(dimensions))
        for row in self._rows(sql.adjustments(*asked)):
            amounts = self._find(row, names)
            amounts[_ADJUSTED] += integer(row[-2])
            amounts[_WASTED] += integer(row[-1])
        for backend, begin, end in _open_hours(self._reading, self._span):
            statement = sql.provisional(*asked, backend=backend, from_hour=begin, until_hour=end)
            for row in self._rows(statement):
                self._find(row, names)[_PROVISIONAL] += integer(row[-1])
        return self._groups

    def _move(self, statement: sql.Statement, count: int) -> None:
        """Move calls from where the answer came from to where they were made."""
        for row in self._rows(statement):
            answer = self._find(row, slice(1, 1 + count))
            call = self._find(row, slice(1 + count, 1 + 2 * count))
            calls, *parts = map(integer, row[1 + 2 * count :])
            money = sum(parts[4:])
            for amounts, sign in ((answer, -1), (call, 1)):
                amounts[_CALLS] += sign * calls
                amounts[_WASTED] += sign * money
                amounts[_SHIFTED] = [one + sign * part for one, part in zip(amounts[_SHIFTED], parts, strict=True)]

    def _rows(self, statement: sql.Statement) -> Iterator[tuple[Value, ...]]:
        return self._reading.rows(statement.sql, statement.values)

    def _find(self, row: tuple[Value, ...], names: slice) -> list[int]:
        key = (integer(row[0]), names_of(row[names]))
        found = self._groups.get(key)
        if found is None:
            if len(self._groups) >= self._most:
                raise _too_much(self._most)
            found = self._groups[key] = [0] * len(_MEASURES)
        return found


def _open_hours(reading: Reading, span: Span) -> Iterator[tuple[str, int, int]]:
    """Yield servers, the first hour and the end of time that is not closed, as far as a call of `span` may end."""
    closed: dict[str, set[int]] = {}
    end = span.end_hour + _DAY_HOURS
    for row in reading.rows(sql.closings(span.first_hour, end).sql):
        closed.setdefault(str(row[0]), set()).add(integer(row[1]))
    backend = ""
    while (found := next(reading.rows(sql.NEXT_SERVER, (backend,)))[0]) is not None:
        backend = str(found)
        begin: int | None = None
        for hour in range(span.first_hour, end):
            if hour in closed.get(backend, ()):
                if begin is not None:
                    yield backend, begin, hour
                begin = None
            elif begin is None:
                begin = hour
        if begin is not None:
            yield backend, begin, end


# -- beside the requests ----------------------------------------------------------------------------------------------


def _bear_idle(reading: Reading, query: Query, last: Closings, groups: _Groups) -> int:
    """Add what idle time is attributed to groups; return what is left."""
    left = sum(integer(row[6]) for row in last.values())
    matches = _matcher(query, query.dimensions)
    for number, names, nusd in divided_idle(reading, query, last):
        if matches(names):
            groups.setdefault((number, names), [0] * len(_MEASURES))[_IDLE] += nusd
            left -= nusd
    return left


def _refused(reading: Reading, query: Query) -> tuple[Refused, ...] | None:
    keys: set[str] = set()
    for one in query.filters:
        if one.dimension != "key":
            return None
        keys |= {value or "" for value in one.values}
    statement = sql.refusals(query.since_ms // HOUR_MS, -(-query.until_ms // HOUR_MS), sorted(keys))
    return tuple(Refused(str(code), integer(count)) for code, count in reading.rows(statement.sql, statement.values))


# -- lines ------------------------------------------------------------------------------------------------------------


def _lines(query: Query, groups: _Groups) -> tuple[Line, ...]:
    """Return the lines of groups; drops from `groups` what the filters by calls leave out."""
    dimensions = query.dimensions
    matches = _matcher(query, dimensions)
    for key in [key for key in groups if not matches(key[1])]:
        del groups[key]
    shown: dict[tuple[int | None, Names], list[int]] = {}
    count = len(query.by)
    starts = _Starts(query)
    for (number, names), amounts in groups.items():
        if not any(amounts):
            continue  # all of it was moved to where it belongs
        start_ms = starts.of(number)
        for one in _by_tag(query.by, names[:count]):
            _add(shown, (start_ms, one), amounts)
    found = [_line(start_ms, names, amounts) for (start_ms, names), amounts in shown.items()]
    found.sort(key=lambda one: (one.start_ms or 0, -one.cost_nusd, tuple(name or "" for name in one.names)))
    return tuple(found)


class _Starts:
    """When the bucket of a number begins."""

    def __init__(self, query: Query) -> None:
        self._bucket = query.bucket
        self._zone = query.zone
        self._known: dict[int, int] = {}

    def of(self, number: int) -> int | None:
        if self._bucket is None:
            return None
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = bucket_start(self._bucket, number, self._zone)
        return found


def _by_tag(by: Sequence[Dimension], names: Names) -> Iterator[Names]:
    if "tag" not in by:
        yield names
        return
    place = by.index("tag")
    for tag in _tags(names[place]) or (None,):
        yield (*names[:place], tag, *names[place + 1 :])


def _tags(text: str | None) -> tuple[str, ...]:
    return msgspec.json.decode(text, type=tuple[str, ...]) if text else ()


def _matcher(query: Query, dimensions: Sequence[Dimension]) -> Callable[[Names], bool]:
    """Return whether names pass all filters."""
    rules = [(dimensions.index(one.dimension), one.dimension, frozenset(one.values)) for one in query.filters]

    def matches(names: Names) -> bool:
        for place, dimension, values in rules:
            if dimension == "tag":
                if not values & set(_tags(names[place]) or (None,)):
                    return False
            elif names[place] not in values:
                return False
        return True

    return matches


def _line(start_ms: int | None, names: Names, amounts: Sequence[int]) -> Line:
    return Line(start_ms=start_ms, names=names, **dict(zip(_MEASURES, amounts, strict=True)))


def _add(groups: dict[_K, list[int]], key: _K, amounts: list[int]) -> None:
    found = groups.get(key)
    groups[key] = list(amounts) if found is None else [one + more for one, more in zip(found, amounts, strict=True)]


def _sum(some: Iterable[Sequence[int]]) -> Sequence[int]:
    return [sum(column) for column in zip(*some, strict=True)] or [0] * len(_MEASURES)


def _too_much(most: int) -> TooMuch:
    return TooMuch(
        f"the report has more than {most} lines; ask for a shorter period, larger buckets or fewer dimensions"
    )
