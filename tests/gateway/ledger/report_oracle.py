"""What must a report say? The same figures, added up row by row in the plainest way."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime

from gateway.ledger.report_query import HOUR_MS, OF_ATTEMPTS, Dimension, Query
from gateway.ledger.reports import Line
from gateway.ledger.rows import AdjustmentRow, AnyRow, AttemptRow, ClosingRow, ExchangeRow

MEASURES = tuple(name for name in Line.__struct_fields__ if name not in ("start_ms", "names", "idle_nusd"))
Key = tuple[int | None, tuple[str | None, ...]]
_FIELDS = {"key": "key_name", "user": "user_name"}


class Oracle:
    """The rows of a ledger."""

    def __init__(self, rows: Sequence[AnyRow]) -> None:
        self.exchanges = {row.exchange_id: row for row in rows if isinstance(row, ExchangeRow)}
        self.attempts = [row for row in rows if isinstance(row, AttemptRow)]
        self.adjustments = [row for row in rows if isinstance(row, AdjustmentRow)]
        self.closed = {(row.backend, row.hour) for row in rows if isinstance(row, ClosingRow)}
        self._attempt = {(row.exchange_id, row.number): row for row in self.attempts}

    def expected(self, query: Query) -> dict[Key, dict[str, int]]:
        """Each line that is not all 0."""
        self._query = query
        self._found: dict[Key, dict[str, int]] = defaultdict(lambda: dict.fromkeys(MEASURES, 0))
        for row in self.exchanges.values():
            self._add(
                row,
                None,
                exchanges=1,
                answered=row.outcome == "answered",
                failed=row.outcome in ("broken", "exhausted", "lost"),
                estimated=row.estimated,
                baseline_nusd=row.baseline_nusd,
            )
        for call in self.attempts:
            exchange = self.exchanges[call.exchange_id]
            money = {
                name: getattr(call, name) for name in ("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd")
            }
            tokens = {name: getattr(call, name) for name in MEASURES if name.endswith("_tokens")}
            self._add(
                exchange,
                call,
                calls=call.outcome != "full",
                wasted_nusd=0 if call.number == exchange.served else sum(money.values()),
                provisional_nusd=0 if (call.backend, call.ended_ms // HOUR_MS) in self.closed else call.gpu_nusd,
                **tokens,
                **money,
            )
        for one in self.adjustments:
            exchange = self.exchanges[one.exchange_id]
            self._add(
                exchange,
                self._attempt[one.exchange_id, one.number],
                adjusted_nusd=one.change_nusd,
                wasted_nusd=0 if one.number == exchange.served else one.change_nusd,
            )
        return {key: amounts for key, amounts in self._found.items() if any(amounts.values())}

    def _add(self, exchange: ExchangeRow, call: AttemptRow | None, **amounts: int) -> None:
        query = self._query
        if not query.since_ms <= exchange.at_ms < query.until_ms:
            return
        for one in query.filters:
            if not set(one.values) & set(_values(one.dimension, exchange, call)):
                return
        names: list[tuple[str | None, ...]] = [()]
        for dimension in query.by:
            names = [(*so_far, value) for so_far in names for value in _values(dimension, exchange, call)]
        for one_name in names:
            line = self._found[_start(query, exchange.at_ms), one_name]
            for name, amount in amounts.items():
                line[name] += amount


def _values(dimension: Dimension, exchange: ExchangeRow, call: AttemptRow | None) -> tuple[str | None, ...]:
    if dimension == "tag":
        return tuple(json.loads(exchange.tags)) or (None,)
    owner = call if call is not None and dimension in OF_ATTEMPTS else exchange
    value: str | None = getattr(owner, _FIELDS.get(dimension, dimension))
    return (value,)


def _start(query: Query, at_ms: int) -> int | None:
    if query.bucket is None:
        return None
    at = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(query.zone)
    if query.bucket == "hour":
        past_ms = (at.minute * 60 + at.second) * 1000 + at_ms % 1000
        return at_ms - past_ms
    day = 1 if query.bucket == "month" else at.day
    return int(datetime(at.year, at.month, day, tzinfo=query.zone).timestamp()) * 1000
