"""What would happen to this request? Facts, limits, plan and reasons, without sending anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import msgspec

from backends.backend import Endpoint
from gateway.allowance import user_digest
from gateway.app import ladder_of
from gateway.body import read_body
from gateway.config.load import Loaded
from gateway.config.units import render_usd
from gateway.errors import Refusal
from gateway.exchange import find_route
from gateway.keys import caller_of
from gateway.rules import limits_of
from policies.access import Caller
from policies.limits import Facts, Limit, Meter, accounts_of, described
from routing.ladder import Route
from routing.plan import RoutePlan, make_plan


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """A limit that the request, or one of its attempts (`to`), has to fit in. `counts` says whom it counts together."""

    limit: str
    to: str
    counts: str
    allows: tuple[str, ...]
    shadow: bool


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What `tierway explain` prints."""

    facts: object
    route: str
    limits: tuple[Applied, ...]
    plan: tuple[object, ...]
    why: tuple[str, ...]


def explain(loaded: Loaded, request: bytes, *, key: str | None = None) -> Explanation:
    """Explain one request body. Raises `Refusal` with what a client would be told.

    The endpoint is text completion where the body has a `prompt`, else chat. `key` is the name of a key whose
    permissions and limits hold; without it everything is permitted.
    """
    endpoint: Endpoint = (
        "completions" if b'"prompt"' in request and b'"messages"' not in request else "chat/completions"
    )
    body = read_body(endpoint, request)
    callers = {one.name: caller_of(one) for one in loaded.config.keys}
    caller = Caller(key="explain") if key is None else callers[key]
    route = find_route(ladder_of(loaded.config), caller, body.asked.model)
    plan = make_plan(route, choices=body.asked.choices, down=frozenset(), tie_break=0)
    user = caller.user or body.asked.user
    facts = Facts(
        key=caller.key,
        team=caller.team,
        user=user_digest(user),
        route=route.name,
        model=body.asked.model,
    )
    return Explanation(
        facts=body.asked,
        route=route.name,
        limits=tuple(_limits(limits_of(loaded.config), facts, [rung.tier for rung in route.rungs])),
        plan=plan.attempts,
        why=tuple(_reasons(route, plan)),
    )


def _limits(limits: tuple[Limit, ...], facts: Facts, tiers: list[str]) -> Iterator[Applied]:
    """Yield what the request has to fit in, then what each of its attempts has."""
    of_requests = [limit for limit in limits if not limit.of_attempts]
    of_attempts = [limit for limit in limits if limit.of_attempts]
    for tier in (None, *tiers):
        seen = msgspec.structs.replace(facts, tier=tier)
        accounts = accounts_of(of_requests if tier is None else of_attempts, seen)
        for limit, meters in groupby(accounts, key=lambda account: account.limit):
            yield Applied(
                limit=limit.name,
                to="the request" if tier is None else f"an attempt on {tier}",
                counts=limit.matched(seen) or "everything",
                allows=tuple(_allowance(account.meter) for account in meters),
                shadow=limit.shadow,
            )


def _allowance(meter: Meter) -> str:
    """`60 requests per minute, 10 at once` of a meter."""
    told = described(meter)
    amount = render_usd(meter.rule.limit) if meter.measure == "spend" else str(meter.rule.limit)
    text = f"{amount} {meter.measure}"
    if "per" in told:
        text += f" per {told['per']}"
    if "burst" in told:
        text += f", {told['burst']} at once"
    if "window" in told:
        text += f" ({', '.join(str(told[word]) for word in ('window', 'timezone') if word in told)})"
    return text


def _reasons(route: Route, plan: RoutePlan) -> list[str]:
    if len(route.rungs) == 1:
        return [f"'{route.name}' names one tier, so its answer is taken as it is."]
    reasons = []
    for number, rung in enumerate(route.rungs):
        seats = sum(attempt.rung == number for attempt in plan.attempts)
        start = "Asked first" if number == 0 else "Asked if nothing below was good enough"
        if rung.doubt_below is None:
            end = "its answer is taken as it is"
        else:
            end = f"doubted where its confidence is below {rung.doubt_below:g}"
        reasons.append(f"{rung.tier}: {start}, on {seats} backend{'s' if seats != 1 else ''}; {end}.")
    hold = route.hold
    reasons.append(
        f"A stream is judged after {hold.tokens} tokens of each choice, {hold.time_s:g} s after its first token, "
        f"or {hold.size_bytes} bytes."
    )
    return reasons


def run(loaded: Loaded, path: str, key: str | None) -> int:
    """Print the explanation of the request in a file, `-` for standard input."""
    request = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        explanation = explain(loaded, request, key=key)
    except Refusal as refusal:
        print(msgspec.json.format(refusal.body(), indent=2).decode())
        return 1
    print(msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode())
    return 0
