"""Is the right thing told of the limits of a request?"""

from __future__ import annotations

from pathlib import Path

from gateway.config.load import parse
from gateway.tools.explain import Applied, explain

GOOD = (Path(__file__).parents[1] / "config" / "good.yaml").read_text().replace("name: k\n", "name: k\n    team: t\n")
LIMITS = """\
limits:
  - name: rate
    scope: {key: each, route: auto}
    requests: {limit: 60, per: minute, burst: 10}
    concurrent: 4
  - name: budget
    scope: {team: t}
    spend: {usd: 0.25, per: month, timezone: UTC}
    shadow: true
  - name: others
    scope: {route: small}
    concurrent: 1
  - name: of-large
    scope: {tier: large}
    tokens: {limit: 5, per: day}
"""
QUEUE = ("name: large\n", "name: large\n    queue: {concurrent: 2}\n")
REQUEST = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}'


def test_the_limits_that_would_apply_are_told_and_no_others() -> None:
    told = explain(parse(GOOD.replace(*QUEUE) + LIMITS), REQUEST, key="k").limits
    assert told == (
        Applied(
            limit="rate",
            to="the request",
            counts="key=k|route=auto",
            allows=("60 requests per minute, 10 at once", "4 concurrent"),
            shadow=False,
        ),
        Applied(
            limit="budget",
            to="the request",
            counts="team=t",
            allows=("$0.25 spend per month (calendar, UTC)",),
            shadow=True,
        ),
        Applied(
            limit="of-large",
            to="an attempt on large",
            counts="tier=large",
            allows=("5 tokens per day, 5 at once",),
            shadow=False,
        ),
        Applied(
            limit="queue of large",
            to="an attempt on large",
            counts="tier=large",
            allows=("2 concurrent",),
            shadow=False,
        ),
    )


def test_without_limits_none_are_told() -> None:
    assert explain(parse(GOOD), REQUEST, key="k").limits == ()
