"""With which words is the ledger asked? The statements of a report, one text for SQLite and PostgreSQL.

Rules a reader must not break:

* What a caller says goes in as a value; only numbers and column names of ours stand in a text.
* What the index `exchanges_reported` has in its first columns is grouped within every hour first: that takes no
  sorting, and what is left to sort is some thousand rows in place of a million.
"""
# ruff: noqa: S608 - names and numbers of ours, see above

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from gateway.ledger.contract import Value
from gateway.ledger.report_query import DAY_MS, HOUR_MS, Bucket, Dimension, Filter, Span

Names = tuple[str | None, ...]

COLUMNS: dict[Dimension, str] = {
    "key": "key_name",
    "team": "team",
    "user": "user_name",
    "tag": "tags",
    "route": "route",
    "asked": "asked",
    "endpoint": "endpoint",
    "outcome": "outcome",
    "tier": "tier",
    "backend": "backend",
    "model": "model",
}
SUMMED = (
    "calls",
    "estimated",
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "input_nusd",
    "cached_input_nusd",
    "output_nusd",
    "gpu_nusd",
    "wasted_nusd",
    "baseline_nusd",
)
_OF_CALLS = SUMMED[2:10]
_GROUPED_FIRST = ("key_name", "team", "route")
_ANSWERED = "CASE WHEN outcome = 'answered' THEN 1 ELSE 0 END"
_FAILED = "CASE WHEN outcome IN ('broken', 'exhausted', 'lost') THEN 1 ELSE 0 END"
_OF_ADJUSTMENTS: frozenset[Dimension] = frozenset(("key", "team", "route", "tier", "backend"))


class Statement(msgspec.Struct, frozen=True):
    """A text and its values."""

    sql: str
    values: tuple[Value, ...] = ()


def integer(value: Value) -> int:
    """Return a number that was read: PostgreSQL adds up in decimals, and nothing comes to None."""
    return int(value) if value is not None else 0


def names_of(values: Sequence[Value]) -> Names:
    """Return names that were read."""
    return tuple([None if value is None else str(value) for value in values])


def bucket_number(bucket: Bucket | None, span: Span, table: str = "") -> str:
    """Return the expression for what `report_query.bucket_of` returns."""
    if bucket is None:
        return "0"
    begun_ms = span.offset_ms % HOUR_MS
    if bucket == "hour":
        return (
            f"({table}at_ms + {begun_ms}) / {HOUR_MS} * {HOUR_MS} - {begun_ms}"
            if begun_ms
            else f"{table}at_hour * {HOUR_MS}"
        )
    if begun_ms:
        return f"({table}at_ms + {span.offset_ms}) / {DAY_MS}"
    return f"({table}at_hour + {span.offset_ms // HOUR_MS}) / 24"


def within(span: Span, table: str = "") -> str:
    """Return the condition that a request came within a span."""
    hours = f"{table}at_hour >= {span.first_hour} AND {table}at_hour < {span.end_hour}"
    if span.whole:
        return hours
    return f"{hours} AND {table}at_ms >= {span.since_ms} AND {table}at_ms < {span.until_ms}"


def exchanges(
    span: Span, bucket: Bucket | None, dimensions: Sequence[Dimension], filters: Sequence[Filter]
) -> Statement:
    """Bucket, names, then: requests, answered, failed, and the sums of `SUMMED`."""
    columns = [COLUMNS[one] for one in dimensions]
    number = bucket_number(bucket, span)
    condition, values = _where(span, filters)
    if not set(columns) <= set(_GROUPED_FIRST) or "at_ms" in number:
        sums = ", ".join((f"SUM({_ANSWERED})", f"SUM({_FAILED})", *(f"SUM({one})" for one in SUMMED)))
        return Statement(
            f"SELECT {_list(number, *columns)}, COUNT(*), {sums} FROM exchanges WHERE {condition} "
            f"GROUP BY {_places(1 + len(columns))}",
            values,
        )
    first = _GROUPED_FIRST[: max((_GROUPED_FIRST.index(one) + 1 for one in columns), default=0)]
    inner = ", ".join(("at_hour", *first))
    sums = ", ".join(f"SUM({one}) AS {one}" for one in SUMMED)
    outer = ", ".join(f"SUM({one})" for one in ("requests", "answered", "failed", *SUMMED))
    return Statement(
        f"SELECT {_list(number, *columns)}, {outer} FROM ("
        f"SELECT {inner}, COUNT(*) AS requests, SUM({_ANSWERED}) AS answered, SUM({_FAILED}) AS failed, {sums} "
        f"FROM exchanges WHERE {condition} GROUP BY {inner}"
        f") AS grouped GROUP BY {_places(1 + len(columns))}",
        values,
    )


