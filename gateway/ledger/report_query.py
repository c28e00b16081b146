"""What can be asked of the ledger? Periods, buckets, dimensions and filters; from the words of a command line or a URL.

The names are the same in `tierway cost` and `GET /admin/costs`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal, get_args
from zoneinfo import ZoneInfo

import msgspec

Dimension = Literal["key", "team", "user", "tag", "route", "asked", "endpoint", "outcome", "tier", "backend", "model"]
Bucket = Literal["hour", "day", "month"]
Idle = Literal["nobody", "teams", "requests"]

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)
OF_ATTEMPTS: frozenset[Dimension] = frozenset(("tier", "backend", "model"))
"""Dimensions of single calls: money and tokens count where the call was made, the answer where it came from."""

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
LONGEST_MS = 10 * 366 * DAY_MS
NOTHING = "-"
"""How a filter names what has no team, no user, no tag."""

_UNITS_MS = {"m": 60_000, "h": HOUR_MS, "d": DAY_MS, "w": 7 * DAY_MS}
_AGO = re.compile(r"([0-9]{1,6})([mhdw])")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}(-[0-9]{2})?")
_FIRST_MS = 946_684_800_000  # the year 2000


class BadOption(ValueError):  # noqa: N818 - it is an answer to whoever typed it
    """An option cannot be understood. `option` is its name, and the message says what would be."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option
        self.message = message


class Filter(msgspec.Struct, frozen=True):
    """Only what has one of these values; None is what has no value at all."""

    dimension: Dimension
    values: tuple[str | None, ...]


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: requests that came from `since_ms` to before `until_ms`, in milliseconds since the epoch.

    `timezone` says where days and months begin. Filters must all hold. `idle` is who bears what servers cost while they
    did nothing.
    """

    since_ms: int
    until_ms: int
    by: tuple[Dimension, ...] = ()
    bucket: Bucket | None = None
    timezone: str = "UTC"
    filters: tuple[Filter, ...] = ()
    idle: Idle = "nobody"

    @property
    def zone(self) -> tzinfo:
        """The time zone."""
        return zone_of(self.timezone)

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All dimensions that matter: those asked for, then those only filtered by."""
        return tuple(dict.fromkeys((*self.by, *(one.dimension for one in self.filters))))


