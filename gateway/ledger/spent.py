"""What has been spent, by the ledger? Its rows in, what each budget should have counted out.

A budget counts an exchange when its bill was made (`settled_ms`), and so does what a closed hour of a GPU changed of
that bill: the change counts where the bill counted, and not on the day of the closing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from gateway.admission import Admission
from gateway.ledger.contract import Reading, Value
from gateway.ledger.rows import AttemptRow, ExchangeRow
from gateway.ledger.server_hours import changed_nusd
from gateway.limiter import bill_id
from policies.accounts import SLOTS, Budget, Entry, Rolling
from policies.books import Tell
from policies.limits import Account, Calendar, Dimension, Facts, Meter, accounts_of

_COST = "e.input_nusd + e.cached_input_nusd + e.output_nusd + e.gpu_nusd"
_ATTEMPT_COST = "a.input_nusd + a.cached_input_nusd + a.output_nusd + a.gpu_nusd"
_ATTEMPTS = "attempts a JOIN exchanges e ON e.exchange_id = a.exchange_id"
_COLUMNS: dict[Dimension, str] = {
    "key": "e.key_name",
    "team": "e.team",
    "user": "e.user_digest",
    "route": "e.route",
    "model": "e.asked",
    "tier": "a.tier",
}
_CLOSINGS = (
    "SELECT c.backend, c.hour, c.revision, c.at_ms, c.shares_nusd - c.provisional_nusd, (SELECT MAX(l.revision) "
    "FROM closings l WHERE l.backend = c.backend AND l.hour = c.hour) FROM closings c"
)
_WRITTEN_WITHIN_MS = 10 * 60_000
"""What is not written by then has been left to the next revision (`gateway/ledger/closing.py`)."""
_MINUTE_MS = 60_000
"""Every window and every slot of one begins with a minute."""


class Span(msgspec.Struct, frozen=True):
    """What a meter adds up now: what was spent from `from_ms` on, apart for each `slot_ms` where that is not 0."""

    from_ms: int
    slot_ms: int


class Amount(msgspec.Struct, frozen=True):
    """So much was spent of an account at a time (the beginning of a slot, or of its window)."""

    partition: str
    account: Account
    at_ms: int
    nusd: int


class Closing(msgspec.Struct, frozen=True):
    """One revision of an hour of a server, and when it was closed. With those before it bills change by `change_nusd`.

    It is the `last` one, or there is another after it, which has all that is missing of this one.
    """

    backend: str
    hour: int
    revision: int
    at_ms: int
    change_nusd: int
    last: bool


class _Level(msgspec.Struct, frozen=True):
    """Limits of requests as a whole, or of attempts on tiers, with the tables that have what they count."""

    columns: tuple[tuple[Dimension, str], ...]
    tables: str
    cost: str


class Spending:
    """Reads what limits count. `limits` and the partitions are those of an admission; it is used from any thread."""

    def __init__(self, admission: Admission) -> None:
        self._partition_of = admission.partition_of
        self._requests = tuple(one for one in admission.limits if not one.of_attempts)
        self._attempts = tuple(one for one in admission.limits if one.of_attempts)
        self._levels = tuple(self._found_levels())

    @property
    def any(self) -> bool:
        """Whether any limit counts spending."""
        return bool(self._levels)

    def _found_levels(self) -> Iterator[_Level]:
        for limits, tables, cost in (
            (self._requests, "exchanges e", _COST),
            (self._attempts, _ATTEMPTS, _ATTEMPT_COST),
        ):
            if any(_is_spend(meter) for limit in limits for meter in limit.meters):
                named = {dimension for limit in limits for dimension, _ in limit.scope} | {"key", "team"}
                yield _Level(tuple((one, column) for one, column in _COLUMNS.items() if one in named), tables, cost)

    # -- sums -----------------------------------------------------------------------------------------------------

    def totals(self, reading: Reading, *, now_ms: int, before_ms: int) -> Iterator[Amount]:
        """Yield what the present windows have counted of bills made, and hours closed, before a time.

        An account may come more than once. Queries the ledger once for each length of window.
        """
        for level in self._levels:
            for span in sorted(self._spans(now_ms), key=lambda one: (one.from_ms, one.slot_ms)):
                grouped = f"GROUP BY {_grouped(level, span)}"
                bills = (
                    f"SELECT {_columns(level)}, {_slot(span)}, {_sum(level.cost)} FROM {level.tables} "  # noqa: S608 - ours
                    f"WHERE e.settled_ms >= {span.from_ms} AND e.settled_ms < {before_ms} {grouped}"
                )
                on_attempt = " AND a.number = j.number" if level.tables == _ATTEMPTS else ""
                changes = (
                    f"SELECT {_columns(level)}, {_slot(span)}, {_sum('j.change_nusd')} FROM {level.tables} "  # noqa: S608
                    f"JOIN adjustments j ON j.exchange_id = e.exchange_id{on_attempt} "
                    "JOIN closings c ON c.backend = j.backend AND c.hour = j.hour AND c.revision = j.revision "
                    f"WHERE e.settled_ms >= {span.from_ms} AND c.at_ms < {before_ms} {grouped}"
                )
                for query in (bills, changes):
                    for *values, slot, nusd in reading.rows(query):
                        at_ms = _int(slot) * span.slot_ms or span.from_ms
                        yield from self._amounts(_facts(level, values), span, now_ms, at_ms, _int(nusd))

    def _amounts(self, facts: Facts, span: Span, now_ms: int, at_ms: int, nusd: int) -> Iterator[Amount]:
        accounts = self.accounts(facts)
        for account in accounts:
            if _is_spend(account.meter) and span_of(account.meter, now_ms) == span:
                yield Amount(self._partition_of(facts, accounts), account, at_ms, nusd)

    def _spans(self, now_ms: int) -> set[Span]:
        limits = self._requests + self._attempts
        return {span_of(meter, now_ms) for limit in limits for meter in limit.meters if _is_spend(meter)}

    # -- one by one -----------------------------------------------------------------------------------------------

    def bills(self, reading: Reading, *, now_ms: int, from_ms: int, instance: str = "") -> Iterator[tuple[str, Tell]]:
        """Yield the bills made from a time on (by one process, if it is named), each with the partition it is for."""
        values: tuple[Value, ...] = (instance,) if instance else ()
        written = " AND e.instance = ?" if instance else ""
        for level in self._levels:
            number = "a.number" if level.tables == _ATTEMPTS else "0"
            query = (
                f"SELECT {_columns(level)}, e.exchange_id, {number}, e.settled_ms, {level.cost} FROM {level.tables} "  # noqa: S608
                f"WHERE e.settled_ms >= {from_ms}{written}"
            )
            for *about, exchange_id, attempt, settled_ms, nusd in reading.rows(query, values):
                id_ = f"{exchange_id!s}/{_int(attempt)}" if attempt else str(exchange_id)
                yield from self._bill(_facts(level, about), id_, _int(settled_ms), _int(nusd), now_ms)

    def bills_of(
        self, exchange: ExchangeRow, attempts: Iterable[AttemptRow], *, now_ms: int
    ) -> Iterator[tuple[str, Tell]]:
        """Yield what budgets are to count of rows that are known without reading."""
        facts = Facts(
            key=exchange.key_name,
            team=exchange.team,
            user=exchange.user_digest,
            route=exchange.route,
            model=exchange.asked,
        )
        attempts = tuple(attempts)
        yield from self._bill(facts, exchange.exchange_id, exchange.settled_ms, sum(map(_cost, attempts)), now_ms)
        for one in attempts:
            of_tier = msgspec.structs.replace(facts, tier=one.tier)
            id_ = f"{one.exchange_id}/{one.number}"
            yield from self._bill(of_tier, id_, exchange.settled_ms, _cost(one), now_ms)

    def _bill(self, facts: Facts, id_: str, at_ms: int, nusd: int, now_ms: int) -> Iterator[tuple[str, Tell]]:
        accounts = self.accounts(facts)
        entries = tuple(entry_of(account, nusd, now_ms) for account in accounts if _is_spend(account.meter))
        if entries and nusd:
            yield self._partition_of(facts, accounts), Tell(bill_id(id_), entries, at_ms, of=names_of(id_))

    # -- what closed hours changed --------------------------------------------------------------------------------

    def closings(self, reading: Reading, *, from_ms: int, now_ms: int) -> list[Closing]:
        """Return the hours of servers that were closed from a time on, and of which all is written."""
        query = f"{_CLOSINGS} WHERE c.at_ms >= ?"
        return [one for one in map(_closing, reading.rows(query, (from_ms,))) if _is_whole(reading, one, now_ms)]

    def closing(self, reading: Reading, backend: str, hour: int, revision: int, *, now_ms: int) -> Closing | None:
        """Return one of them; None where it is not there, or not all of it."""
        query = f"{_CLOSINGS} WHERE c.backend = ? AND c.hour = ? AND c.revision = ?"
        found = [_closing(row) for row in reading.rows(query, (backend, hour, revision))]
        return next((one for one in found if _is_whole(reading, one, now_ms)), None)

    def changes(self, reading: Reading, closing: Closing, *, now_ms: int) -> Iterator[tuple[str, Tell]]:
        """Yield what the closing of an hour changed: one bill an account, each amount at the minute it belongs to."""
        found: dict[tuple[str, str], tuple[Account, dict[int, int]]] = {}
        for level in self._levels:
            on_attempt = " AND a.number = j.number" if level.tables == _ATTEMPTS else ""
            minute = f"e.settled_ms / {_MINUTE_MS}"
            query = (
                f"SELECT {_columns(level)}, {minute}, {_sum('j.change_nusd')} FROM {level.tables} "  # noqa: S608 - ours
                f"JOIN adjustments j ON j.exchange_id = e.exchange_id{on_attempt} "
                f"WHERE j.backend = ? AND j.hour = ? AND j.revision = ? GROUP BY {_columns(level)}, {minute}"
            )
            for *about, at, nusd in reading.rows(query, (closing.backend, closing.hour, closing.revision)):
                facts = _facts(level, about)
                accounts = self.accounts(facts)
                for account in accounts:
                    if _is_spend(account.meter):
                        place = (self._partition_of(facts, accounts), account.name)
                        minutes = found.setdefault(place, (account, {}))[1]
                        minutes[_int(at)] = minutes.get(_int(at), 0) + _int(nusd)
        for (partition, name), (account, minutes) in found.items():
            id_ = f"adj/{closing.backend}/{closing.hour}/{closing.revision}/{name}"
            changed = {at * _MINUTE_MS: nusd for at, nusd in minutes.items() if nusd}
            entries = tuple(entry_of(account, nusd, now_ms) for nusd in changed.values())
            if entries:
                yield partition, Tell(id_, entries, closing.at_ms, tuple(changed))

    def accounts(self, facts: Facts) -> tuple[Account, ...]:
        """Return the accounts that count a request or an attempt."""
        return accounts_of(self._requests if facts.tier is None else self._attempts, facts)


def _closing(row: tuple[Value, ...]) -> Closing:
    backend, hour, revision, at_ms, change, last = row
    return Closing(str(backend), _int(hour), _int(revision), _int(at_ms), _int(change), last == revision)


def _is_whole(reading: Reading, closing: Closing, now_ms: int) -> bool:
    """Whether nothing of this revision is still to come."""
    if not closing.last or now_ms - closing.at_ms >= _WRITTEN_WITHIN_MS:
        return True
    return changed_nusd(reading, closing.backend, closing.hour) == closing.change_nusd


def span_of(meter: Meter, now_ms: int) -> Span:
    """Return what a meter of spending adds up at a time."""
    rule = meter.rule
    if isinstance(rule, Rolling):
        return Span((now_ms // rule.slot_ms - SLOTS) * rule.slot_ms, rule.slot_ms)
    if isinstance(rule, Budget):
        return Span(0, 0)
    if isinstance(rule, Calendar):
        return Span(max(start for start in rule.rule(now_ms).starts_ms if start <= now_ms), 0)
    raise TypeError(f"{meter.measure} is not counted by a sum")


def entry_of(account: Account, nusd: int, now_ms: int) -> Entry:
    """Return an amount that is to be counted, whatever the limit says."""
    return Entry(account.name, account.rule(now_ms), taken=nusd, shadow=True)


def names_of(id_: str) -> tuple[str, ...]:
    """Return the names under which an exchange (or attempt) may have been reserved."""
    first = (id_,) if "/" in id_ else (id_, f"{id_}/counted")
    return (*first, *(f"{one}~1" for one in first))


def _is_spend(meter: Meter) -> bool:
    return meter.measure == "spend"


def _cost(row: AttemptRow) -> int:
    return row.input_nusd + row.cached_input_nusd + row.output_nusd + row.gpu_nusd


def _columns(level: _Level) -> str:
    return ", ".join(column for _, column in level.columns)


def _slot(span: Span) -> str:
    return f"e.settled_ms / {span.slot_ms}" if span.slot_ms else "0"


def _grouped(level: _Level, span: Span) -> str:
    return f"{_columns(level)}, {_slot(span)}" if span.slot_ms else _columns(level)


def _sum(nusd: str) -> str:
    # A sum of PostgreSQL is no whole number of a row otherwise.
    return f"CAST(SUM({nusd}) AS BIGINT)"


def _facts(level: _Level, values: Sequence[Value]) -> Facts:
    said: Mapping[str, str | None] = {
        dimension: None if value is None else str(value)
        for (dimension, _), value in zip(level.columns, values, strict=True)
    }
    return Facts(
        key=said.get("key") or "",
        team=said.get("team"),
        user=said.get("user"),
        route=said.get("route") or "",
        model=said.get("model") or "",
        tier=said.get("tier"),
    )


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value
