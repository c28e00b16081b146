"""What did GPU servers come to, and who bears their idle time? Their hours, as they were closed last."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from gateway.ledger import report_sql as sql
from gateway.ledger.contract import Reading, Value
from gateway.ledger.report_query import HOUR_MS, Query, bucket_of, spans_of
from gateway.ledger.report_sql import Names, integer, names_of
from policies.gpu import apportioned

Closings = dict[tuple[str, int], tuple[Value, ...]]
"""The last closing of each hour of each server: a row of `report_sql.closings`."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What the closed hours of a server came to: shares of requests, idle time, and work that was not tierway's."""

    backend: str
    tier: str
    hours: int
    hour_nusd: int
    shares_nusd: int
    idle_nusd: int
    outside_nusd: int
    busy_ms: int


def last_closings(reading: Reading, first_hour: int, end_hour: int) -> Closings:
    """Return how hours were closed last, those that began from `first_hour` to before `end_hour`."""
    rows = reading.rows(sql.closings(first_hour, end_hour).sql)
    return {(str(row[0]), integer(row[1])): row for row in rows}


def servers_of(last: Closings) -> tuple[Server, ...]:
    """Return what each server came to."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in last.values():
        sums = found.setdefault((str(row[0]), str(row[3])), [0] * 6)
        sums[:] = [one + more for one, more in zip(sums, (1, *map(integer, row[4:9])), strict=True)]
    return tuple(
        Server(
            backend=backend,
            tier=tier,
            hours=sums[0],
            hour_nusd=sums[1],
            shares_nusd=sums[2],
            idle_nusd=sums[3],
            outside_nusd=sums[4],
            busy_ms=sums[5],
        )
        for (backend, tier), sums in sorted(found.items())
    )


def divided_idle(reading: Reading, query: Query, last: Closings) -> Iterator[tuple[int, Names, int]]:
    """Yield bucket, names and nano-dollars: each idle hour, divided by shares of that hour's work, to the nano-dollar.

    Everybody who worked bears a part, whatever the query filters. An hour without any work is borne by nobody, and so
    is everything where the policy is `nobody`, or `teams` and the query asks for more than teams.
    """
    dimensions = query.dimensions
    if not last or query.idle == "nobody" or (query.idle == "teams" and not set(dimensions) <= {"team"}):
        return
    hours = [hour for _, hour in last]
    revised = any(integer(row[2]) > 1 for row in last.values())
    statement = sql.work_shares(min(hours), max(hours) + 1, dimensions, revised=revised)
    workers: dict[tuple[str, int], list[tuple[Names, int]]] = {}
    for row in reading.rows(statement.sql, statement.values):
        if integer(row[-1]) > 0:
            workers.setdefault((str(row[0]), integer(row[1])), []).append((names_of(row[2:-1]), integer(row[-1])))
    for server_hour, row in last.items():
        some = sorted(workers.get(server_hour, ()), key=lambda one: tuple(name or "" for name in one[0]))
        if some:
            number = _bucket(query, server_hour[1] * HOUR_MS)
            parts = apportioned(integer(row[6]), [share for _, share in some])
            yield from ((number, names, nusd) for (names, _), nusd in zip(some, parts, strict=True))


def _bucket(query: Query, at_ms: int) -> int:
    (span,) = spans_of(msgspec.structs.replace(query, since_ms=at_ms, until_ms=at_ms + 1))
    return 0 if query.bucket is None else bucket_of(query.bucket, at_ms, span.offset_ms)
