"""How do somebody's limits stand? What a caller may know of its own, as JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from policies.access import Caller
from policies.accounts import Standing
from policies.cost import usd
from policies.limits import Account, Facts, capacity, described, remaining
from routing.ladder import Ladder


def facts_of(ladder: Ladder, caller: Caller, user: str | None) -> list[Facts]:
    """Return everything that a caller can ask for, so that every limit that may count it is found."""
    asked: list[Facts] = []
    for name, route in ladder.names.items():
        if caller.may_ask(name, route.name):
            facts = Facts(key=caller.key, team=caller.team, user=user, route=route.name, model=name)
            asked += [facts, *(msgspec.structs.replace(facts, tier=rung.tier) for rung in route.rungs)]
    return asked


def as_json(standings: Sequence[tuple[Account, Standing]]) -> bytes:
    """Render for `GET /v1/limits`. Money is in dollars, as decimal text; times are in seconds."""
    return msgspec.json.encode({"object": "list", "data": [_shown(*one) for one in standings]})


def _shown(account: Account, standing: Standing) -> dict[str, object]:
    measure = account.meter.measure
    money = measure == "spend"
    left = remaining(account.meter.rule, standing.used, standing.reserved)

    def amount(number: int) -> object:
        return usd(number) if money else number

    allows = dict(described(account.meter))
    allows["limit"] = amount(capacity(account.meter.rule)) if money else allows["limit"]
    return {
        "object": "tierway.limit",
        "name": account.limit.name,
        "scope": account.scope,
        "measure": measure,
        "unit": {"spend": "usd", "concurrent": "requests"}.get(measure, measure.rpartition("_")[2]),
        "allows": allows,
        "used": amount(standing.used),
        "reserved": amount(standing.reserved),
        "remaining": amount(left),
        "reset_s": standing.reset_ms / 1000 if standing.reset_ms >= 0 else None,
        "shadow": account.limit.shadow,
    }
