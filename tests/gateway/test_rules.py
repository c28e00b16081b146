"""What the limits of a file mean to the rules, and totals to their accounts."""

from __future__ import annotations

from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest

from gateway.admission import Admission, PartitionBy
from gateway.allowance import user_digest
from gateway.config.load import parse
from gateway.limiter import MemoryLimiter
from gateway.metrics import Metrics
from gateway.rules import limits_of
from gateway.seeding import TotalsError, entries_of, read_totals
from policies.accounts import Budget, Concurrency, Entry, Rate, Rolling
from policies.limits import Calendar, Limit, Meter

NUSD = 10**9


def limits(*nouns: dict[str, Any], queue: dict[str, Any] | None = None) -> tuple[Limit, ...]:
    tier: dict[str, Any] = {"name": "small", "backends": ["b"], "price": {"input": 1, "output": 1}}
    if queue is not None:
        tier["queue"] = queue
    config = {
        "backends": {"b": {"kind": "scripted", "model": "m", "tokens": ["Hi"]}},
        "tiers": [tier],
        "keys": [{"name": "alice", "sha256": "ab" * 32, "team": "search"}],
        "limits": list(nouns),
    }
    return limits_of(parse(msgspec.json.encode(config).decode()).config)


@pytest.mark.parametrize(
    ("measures", "meters"),
    [
        (
            {"requests": {"limit": 60, "per": "minute"}},
            [Meter(measure="requests", rule=Rate(60, 60_000, 60), span=":minute")],
        ),
        (
            {"tokens": {"limit": 9, "per": "day", "burst": 3}},
            [Meter(measure="tokens", rule=Rate(9, 86_400_000, 3), span=":day")],
        ),
        ({"concurrent": 4}, [Meter(measure="concurrent", rule=Concurrency(4))]),
        ({"spend": {"usd": "1.5"}}, [Meter(measure="spend", rule=Budget(1_500_000_000), span=":total")]),
        (
            {"spend": {"usd": 5, "per": "month", "window": "rolling"}},
            [Meter(measure="spend", rule=Rolling(5 * NUSD, 30 * 86_400_000), span=":rolling-month")],
        ),
        (
            {"spend": {"usd": 5, "per": "day", "timezone": "Europe/Berlin"}},
            [
                Meter(
                    measure="spend",
                    rule=Calendar(limit=5 * NUSD, period="day", zone=ZoneInfo("Europe/Berlin")),
                    span=":day",
                )
            ],
        ),
    ],
    ids=str,
)
def test_what_is_written_is_what_is_counted(measures: dict[str, Any], meters: list[Meter]) -> None:
    (limit,) = limits({"name": "one", **measures})
    assert list(limit.meters) == meters
    assert (limit.strict, limit.all_attempts, limit.rank, limit.shadow, limit.when_down, limit.max_wait_s) == (
        False,
        False,
        None,
        False,
        "share",
        5.0,
    )


def test_every_setting_arrives() -> None:
    (limit,) = limits(
        {
            "name": "one",
            "concurrent": 1,
            "scope": {"user": "eve", "key": "each"},
            "reserve": "strict",
            "counted": "all_attempts",
            "priority": 3,
            "shadow": True,
            "when_down": "closed",
            "max_wait": "0s",
        }
    )
    assert limit.scope == (("key", "each"), ("user", user_digest("eve")))
    assert (limit.strict, limit.all_attempts, limit.rank, limit.shadow, limit.when_down, limit.max_wait_s) == (
        True,
        True,
        3,
        True,
        "closed",
        None,
    )


def test_a_queue_is_a_limit_of_its_tier() -> None:
    (limit,) = limits(queue={"concurrent": 7, "size": 3, "max_wait": "2s"})
    assert (limit.scope, limit.of_attempts, limit.most_waiting, limit.max_wait_s) == ((("tier", "small"),), True, 3, 2)
    assert limit.meters == (Meter(measure="concurrent", rule=Concurrency(7)),)


# -- totals -----------------------------------------------------------------------------------------------------------

_BUDGETS = (
    {"name": "team", "scope": {"team": "each"}, "spend": {"usd": 5}},
    {"name": "all", "spend": {"usd": 9}},
    {"name": "rate", "requests": {"limit": 1, "per": "day"}},
)


def entries(totals: list[dict[str, Any]], partition: PartitionBy = "deployment") -> dict[str, tuple[Entry, ...]]:
    admission = Admission(MemoryLimiter(), limits(*_BUDGETS), partition=partition, metrics=Metrics())
    return dict(entries_of(read_totals(msgspec.json.encode({"totals": totals})), admission))


def test_totals_become_entries_of_their_accounts() -> None:
    found = entries(
        [{"limit": "team", "scope": {"team": "search"}, "usd": "1.25"}, {"limit": "all", "usd": "$0.000000001"}]
    )
    assert found == {
        "deployment": (
            Entry("team/spend:total/team=search", Budget(5 * NUSD), taken=1_250_000_000),
            Entry("all/spend:total/", Budget(9 * NUSD), taken=1),
        )
    }
    assert set(entries([{"limit": "team", "scope": {"team": "search"}, "usd": "1"}], "team")) == {"team=search"}


@pytest.mark.parametrize(
    ("total", "said"),
    [
        ({"limit": "teem", "usd": "1"}, "there is no limit 'teem'"),
        ({"limit": "team", "usd": "1"}, "the scope of 'team' has team; found nothing"),
        ({"limit": "all", "scope": {"key": "a"}, "usd": "1"}, "the scope of 'all' has nothing; found key"),
        ({"limit": "rate", "usd": "1"}, "'rate' does not limit spending"),
        ({"limit": "all", "usd": "-1"}, "usd: "),
        ({"limit": "all", "usd": "much"}, "usd: "),
    ],
    ids=str,
)
def test_a_total_that_fits_no_limit_is_told(total: dict[str, Any], said: str) -> None:
    with pytest.raises(TotalsError, match=r"totals\[1\]: ") as raised:
        entries([{"limit": "all", "usd": "1"}, total])
    assert said in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"totals": [{"limit": 1}]}', b'{"totals": [], "more": 1}'])
def test_a_file_that_is_none_is_told(data: bytes) -> None:
    with pytest.raises(TotalsError):
        read_totals(data)
