"""When does a calendar window begin? The beginnings around a moment, in a time zone that is passed in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal

Period = Literal["hour", "day", "month"]

_HOUR_MS = 3_600_000


def window_starts(now_ms: int, period: Period, zone: tzinfo) -> tuple[int, ...]:
    """Return the beginnings of the window before, the present one and the two after it, in ms since the epoch.

    More than the present one, because the clock that counts is not the one that asks, and may be a window ahead or
    behind. A midnight that a change to summer time skips is the moment of the change.
    """
    if period == "hour":
        # Not every zone is whole hours from UTC.
        offset = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(zone).utcoffset() or timedelta()
        start = now_ms - (now_ms + offset // timedelta(milliseconds=1)) % _HOUR_MS
        return tuple(start + n * _HOUR_MS for n in (-1, 0, 1, 2))
    today = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(zone)
    if period == "day":
        days = (today.date() + timedelta(days=n) for n in (-1, 0, 1, 2))
        return tuple(_midnight_ms(day.year, day.month, day.day, zone) for day in days)
    months = (today.year * 12 + today.month - 1 + n for n in (-1, 0, 1, 2))
    return tuple(_midnight_ms(month // 12, month % 12 + 1, 1, zone) for month in months)


def _midnight_ms(year: int, month: int, day: int, zone: tzinfo) -> int:
    return int(datetime(year, month, day, tzinfo=zone).timestamp()) * 1000
