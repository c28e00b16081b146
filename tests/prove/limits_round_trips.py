"""How often does a request go to Redis? Calls of the script for requests one after the other, as Redis counts them."""

from __future__ import annotations

import re
from time import monotonic, sleep
from typing import Any

import uvloop

from tests.prove.clients import ask
from tests.prove.limits_site import Site, ask_for, running_site
from tests.prove.limits_upstream import Plan
from tests.prove.proof import Figures, Size
from tests.servers.redis import RedisServer, say

_LINGER_S = 0.02
"""What is to be settled is sent within this time."""
_AT_REST_S = 2.0
_LIMITS: list[dict[str, Any]] = [
    {
        "name": "all",
        "scope": {"key": "plain"},
        "requests": {"limit": 1_000_000, "per": "hour"},
        "tokens": {"limit": 1_000_000_000, "per": "hour"},
        "concurrent": 100,
        "spend": {"usd": 1000},
    },
    {"name": "few", "scope": {"key": "refused"}, "requests": {"limit": 1, "per": "day"}},
    {"name": "of-large", "scope": {"tier": "large"}, "tokens": {"limit": 1_000_000_000, "per": "hour"}},
]


def run(seed: int, size: Size) -> Figures:
    """Ask again and again, and count the calls that are not those of a gateway at rest."""
    requests = (1000 if size == "full" else 60) + seed
    keys = ["plain", "refused", "free"]
    with running_site(keys=keys, limits=_LIMITS) as site:
        # The first ones also find out how things stand, and use up what there is little of.
        for key in ("plain", "refused"):
            uvloop.run(_ask(site, 5, key, "small", 0.05))
        sleep(_LINGER_S)
        before = _evals(site.store)
        sleep(_AT_REST_S)
        resting = (_evals(site.store) - before) / _AT_REST_S
        found = {
            "no limit": _calls(site, requests, resting, "free", "small"),
            "four limits": _calls(site, requests, resting, "plain", "small"),
            "refused": _calls(site, requests, resting, "refused", "small"),
            "tier with a limit": _calls(site, requests, resting, "free", "large"),
            "four limits and a climb into it": _calls(site, requests, resting, "plain", "auto", doubt=2),
        }
        site.sound()
    most = {
        "no limit": 0,
        "four limits": 2,
        "refused": 1,
        "tier with a limit": 2,
        "four limits and a climb into it": 3,
    }
    for name, calls in found.items():
        # A beat more or less than at rest is nothing of theirs.
        assert calls <= most[name] + 0.02 + 2 / requests, f"{name}: {calls:.2f} calls a request"
    return {
        "requests of each kind": float(requests),
        "calls a second at rest": round(resting, 1),
        **{f"calls, {k}": round(v, 2) for k, v in found.items()},
    }


def _calls(site: Site, requests: int, resting: float, key: str, model: str, *, doubt: float = 0.05) -> float:
    """Return how many calls a request takes, beside the `resting` ones a second that a gateway makes at rest."""
    sleep(_LINGER_S)
    before, began_s = _evals(site.store), monotonic()
    uvloop.run(_ask(site, requests, key, model, doubt))
    sleep(_LINGER_S)
    calls = _evals(site.store) - before
    return max(0.0, calls - (monotonic() - began_s) * resting) / requests


async def _ask(site: Site, requests: int, key: str, model: str, doubt: float) -> None:
    for number in range(requests):
        plan = Plan(tag=key, number=number, tokens=4, doubt=doubt)
        answer = await ask(site.gateway.port, ask_for(key, plan, model, max_tokens=4))
        refused = key == "refused" and (number > 0 or answer.status == 429)
        assert answer.status == (429 if refused else 200), answer


def _evals(server: RedisServer) -> int:
    """Return how often the script was called."""
    found = re.search(r"cmdstat_evalsha:calls=(\d+)", say(server, "INFO commandstats"))
    return int(found[1]) if found else 0
