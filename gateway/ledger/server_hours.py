"""What do the rows say of a server that costs by the hour? What ran on it, what watchers saw, what was closed.

Every query is bounded by time, and reads the ledger as it was at one moment.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from gateway.ledger.contract import Reading, Value
from gateway.ledger.rows import ClosingRow, PriceRow
from gateway.pricing import HourPrice
from policies.gpu import HOUR_MS, Paid, Part, Run, RunId, Span

_LONGEST_RUN_MS = 24 * HOUR_MS
_BACKWARDS_MS = HOUR_MS
"""By how much a clock may go back while an attempt is under way: its end is looked for so much earlier."""

_T = TypeVar("_T", bound=msgspec.Struct)

_RUN = (
    "a.exchange_id, a.number, a.started_ms, a.first_token_us, a.ended_ms, a.prompt_tokens, a.cached_prompt_tokens, "
    "a.completion_tokens, a.gpu_nusd"
)
_OF_HOUR = "a.backend = ? AND a.gpu_nusd <> 0 AND a.ended_ms >= ? AND a.ended_ms < ? AND a.started_ms < ?"
_CLOSING = ", ".join(ClosingRow.__struct_fields__)
_PRICE = ", ".join(PriceRow.__struct_fields__)


class Origin(msgspec.Struct, frozen=True):
    """Whose attempt it was: of the exchange, and whether the answer shown was this one."""

    at_ms: int
    key_name: str
    team: str | None
    route: str
    tier: str
    shown: int


class HourRows(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of an hour of a server. `made_from` changes with the rows, and is cheap to ask for alone."""

    runs: tuple[Run, ...]
    parts: tuple[Part, ...]
    paid: Mapping[RunId, Paid]
    origins: Mapping[RunId, Origin]
    made_from: str


class GoneServer(msgspec.Struct, frozen=True):
    """A server that is not in the configuration any more: what it last cost, and the last hour it worked for us."""

    backend: str
    price: HourPrice
    last_hour: int


class _Attempt(msgspec.Struct):
    exchange_id: str
    number: int
    started_ms: int
    first_token_us: int | None
    ended_ms: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    gpu_nusd: int

    def run(self) -> Run:
        first_us = self.first_token_us
        return Run(
            id=(self.exchange_id, self.number),
            started_ms=self.started_ms,
            first_token_ms=None if first_us is None else self.started_ms + first_us // 1000,
            ended_ms=self.ended_ms,
            prompt_tokens=max(0, self.prompt_tokens - self.cached_prompt_tokens),
            completion_tokens=self.completion_tokens,
            billed_nusd=self.gpu_nusd,
        )


def hour_of(number: int) -> Span:
    """Return the time of an hour; they count since the epoch."""
    return Span(number * HOUR_MS, (number + 1) * HOUR_MS)


def hour_rows(reading: Reading, backend: str, hour: int) -> HourRows:
    """Read an hour of a server. One of a hundred thousand attempts takes about a second."""
    span = hour_of(hour)
    runs, origins = [], {}
    for row in reading.rows(
        f"SELECT {_RUN}, e.at_ms, e.key_name, e.team, e.route, a.tier, "  # noqa: S608 - names of ours
        "CASE WHEN e.served = a.number THEN 1 ELSE 0 END "
        f"FROM attempts a JOIN exchanges e ON e.exchange_id = a.exchange_id WHERE {_OF_HOUR}",
        _bounds(backend, span),
    ):
        run = _as(_Attempt, row[:9]).run()
        if run.span.until_ms >= span.from_ms:
            runs.append(run)
            origins[run.id] = _as(Origin, row[9:])
    paid: dict[RunId, Paid] = {}
    for exchange_id, number, share_nusd, change_nusd, *origin in reading.rows(
        "SELECT exchange_id, number, share_nusd, change_nusd, at_ms, key_name, team, route, tier, shown "
        "FROM adjustments WHERE backend = ? AND hour = ? ORDER BY revision",
        (backend, hour),
    ):
        id_ = (str(exchange_id), _whole(number))
        before = paid.get(id_)
        changed_nusd = _whole(change_nusd) + (0 if before is None else before.changed_nusd)
        paid[id_] = Paid(_whole(share_nusd), changed_nusd)
        origins.setdefault(id_, _as(Origin, origin))
    return HourRows(
        runs=tuple(runs),
        parts=tuple(parts_of(reading, backend, span)),
        paid=paid,
        origins=origins,
        made_from=made_from(reading, backend, hour),
    )


def made_from(reading: Reading, backend: str, hour: int) -> str:
    """Return what changes when rows of an hour come late, or true ones in the place of estimated ones."""
    ours = reading.rows(
        f"SELECT COUNT(*), SUM(a.gpu_nusd), SUM(a.estimated) FROM attempts a WHERE {_OF_HOUR}",  # noqa: S608 - names of ours
        _bounds(backend, hour_of(hour)),
    )
    seen = reading.rows(
        "SELECT COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(busy_ms) FROM server_meters "
        "WHERE backend = ? AND hour = ?",
        (backend, hour),
    )
    return "/".join(str(_whole(value or 0)) for rows in (ours, seen) for row in rows for value in row)