def zone_of(name: str) -> tzinfo:
    """Return a time zone. Raises `BadOption`."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):
        raise BadOption(
            "timezone", f"there is no time zone '{name[:64]}'; expected one such as Europe/Berlin"
        ) from None


def query_of(words: Mapping[str, str], *, filters: Sequence[str] = (), now_ms: int, idle: Idle = "nobody") -> Query:
    """Return what `words` (`since`, `until`, `by`, `bucket`, `timezone`) and `filters` ask. Raises `BadOption`.

    Without `since` it is the month so far, and without `until` now.
    """
    timezone = words.get("timezone", "UTC")
    zone = zone_of(timezone)
    until_ms = moment_of(words["until"], "until", zone, now_ms) if "until" in words else _next_hour(now_ms)
    since_ms = (
        moment_of(words["since"], "since", zone, now_ms)
        if "since" in words
        else _begin(datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(zone).replace(day=1), zone)
    )
    if since_ms >= until_ms:
        raise BadOption("since", "it is not before the end of the period")
    if until_ms - since_ms > LONGEST_MS:
        raise BadOption("since", "the period is longer than ten years")
    by, bucket = _by(words.get("by", ""), words.get("bucket"))
    return Query(
        since_ms=since_ms,
        until_ms=until_ms,
        by=by,
        bucket=bucket,
        timezone=timezone,
        filters=_filters(filters),
        idle=idle,
    )


def moment_of(text: str, option: str, zone: tzinfo, now_ms: int) -> int:
    """Return a moment: `7d` before now (from the beginning of that hour), `2026-11-01`, `2026-11`, or with a time."""
    if match := _AGO.fullmatch(text):
        at_ms = now_ms - int(match[1]) * _UNITS_MS[match[2]]
        at_ms -= at_ms % HOUR_MS if match[2] != "m" else 0
    else:
        at_ms = _written(text, option, zone)
    if not _FIRST_MS <= at_ms < _FIRST_MS + 100 * 366 * DAY_MS:
        raise BadOption(option, f"'{text[:40]}' is not a time of this century")
    return at_ms


def _written(text: str, option: str, zone: tzinfo) -> int:
    whole = f"{text}-01" if _DATE.fullmatch(text) and len(text) == 7 else text
    try:
        found = datetime.fromisoformat(whole)
        if len(whole) == 10:
            return _begin(found, zone)
        return int((found if found.tzinfo else found.replace(tzinfo=zone)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadOption(
            option, f"expected 7d, 36h, 2026-11, 2026-11-01 or 2026-11-01T08:00:00Z, found '{text[:40]}'"
        ) from None


def _begin(day: datetime, zone: tzinfo) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()) * 1000


def _next_hour(now_ms: int) -> int:
    return now_ms - now_ms % HOUR_MS + HOUR_MS


def _by(text: str, bucket: str | None) -> tuple[tuple[Dimension, ...], Bucket | None]:
    by: list[Dimension] = []
    buckets: list[Bucket] = []
    for word in [one.strip() for one in text.split(",") if one.strip()]:
        if word in BUCKETS:
            buckets.append(word)
        elif word in DIMENSIONS:
            if word in by:
                raise BadOption("by", f"'{word}' is named twice")
            by.append(word)
        else:
            known = ", ".join((*BUCKETS, *DIMENSIONS))
            raise BadOption("by", f"'{word[:40]}' is none of {known}")
    if bucket is not None:
        if bucket not in BUCKETS:
            raise BadOption("bucket", f"'{bucket[:40]}' is none of {', '.join(BUCKETS)}")
        buckets.append(bucket)
    if len(set(buckets)) > 1:
        raise BadOption("bucket", "hours, days or months: only one of them")
    return tuple(by), buckets[0] if buckets else None


def _filters(texts: Sequence[str]) -> tuple[Filter, ...]:
    found: dict[Dimension, list[str | None]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in DIMENSIONS:
            raise BadOption(
                "filter", f"expected DIMENSION=VALUE with one of {', '.join(DIMENSIONS)}, found '{text[:60]}'"
            )
        found.setdefault(name, []).append(None if value == NOTHING else value)
    return tuple(Filter(name, tuple(values)) for name, values in found.items())


# -- time -------------------------------------------------------------------------------------------------------------


class Span(msgspec.Struct, frozen=True):
    """A part of a period in which clocks are `offset_ms` ahead of UTC.

    It is from `first_hour` to before `end_hour` (counted since the epoch) and, where it is not whole hours, also from
    `since_ms` to before `until_ms`.
    """

    first_hour: int
    end_hour: int
    offset_ms: int
    since_ms: int
    until_ms: int

    @property
    def whole(self) -> bool:
        """Whether it is whole hours."""
        return self.since_ms == self.first_hour * HOUR_MS and self.until_ms == self.end_hour * HOUR_MS


def spans_of(query: Query) -> tuple[Span, ...]:
    """Cut a period where clocks change, and so that as much as can be is whole hours."""
    zone = query.zone
    found: list[Span] = []
    begin = query.since_ms
    while begin < query.until_ms:
        offset_ms = _offset(begin, zone)
        end = _change(begin, query.until_ms, zone)
        inner = -(-begin // HOUR_MS) * HOUR_MS, end // HOUR_MS * HOUR_MS
        cuts = sorted({begin, *(one for one in inner if begin < one < end), end})
        found += [
            Span(one // HOUR_MS, -(-other // HOUR_MS), offset_ms, one, other) for one, other in itertools.pairwise(cuts)
        ]
        begin = end
    return tuple(found)


def _offset(at_ms: int, zone: tzinfo) -> int:
    offset = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(zone).utcoffset() or timedelta()
    return offset // timedelta(milliseconds=1)


def _change(begin: int, until_ms: int, zone: tzinfo) -> int:
    """Return when clocks change next, at most `until_ms`: to the minute."""
    offset = _offset(begin, zone)
    before = begin
    while before < until_ms:
        after = min(before + DAY_MS, until_ms)
        if _offset(after, zone) != offset:
            while after - before > 60_000:
                middle = (before + after) // 120_000 * 60_000
                middle = middle if before < middle < after else (before + after) // 2
                before, after = (middle, after) if _offset(middle, zone) == offset else (before, middle)
            return after - after % 60_000
        before = after
    return until_ms


def bucket_of(bucket: Bucket, at_ms: int, offset_ms: int) -> int:
    """Return the number of a bucket: when an hour begins, which local day since the epoch it is. Months have days."""
    if bucket == "hour":
        begun_ms = offset_ms % HOUR_MS  # not every zone is whole hours from UTC
        return (at_ms + begun_ms) // HOUR_MS * HOUR_MS - begun_ms
    return (at_ms + offset_ms) // DAY_MS


def bucket_start(bucket: Bucket, number: int, zone: tzinfo) -> int:
    """Return when the bucket of a number begins, in milliseconds since the epoch."""
    if bucket == "hour":
        return number
    day = datetime.fromtimestamp(number * DAY_MS / 1000, UTC)
    return _begin(day.replace(day=1) if bucket == "month" else day, zone)
