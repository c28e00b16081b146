"""What would happen to this request? Facts, plan and reasons, without sending anything."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from backends.backend import Endpoint
from gateway.app import caller_of, ladder_of
from gateway.body import read_body
from gateway.config.load import Loaded
from gateway.errors import Refusal
from gateway.exchange import find_route
from policies.access import Caller
from routing.ladder import Route
from routing.plan import RoutePlan, make_plan


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What `tierway explain` prints."""

    facts: object
    route: str
    plan: tuple[object, ...]
    why: tuple[str, ...]


def explain(loaded: Loaded, request: bytes, *, key: str | None = None) -> Explanation:
    """Explain one request body. Raises `Refusal` with what a client would be told.

    The endpoint is text completion where the body has a `prompt`, else chat. `key` is the name of a key whose
    permissions hold; without it everything is permitted.
    """
    endpoint: Endpoint = (
        "completions" if b'"prompt"' in request and b'"messages"' not in request else "chat/completions"
    )
    body = read_body(endpoint, request)
    callers = {one.name: caller_of(one) for one in loaded.config.keys}
    caller = Caller(key="explain") if key is None else callers[key]
    route = find_route(ladder_of(loaded.config), caller, body.asked.model)
    plan = make_plan(route, choices=body.asked.choices, down=frozenset(), tie_break=0)
    return Explanation(facts=body.asked, route=route.name, plan=plan.attempts, why=tuple(_reasons(route, plan)))


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