def changed_nusd(reading: Reading, backend: str, hour: int) -> int:
    """Return what all adjustments of an hour come to."""
    rows = reading.rows("SELECT SUM(change_nusd) FROM adjustments WHERE backend = ? AND hour = ?", (backend, hour))
    return sum(_whole(value or 0) for row in rows for value in row)


def parts_of(reading: Reading, backend: str, span: Span) -> Iterator[Part]:
    """Read what watchers saw of a server."""
    for watcher, from_ms, until_ms, prompt_tokens, completion_tokens, busy_ms in reading.rows(
        "SELECT instance, from_ms, until_ms, prompt_tokens, completion_tokens, busy_ms FROM server_meters "
        "WHERE backend = ? AND hour >= ? AND hour <= ? AND until_ms > ? AND from_ms < ?",
        (backend, span.from_ms // HOUR_MS, span.until_ms // HOUR_MS, span.from_ms, span.until_ms),
    ):
        yield Part(
            str(watcher),
            Span(_whole(from_ms), _whole(until_ms)),
            _whole(prompt_tokens),
            _whole(completion_tokens),
            _whole(busy_ms),
        )


def last_runs(reading: Reading, backend: str, since_ms: int, most: int) -> list[Run]:
    """Read the attempts that ended last, in the order in which they ended."""
    rows = reading.rows(
        f"SELECT {_RUN} FROM attempts a "  # noqa: S608 - names of ours
        "WHERE a.backend = ? AND a.gpu_nusd <> 0 AND a.ended_ms > ? ORDER BY a.ended_ms DESC LIMIT ?",
        (backend, since_ms, most),
    )
    return [_as(_Attempt, row).run() for row in rows][::-1]


def last_closings(reading: Reading, backend: str, since_hour: int) -> list[ClosingRow]:
    """Read the last revision of every hour that was closed, the newest hour first."""
    newest: dict[int, ClosingRow] = {}
    for row in reading.rows(
        f"SELECT {_CLOSING} FROM closings WHERE backend = ? AND hour >= ? ORDER BY hour DESC, revision",  # noqa: S608 - names of ours
        (backend, since_hour),
    ):
        closing = _as(ClosingRow, row)
        newest[closing.hour] = closing
    return list(newest.values())


def closing_at(reading: Reading, backend: str, hour: int, revision: int) -> ClosingRow | None:
    """Read one revision of an hour."""
    rows = reading.rows(
        f"SELECT {_CLOSING} FROM closings WHERE backend = ? AND hour = ? AND revision = ?",  # noqa: S608 - names of ours
        (backend, hour, revision),
    )
    return next((_as(ClosingRow, row) for row in rows), None)


def last_weight(reading: Reading, backend: str) -> int | None:
    """Return the weight of a completion token that was last gone by."""
    rows = reading.rows(
        "SELECT decode_weight FROM closings WHERE backend = ? ORDER BY hour DESC, revision DESC LIMIT 1", (backend,)
    )
    return next((_whole(row[0]) for row in rows), None)


def first_known_ms(reading: Reading, backend: str) -> int | None:
    """Return when a server was first known to cost by the hour."""
    found = [
        _whole(value)
        for sql in (
            "SELECT MIN(at_ms) FROM prices WHERE backend = ? AND hour_nusd IS NOT NULL",
            "SELECT MIN(from_ms) FROM server_meters WHERE backend = ?",
        )
        for row in reading.rows(sql, (backend,))
        for value in row
        if value is not None
    ]
    return min(found, default=None)


def gone_servers(reading: Reading, known: Container[str]) -> list[GoneServer]:
    """Read which servers cost by the hour once, of those that are not known now."""
    newest: dict[str, PriceRow] = {}
    for row in reading.rows(f"SELECT {_PRICE} FROM prices WHERE hour_nusd IS NOT NULL ORDER BY at_ms"):  # noqa: S608 - names of ours
        price = _as(PriceRow, row)
        if price.backend not in known:
            newest[price.backend] = price
    found = []
    for backend, price in sorted(newest.items()):
        sql = "SELECT MAX(ended_ms) FROM attempts WHERE backend = ? AND gpu_nusd <> 0"
        last_ms = next((value for (value,) in reading.rows(sql, (backend,))), None)
        if last_ms is not None and price.hour_nusd is not None:
            hour = HourPrice(tier=price.tier, backend=backend, hour_nusd=price.hour_nusd, row=price)
            found.append(GoneServer(backend, hour, _whole(last_ms) // HOUR_MS))
    return found


def _bounds(backend: str, span: Span) -> tuple[Value, ...]:
    return backend, span.from_ms - _BACKWARDS_MS, span.until_ms + _LONGEST_RUN_MS, span.until_ms


def _as(kind: type[_T], row: Iterable[Value]) -> _T:
    return msgspec.convert(dict(zip(kind.__struct_fields__, row, strict=True)), kind)


def _whole(value: Value) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value
