"""What will this month come to? Four weeks of hours out of the ledger, and what `policies.forecast` makes of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from gateway.ledger.contract import Store
from gateway.ledger.report_query import DAY_MS, HOUR_MS, Query
from gateway.ledger.reports import read_report
from policies.forecast import Forecast, forecast

_LEARNED_MS = 28 * DAY_MS


class MonthForecast(msgspec.Struct, frozen=True, kw_only=True):
    """The month in which `now_ms` is, in the time zone of the query, and what it comes to."""

    since_ms: int
    until_ms: int
    now_ms: int
    forecast: Forecast


def forecast_month(store: Store, query: Query, *, now_ms: int) -> MonthForecast:
    """Read what the filters of `query` leave of the last four weeks, and forecast the month; blocks.

    Hours before the first request are no hours of 0: nobody had begun. Raises as `read_report`.
    """
    zone = query.zone
    today = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(zone)
    begin = datetime(today.year, today.month, 1, tzinfo=zone)
    end = datetime(today.year + today.month // 12, today.month % 12 + 1, 1, tzinfo=zone)
    month_ms = int(begin.timestamp()) * 1000, int(end.timestamp()) * 1000
    present_ms = now_ms - now_ms % HOUR_MS
    first_ms = min(month_ms[0] - month_ms[0] % HOUR_MS, present_ms - _LEARNED_MS)
    hours = read_report(
        store,
        msgspec.structs.replace(
            query, since_ms=first_ms, until_ms=now_ms + 1, by=(), bucket="hour", timezone="UTC", idle="nobody"
        ),
    )
    spent = {line.start_ms or 0: line.cost_nusd for line in hours.lines}
    month = read_report(
        store,
        msgspec.structs.replace(
            query, since_ms=month_ms[0], until_ms=max(now_ms, month_ms[0]) + 1, by=(), bucket=None, idle="nobody"
        ),
    )
    learned_ms = max(present_ms - _LEARNED_MS, min(spent, default=present_ms))
    ahead_ms = today.utcoffset() or timedelta()
    return MonthForecast(
        since_ms=month_ms[0],
        until_ms=month_ms[1],
        now_ms=now_ms,
        forecast=forecast(
            [spent.get(at_ms, 0) for at_ms in range(learned_ms, present_ms, HOUR_MS)],
            first_hour=(learned_ms + ahead_ms // timedelta(milliseconds=1)) // HOUR_MS,
            spent_nusd=month.total.cost_nusd,
            ahead=(month_ms[1] - now_ms) / HOUR_MS,
        ),
    )
