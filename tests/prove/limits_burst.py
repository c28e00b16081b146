"""Do limits hold exactly when hundreds ask at once, of many processes, and some leave in the middle?

Every seat is a key with one kind of limit and a crowd of requests. What was let through is counted at the model, what it
used is worked out from what the model generated, and in the end the gateway must have come to the same.
"""

from __future__ import annotations

from collections import Counter
from math import ceil
from random import Random
from time import monotonic
from typing import Any, NamedTuple

import msgspec
import redis
import uvloop

from tests.prove.limits_crowd import QUEUED, Asked, Seat, crowd, play, seats
from tests.prove.limits_reserved import Reserved, watched
from tests.prove.limits_site import LARGE, Shown, Site, cost_nusd, running_site
from tests.prove.limits_upstream import Served
from tests.prove.proof import Figures, Size

_HOUR_S = 3600.0
_STATE = {"timeout": "2s"}
_QUEUE = {"concurrent": QUEUED, "size": 1000, "max_wait": "20s"}
_LARGEST_PROMPT = 400
_SETTLED_WITHIN_S = 1.0
"""After its last byte left the model a request is settled: later than that its use cannot be unknown."""


class Range(NamedTuple):
    """What was used, at least and at most: of what was left in the middle nobody can say exactly how much came."""

    least: int
    most: int


def run(seed: int, size: Size) -> Figures:
    """Send one burst of mixed requests, and compare what came of it with the limits, with the model and with Redis."""
    random = Random(seed)
    workers, requests = (8, 500) if size == "full" else (2, 250)
    seated = seats(random, requests)
    limits = [seat.noun() for seat in seated if seat.measure]
    keys = [seat.key for seat in seated]
    with running_site(
        "--workers", str(workers), keys=keys, limits=limits, state=_STATE, tells=seed % 2 == 1, change=_with_queue
    ) as site:
        everyone = [one for seat in seated for one in crowd(seat, random)]
        began_s = monotonic()
        with watched(site.store) as reserved:
            uvloop.run(play(site.gateway.port, everyone))
            took_s = monotonic() - began_s
            assert site.at_rest(keys), [one for key in keys for one in site.limits(key) if one.reserved]
        site.sound()
        _nothing_is_reserved_in_redis(site)
        statuses = Counter(one.answer.status for one in everyone if one.stays)
        assert set(statuses) <= {200, 400, 402, 429, 503}, _odd(everyone)
        found: Figures = {
            "requests": float(len(everyone)),
            "answered": float(statuses[200]),
            "burst, s": round(took_s, 1),
        }
        found |= _check(site, seated, everyone, reserved, began_s)
    return found


def _with_queue(config: dict[str, Any]) -> None:
    config["tiers"][1]["queue"] = _QUEUE


def _odd(crowd: list[Asked]) -> str:
    odd = [one for one in crowd if one.stays and one.answer.status not in (200, 400, 402, 429, 503)]
    return f"{len(odd)} odd answers, the first: {odd[0].answer}"


# -- the checks ------------------------------------------------------------------------------------------------------


def _check(site: Site, seats: list[Seat], crowd: list[Asked], reserved: Reserved, began_s: float) -> Figures:
    slots: list[float] = []
    figures: Figures = {}
    for seat in seats:
        mine = [one for one in crowd if one.seat is seat]
        if seat.measure == "requests":
            for user in sorted({one.user or "" for one in mine}):
                _check_requests(site, seat, [one for one in mine if (one.user or "") == user], began_s)
        elif seat.measure == "concurrent":
            peak = site.upstream.peaks[seat.key]
            assert peak <= seat.limit, f"{seat}: {peak} at the same time"
            slots.append(peak / seat.limit)
        elif seat.measure:
            share, over, error = _check_use(site, seat, mine, reserved, began_s)
            figures[f"{seat.kind}: settled, % of the limit"] = round(100 * share, 1)
            if not seat.strict:
                figures[f"{seat.kind}: above the limit, % of it"] = round(100 * over, 1)
                figures[f"{seat.kind}: error of those in flight, % of it"] = round(100 * error, 1)
    peak = site.upstream.peaks[LARGE]
    assert peak <= QUEUED, f"the queue of large let {peak} in at the same time"
    return {
        "requests admitted above a limit": 0.0,
        "open above a limit": 0.0,
        "most open, % of the limit": round(100 * max(slots), 1),
        "settled above a strict limit": 0.0,
        **dict(sorted(figures.items())),
    }


