"""What has a caller used? `GET /v1/usage`, in the shape of OpenAI's usage and costs: of the caller's own key alone.

Buckets are those of UTC. Tokens and money are of all calls that were made for its requests, as it is billed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import Refusal
from gateway.ledger.asking import Desk
from gateway.ledger.contract import LedgerDown, Reading, Store
from gateway.ledger.report_query import HOUR_MS
from policies.access import Caller
from policies.cost import usd

_WIDTHS_S = {"1m": 60, "1h": 3600, "1d": 86400}
_LIMITS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
_GROUPS = {"model": "model", "user_id": "user_name"}
_PARAMETERS = ("start_time", "end_time", "bucket_width", "group_by", "group_by[]", "limit", "page")
_FIRST_S = 946_684_800
_LAST_S = 4_102_444_800
_AT_ONCE = 4
_LONGEST_S = 15.0
_MOST_RESULTS = 10_000


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Buckets of `width_s` from `start_s` on, `count` of them, to `end_s` at most: seconds since the epoch."""

    start_s: int
    end_s: int
    width_s: int
    count: int
    group_by: tuple[str, ...]

    @property
    def until_s(self) -> int:
        """The end of what is shown on this page."""
        return min(self.end_s, self.start_s + self.count * self.width_s)


class Usage:
    """The endpoint, over a store."""

    def __init__(self, store: Store, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now
        self._desk = Desk(_AT_ONCE, longest_s=_LONGEST_S)

    async def answer(self, request: Request, caller: Caller) -> Response:
        """Answer a caller that was recognised. Raises `Refusal`."""
        # Up to now means with the second that is not over yet.
        now_s = ceil(self._now())
        asked = asked_of(request.query_params, request.query_params.getlist, now_s=now_s)
        try:
            content = await self._desk.ask(lambda: self._page(asked, caller.key))
        except (LedgerDown, TimeoutError):
            # Why it is down is the operator's: it may name hosts.
            raise Refusal("ledger_unavailable", "What was used cannot be looked up now.") from None
        return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")

    def _page(self, asked: Asked, key: str) -> bytes:
        with self._store.reading() as reading:
            results = _results(reading, asked, key)
        starts = range(asked.start_s, asked.until_s, asked.width_s)
        more = asked.until_s < asked.end_s
        return msgspec.json.encode(
            {
                "object": "page",
                "data": [
                    {
                        "object": "bucket",
                        "start_time": start_s,
                        "end_time": min(start_s + asked.width_s, asked.end_s),
                        "results": results.get(start_s, []),
                    }
                    for start_s in starts
                ],
                "has_more": more,
                "next_page": f"page_{asked.until_s}" if more else None,
            }
        )


def asked_of(words: Mapping[str, str], every: Callable[[str], list[str]], *, now_s: int) -> Asked:
    """Return what parameters ask for; `every` returns all values of one. Raises `Refusal` that names the parameter."""
    for name in words:
        if name not in _PARAMETERS:
            raise _invalid(name[:40], f"there is no such parameter; known are {', '.join(_PARAMETERS)}")
    width = words.get("bucket_width", "1d")
    if width not in _WIDTHS_S:
        raise _invalid("bucket_width", "expected 1m, 1h or 1d")
    width_s = _WIDTHS_S[width]
    if "start_time" not in words:
        raise _invalid("start_time", "it is required: the seconds since 1970 from which on")
    start_s = _number("start_time", words["start_time"], _FIRST_S, _LAST_S)
    end_s = _number("end_time", words["end_time"], _FIRST_S, _LAST_S) if "end_time" in words else now_s
    if "end_time" in words and end_s <= start_s:
        raise _invalid("end_time", "it is not after start_time")
    usual, most = _LIMITS[width]
    count = _number("limit", words["limit"], 1, most) if "limit" in words else usual
    start_s -= start_s % width_s
    if "page" in words:
        prefix, _, number = words["page"].partition("_")
        page_s = int(number) if prefix == "page" and number.isascii() and number.isdigit() and len(number) < 12 else 0
        if not start_s <= page_s < _LAST_S or page_s % width_s:
            raise _invalid("page", "expected the next_page of an answer to the same question")
        start_s = page_s
    named = [word for name in ("group_by", "group_by[]") for text in every(name) for word in text.split(",")]
    for word in named:
        if word not in _GROUPS:
            raise _invalid("group_by", f"expected {' or '.join(_GROUPS)}: a key sees itself alone")
    # A bucket that has begun is shown, as far as it has come.
    return Asked(
        start_s=start_s,
        end_s=max(end_s, start_s + 1),
        width_s=width_s,
        count=count,
        group_by=tuple(dict.fromkeys(named)),
    )


def _results(reading: Reading, asked: Asked, key: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    sums = _sums(reading, asked, key)
    for (start_s, names), amounts in sorted(sums.items(), key=lambda one: (one[0][0], -one[1][4])):
        requests, tokens_in, cached, tokens_out, nusd = amounts
        named = dict(zip(asked.group_by, names, strict=True))
        found.setdefault(start_s, []).append(
            {
                "object": "organization.usage.completions.result",
                "input_tokens": tokens_in,
                "output_tokens": tokens_out,
                "input_cached_tokens": cached,
                "input_audio_tokens": 0,
                "output_audio_tokens": 0,
                "num_model_requests": requests,
                "project_id": None,
                "user_id": named.get("user_id"),
                "api_key_id": key,
                "model": named.get("model"),
                "batch": None,
                "amount": {"value": nusd / 1e9, "currency": "usd"},
                "cost_usd": usd(nusd),
            }
        )
    return found


_Sums = dict[tuple[int, tuple[str | None, ...]], list[int]]


def _sums(reading: Reading, asked: Asked, key: str) -> _Sums:
    found: _Sums = {}
    for rows, places in (
        (_exchanges(reading, asked, key), slice(0, 5)),
        (_adjustments(reading, asked, key), slice(4, 5)),
    ):
        for row in rows:
            names = tuple(None if name is None else str(name) for name in row[1 : 1 + len(asked.group_by)])
            one = (int(row[0] or 0) * asked.width_s, names)
            if one not in found and len(found) >= _MOST_RESULTS:
                raise _invalid("limit", f"this has more than {_MOST_RESULTS} results; ask for fewer buckets")
            amounts = found.setdefault(one, [0] * 5)
            parts = [int(part or 0) for part in row[1 + len(asked.group_by) :]]
            amounts[places] = [amount + part for amount, part in zip(amounts[places], parts, strict=True)]
    return found


def _within(asked: Asked, table: str) -> tuple[str, str]:
    """Return the bucket of a row, and the condition that it is one of the page.

    Hours are listed one by one: so the index leads to those of one key, past all others.
    """
    first_ms, end_ms = asked.start_s * 1000, asked.until_s * 1000
    hours = ", ".join(str(hour) for hour in range(first_ms // HOUR_MS, -(-end_ms // HOUR_MS)))
    condition = f"{table}.at_hour IN ({hours}) AND {table}.key_name = ?"
    if asked.width_s < 3600 or asked.end_s % 3600:
        condition += f" AND {table}.at_ms >= {first_ms} AND {table}.at_ms < {end_ms}"
    number = f"{table}.at_ms / 60000" if asked.width_s < 3600 else f"{table}.at_hour / {asked.width_s // 3600}"
    return number, condition


def _exchanges(reading: Reading, asked: Asked, key: str) -> Iterator[tuple[Any, ...]]:
    number, condition = _within(asked, "e")
    names = "".join(f", e.{_GROUPS[one]}" for one in asked.group_by)
    places = ", ".join(str(one) for one in range(1, 2 + len(asked.group_by)))
    return reading.rows(
        f"SELECT {number}{names}, COUNT(*), SUM(e.prompt_tokens), SUM(e.cached_prompt_tokens), "  # noqa: S608 - names and numbers of ours
        "SUM(e.completion_tokens), SUM(e.input_nusd + e.cached_input_nusd + e.output_nusd + e.gpu_nusd) "
        f"FROM exchanges e WHERE {condition} GROUP BY {places}",
        (key,),
    )


def _adjustments(reading: Reading, asked: Asked, key: str) -> Iterator[tuple[Any, ...]]:
    number, condition = _within(asked, "j")
    names = "".join(f", e.{_GROUPS[one]}" for one in asked.group_by)
    joined = "JOIN exchanges e ON e.exchange_id = j.exchange_id " if names else ""
    places = ", ".join(str(one) for one in range(1, 2 + len(asked.group_by)))
    return reading.rows(
        f"SELECT {number}{names}, SUM(j.change_nusd) FROM adjustments j {joined}WHERE {condition} GROUP BY {places}",  # noqa: S608 - as above
        (key,),
    )


def _number(name: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and least <= int(text) <= most):
        raise _invalid(name, f"expected a number from {least} to {most}")
    return int(text)


def _invalid(name: str, message: str) -> Refusal:
    return Refusal("invalid_value", f"Invalid '{name}': {message}.", param=name)