def not_shown(
    span: Span, bucket: Bucket | None, dimensions: Sequence[Dimension], filters: Sequence[Filter]
) -> Statement:
    """Bucket, names as of the answer, names as of the call, then: calls, and the sums of tokens and money of the calls.

    Calls whose answer was not shown: those that `exchanges` counts where the answer came from.
    """
    shown = [f"e.{COLUMNS[one]}" for one in dimensions]
    called = [f"{'a' if one in ('tier', 'backend', 'model') else 'e'}.{COLUMNS[one]}" for one in dimensions]
    condition, values = _where(span, filters, "e.")
    sums = ", ".join(f"SUM(a.{one})" for one in _OF_CALLS)
    return Statement(
        f"SELECT {_list(bucket_number(bucket, span, 'e.'), *shown, *called)}, "
        f"SUM(CASE WHEN a.outcome <> 'full' THEN 1 ELSE 0 END), {sums} "
        "FROM exchanges e JOIN attempts a ON a.exchange_id = e.exchange_id "
        f"AND (e.served IS NULL OR a.number <> e.served) "
        f"WHERE {condition} AND (e.calls <> 1 OR e.tier IS NULL) GROUP BY {_places(1 + 2 * len(dimensions))}",
        values,
    )


def adjustments(
    span: Span, bucket: Bucket | None, dimensions: Sequence[Dimension], filters: Sequence[Filter]
) -> Statement:
    """Bucket, names, then: the sum of all changes, and that of calls whose answer was not shown."""
    columns, joins = _named_by_adjustments(dimensions, filters)
    condition, values = _where(span, filters, "j.", joined="e.")
    number = bucket_number(bucket, span, "j.")
    lost = "CASE WHEN j.shown = 0 THEN j.change_nusd ELSE 0 END"
    if joins or "at_ms" in number or not set(dimensions) <= {"key", "team", "route"}:
        return Statement(
            f"SELECT {_list(number, *columns)}, SUM(j.change_nusd), SUM({lost}) FROM adjustments j {joins} "
            f"WHERE {condition} GROUP BY {_places(1 + len(columns))}",
            values,
        )
    names = [COLUMNS[one] for one in dimensions]
    first = _GROUPED_FIRST[: max((_GROUPED_FIRST.index(one) + 1 for one in names), default=0)]
    inner = ", ".join(("at_hour", *first))
    return Statement(
        f"SELECT {_list(bucket_number(bucket, span), *names)}, SUM(change_nusd), SUM(lost_nusd) FROM ("
        f"SELECT {inner}, SUM(j.change_nusd) AS change_nusd, SUM({lost}) AS lost_nusd "
        f"FROM adjustments j WHERE {condition} GROUP BY {inner}"
        f") AS grouped GROUP BY {_places(1 + len(names))}",
        values,
    )


def provisional(
    span: Span,
    bucket: Bucket | None,
    dimensions: Sequence[Dimension],
    filters: Sequence[Filter],
    *,
    backend: str,
    from_hour: int,
    until_hour: int,
) -> Statement:
    """Bucket, names, then what calls of a server cost that ended in hours that are not closed."""
    names = [f"{'a' if one in ('tier', 'backend', 'model') else 'e'}.{COLUMNS[one]}" for one in dimensions]
    condition, values = _where(span, filters, "e.")
    return Statement(
        f"SELECT {_list(bucket_number(bucket, span, 'e.'), *names)}, SUM(a.gpu_nusd) "
        # In this order: the few calls of an open hour first.
        "FROM attempts a CROSS JOIN exchanges e WHERE e.exchange_id = a.exchange_id "
        f"AND a.gpu_nusd <> 0 AND a.backend = ? AND a.ended_ms >= {from_hour * HOUR_MS} "
        f"AND a.ended_ms < {until_hour * HOUR_MS} AND {condition} GROUP BY {_places(1 + len(names))}",
        (backend, *values),
    )