def _check_requests(site: Site, seat: Seat, mine: list[Asked], began_s: float) -> None:
    numbers = {one.plan.number for one in mine}
    reached = {one.number for one in site.upstream.of(seat.key) if one.number in numbers}
    (shown,) = _shown(site, seat, mine[0].user)
    drained = seat.limit * (monotonic() - began_s) / _HOUR_S
    allowed = int(seat.limit + drained)
    assert len(reached) <= allowed, f"{seat}: {len(reached)} of {seat.limit} admitted"
    if not seat.leaves:
        answered = sum(one.answer.status == 200 for one in mine)
        assert answered == len(reached), f"{seat}: {answered} answered, {len(reached)} reached the model"
        assert answered >= min(len(mine), seat.limit), f"{seat}: only {answered} of {len(mine)} admitted"
    # Whoever left before anybody was asked may or may not have counted.
    most = len(reached) + sum(not one.stays for one in mine)
    assert len(reached) - ceil(drained) <= shown.used <= most, f"{seat}: {shown} for {len(reached)} that were admitted"
    assert shown.used <= seat.limit, f"{seat}: {shown}"


def _check_use(
    site: Site, seat: Seat, mine: list[Asked], reserved: Reserved, began_s: float
) -> tuple[float, float, float]:
    """Return, in parts of the limit, what was used, how far above it that is, and the error of those in flight.

    That is what the requests that were open when the last one was let in used above what had been reserved for them.
    """
    calls: dict[int, list[Served]] = {}
    for call in site.upstream.of(seat.key):
        calls.setdefault(call.number, []).append(call)
    last_s = max((of_one[0].began_s for of_one in calls.values()), default=0.0)
    least = most = error = 0
    for one in mine:
        of_one = calls.get(one.plan.number, [])
        assert of_one or one.answer.status != 200, f"{seat}: an answer that no model gave"
        used = _use(seat, one, of_one)
        least, most = least + used.least, most + used.most
        held = _held(seat, one, reserved)
        assert held is None or not seat.strict or used.least <= held, (
            f"{seat}: {used} of {held} reserved for {one.plan}"
        )
        if any((call.ended_s or last_s) > last_s - _SETTLED_WITHIN_S for call in of_one):
            error += max(0, used.most - (held or 0))
    (shown,) = _shown(site, seat, None)
    drained = ceil(seat.limit * (monotonic() - began_s) / _HOUR_S) if seat.measure == "tokens" else 0
    assert least - drained <= shown.used <= most, f"{seat}: {shown}, but it was {least} to {most}"
    over = max(0, least - drained - seat.limit)
    if seat.strict:
        assert over == 0, f"{seat}: {least} was used"
        assert shown.used <= seat.limit, f"{seat}: {shown}"
    else:
        assert over <= error, f"{seat}: {over} too much, but the error of those in flight is {error}"
    return least / seat.limit, over / seat.limit, error / seat.limit


def _held(seat: Seat, one: Asked, reserved: Reserved) -> int | None:
    """Return what was reserved for a request; None where it left before it was told its id."""
    exchange_id = one.answer.headers.get("x-tierway-exchange-id")
    if exchange_id is None or one.answer.status != 200:
        return None
    (held,) = (amount for account, amount in reserved.of(exchange_id).items() if account.startswith(f"of-{seat.key}/"))
    return held


def _use(seat: Seat, one: Asked, calls: list[Served]) -> Range:
    """Work out what a request used: exactly if it came to its end, within bounds of what somebody turned from."""
    least = most = 0
    for call in calls:
        shown = call is calls[-1]
        if seat.measure == "tokens" and not shown:
            # A doubted attempt is not the caller's.
            continue
        if shown and one.stays and one.answer.status == 200 and one.answer.whole:
            least += _amount(seat, call)
            most += _amount(seat, call)
        else:
            # Without a bill a prompt is taken for what prompts of that length were billed before, here anything up to
            # the largest of them and a few tokens for its text, and every event of a stream for a token,
            # the first of each choice too.
            prompt = max(call.prompt_tokens, _LARGEST_PROMPT + len(one.data) // 4)
            tokens = call.tokens + one.choices
            most += _amount(seat, msgspec.structs.replace(call, prompt_tokens=prompt, tokens=tokens))
    return Range(least, most)


def _amount(seat: Seat, one: Served) -> int:
    return cost_nusd(one) if seat.measure == "spend" else one.prompt_tokens + one.tokens


def _shown(site: Site, seat: Seat, user: str | None) -> list[Shown]:
    query = None if user is None else user.replace(" ", "%20")
    return [one for one in site.limits(seat.key, query) if one.name == f"of-{seat.key}"]


def _nothing_is_reserved_in_redis(site: Site) -> None:
    with redis.Redis.from_url(site.store.url) as client:
        accounts = client.keys("tierway:*:a:*")
        assert accounts
        for name, raw in zip(accounts, client.mget(accounts), strict=True):
            reserved = msgspec.msgpack.decode(raw)[0] if raw else 0
            assert reserved == 0, f"{name!r} holds {reserved}"
        for leases in client.keys("tierway:*:leases"):
            assert client.zcard(leases) == 0, "leases are left"