def work_shares(first_hour: int, end_hour: int, dimensions: Sequence[Dimension], *, revised: bool) -> Statement:
    """Server, hour, names, then the shares of that server's hour, of all who had one."""
    columns, joins = _named_by_adjustments(dimensions, ())
    latest = (
        "AND NOT EXISTS (SELECT 1 FROM adjustments l WHERE l.exchange_id = j.exchange_id AND l.number = j.number "
        "AND l.hour = j.hour AND l.revision > j.revision)"
        if revised
        else ""
    )
    return Statement(
        f"SELECT {_list('j.backend', 'j.hour', *columns)}, SUM(j.share_nusd) FROM adjustments j {joins} "
        f"WHERE j.hour >= {first_hour} AND j.hour < {end_hour} {latest} GROUP BY {_places(2 + len(columns))}"
    )


def closings(first_hour: int, end_hour: int) -> Statement:
    """Server, hour, revision, tier, price of the hour, shares, idle, outside, busy ms; the last revision comes last."""
    return Statement(
        "SELECT backend, hour, revision, tier, hour_nusd, shares_nusd, idle_nusd, outside_nusd, busy_ms "
        f"FROM closings WHERE hour >= {first_hour} AND hour < {end_hour} ORDER BY backend, hour, revision"
    )


def refusals(first_hour: int, end_hour: int, keys: Collection[str]) -> Statement:
    """Code, requests."""
    condition = f"AND key_name IN ({', '.join('?' * len(keys))}) " if keys else ""
    return Statement(
        f"SELECT code, SUM(requests) FROM refusals WHERE hour >= {first_hour} AND hour < {end_hour} {condition}"
        "GROUP BY code ORDER BY 2 DESC, 1",
        tuple(keys),
    )


NEXT_SERVER = "SELECT MIN(backend) FROM attempts WHERE gpu_nusd <> 0 AND backend > ?"


def _named_by_adjustments(dimensions: Sequence[Dimension], filters: Sequence[Filter]) -> tuple[list[str], str]:
    """Return the columns of names, and what must be joined to have them."""
    wanted = {*dimensions, *(one.dimension for one in filters)} - _OF_ADJUSTMENTS
    joins = ""
    if wanted - {"model"}:
        joins = "JOIN exchanges e ON e.exchange_id = j.exchange_id "
    if "model" in wanted:
        joins += "JOIN attempts a ON a.exchange_id = j.exchange_id AND a.number = j.number"

    def table(one: Dimension) -> str:
        return "j" if one in _OF_ADJUSTMENTS else "a" if one == "model" else "e"

    return [f"{table(one)}.{COLUMNS[one]}" for one in dimensions], joins


def _where(
    span: Span, filters: Sequence[Filter], table: str = "", *, joined: str | None = None
) -> tuple[str, tuple[Value, ...]]:
    """Return the condition of a span and of filters by what a request is; those by calls are not for SQL."""
    conditions = [within(span, table)]
    values: list[Value] = []
    for one in filters:
        if one.dimension in ("tier", "backend", "model"):
            continue
        owner = table if joined is None or one.dimension in _OF_ADJUSTMENTS else joined
        column = owner + COLUMNS[one.dimension]
        named = [value for value in one.values if value is not None]
        if one.dimension == "tag":
            # Tags are a JSON array of words without quotes; LIKE would take their underscores for any letter.
            some = [f"REPLACE({column}, ?, '') <> {column}"] * len(named)
            values += [f'"{value}"' for value in named]
            some += [f"{column} = '[]'"] * (len(named) < len(one.values))
        else:
            some = [f"{column} IN ({', '.join('?' * len(named))})"] if named else []
            values += named
            some += [f"{column} IS NULL"] * (len(named) < len(one.values))
        conditions.append(f"({' OR '.join(some)})")
    return " AND ".join(conditions), tuple(values)


def _list(*columns: str) -> str:
    return ", ".join(columns)


def _places(count: int) -> str:
    return ", ".join(str(one) for one in range(1, count + 1))
