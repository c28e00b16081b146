"""Which limits apply to whom, and what they count."""

from __future__ import annotations

import msgspec
import pytest

from policies.accounts import Budget, Concurrency, Entry, Rate
from policies.limits import (
    Amounts,
    Calendar,
    Dimension,
    Facts,
    Limit,
    Meter,
    Need,
    Use,
    accounts_of,
    described,
    remaining,
)

MINUTE = Rate(60, 60_000, 10)
REQUESTS = Meter(measure="requests", rule=MINUTE, span=":minute")
FACTS = Facts(key="alice", team="search", user="u1", route="auto", model="gpt-4o")
NEED = Need(
    estimate=Amounts(input_tokens=10, output_tokens=20, spend_nusd=30),
    most_shown=Amounts(input_tokens=100, output_tokens=200, spend_nusd=300),
    most_of_all=Amounts(input_tokens=1000, output_tokens=2000, spend_nusd=3000),
)


def limit(*scope: tuple[Dimension, str], meters: tuple[Meter, ...] = (REQUESTS,), **settings: object) -> Limit:
    return Limit(name=str(settings.pop("name", "some")), scope=scope, meters=meters, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scope", "whom"),
    [
        ((), ""),
        ((("key", "each"),), "key=alice"),
        ((("key", "alice"),), "key=alice"),
        ((("key", "bob"),), None),
        ((("team", "search"), ("route", "auto")), "team=search|route=auto"),
        ((("team", "search"), ("route", "other")), None),
        ((("model", "gpt-4o"),), "model=gpt-4o"),
        ((("user", "each"),), "user=u1"),
        ((("tier", "each"),), None),
    ],
)
def test_a_scope_matches_or_not(scope: tuple[tuple[Dimension, str], ...], whom: str | None) -> None:
    assert limit(*scope).matched(FACTS) == whom


def test_who_leaves_the_user_out_is_counted_with_all_others_who_do() -> None:
    nobody = Facts(key="alice", route="auto", model="auto")
    assert limit(("user", "each")).matched(nobody) == "user="
    assert limit(("team", "each")).matched(nobody) is None


def test_no_value_can_look_like_two() -> None:
    sly = Facts(key="alice", route="auto", model="m|user=u1")
    honest = Facts(key="alice", user="u1", route="auto", model="m")
    both = limit(("model", "each"), ("user", "each"))
    assert both.matched(sly) == "model=m%7Cuser=u1|user="
    assert both.matched(honest) == "model=m|user=u1"


def test_whom_an_account_counts_is_told_as_it_was() -> None:
    odd = Facts(key="alice", user="u|1%", route="auto", model="m")
    (account,) = accounts_of([limit(("key", "each"), ("user", "each"))], odd)
    assert account.scope == {"key": "alice", "user": "u|1%"}


def test_of_ranked_limits_the_highest_that_match_apply_and_unranked_ones_always() -> None:
    limits = [
        limit(("key", "each"), name="default", rank=1),
        limit(("key", "alice"), name="alice", rank=5),
        limit(("key", "bob"), name="bob", rank=9),
        limit(name="all"),
    ]
    assert [one.limit.name for one in accounts_of(limits, FACTS)] == ["alice", "all"]


def test_an_account_for_each_meter_with_a_name_of_its_own() -> None:
    meters = (REQUESTS, Meter(measure="concurrent", rule=Concurrency(3)))
    names = [one.name for one in accounts_of([limit(("key", "each"), meters=meters)], FACTS)]
    assert names == ["some/requests:minute/key=alice", "some/concurrent/key=alice"]


def test_requests_are_taken_at_once_and_the_rest_is_held() -> None:
    meters = tuple(
        Meter(measure=measure, rule=Budget(1000))
        for measure in ("requests", "concurrent", "tokens", "input_tokens", "output_tokens", "spend")
    )
    entries = [one.entry(NEED, 0) for one in accounts_of([limit(meters=meters)], FACTS)]
    assert [(one.taken, one.held) for one in entries] == [(1, 0), (0, 1), (0, 30), (0, 10), (0, 20), (0, 30)]
    assert not any(one.shadow for one in entries)


def test_strict_reserves_the_most_of_what_it_counts() -> None:
    meters = (Meter(measure="tokens", rule=Budget(99)), Meter(measure="spend", rule=Budget(99)))

    def held(**settings: object) -> list[int]:
        return [one.entry(NEED, 0).held for one in accounts_of([limit(meters=meters, **settings)], FACTS)]

    assert held() == [30, 30]
    assert held(strict=True) == [300, 3000]
    assert held(strict=True, all_attempts=True) == [3000, 3000]


def test_an_estimate_is_no_proof_that_a_request_cannot_fit_but_what_was_counted_is() -> None:
    meter = Meter(measure="tokens", rule=Rate(15, 60_000, 15))
    account = accounts_of([limit(meters=(meter,))], FACTS)[0]
    assert account.entry(NEED, 0).held == 15
    counted = msgspec.structs.replace(NEED, least=Amounts(input_tokens=17))
    assert account.entry(counted, 0).held == 17


def test_a_strict_limit_never_goes_by_an_estimate_for_want_of_the_most() -> None:
    account = accounts_of([limit(meters=(Meter(measure="tokens", rule=Budget(99)),), strict=True)], FACTS)[0]
    with pytest.raises(ValueError, match="strict"):
        account.entry(Need(estimate=Amounts()), 0)


def test_doubted_attempts_cost_money_and_no_tokens_of_the_callers() -> None:
    use = Use(
        shown=Amounts(input_tokens=1, output_tokens=2), of_all=Amounts(input_tokens=11, output_tokens=12, spend_nusd=5)
    )
    meters = (REQUESTS, Meter(measure="tokens", rule=MINUTE), Meter(measure="spend", rule=Budget(9)))
    assert [one.used(use) for one in accounts_of([limit(meters=meters)], FACTS)] == [0, 3, 5]
    assert [one.used(use) for one in accounts_of([limit(meters=meters, all_attempts=True)], FACTS)] == [0, 23, 5]


def test_a_calendar_rule_has_the_windows_around_now() -> None:
    from datetime import UTC  # noqa: PLC0415 - the one zone that needs no table

    meter = Meter(measure="spend", rule=Calendar(limit=50, period="hour", zone=UTC))
    entry = accounts_of([limit(meters=(meter,), shadow=True)], FACTS)[0].entry(NEED, 7_200_001)
    assert entry == Entry(
        entry.account, Budget(50, (3_600_000, 7_200_000, 10_800_000, 14_400_000)), held=30, shadow=True
    )


def test_what_remains_is_never_less_than_nothing() -> None:
    assert remaining(MINUTE, 4, 3) == 3
    assert remaining(Budget(5), 4, 3) == 0


def test_meters_in_words() -> None:
    assert described(REQUESTS) == {"limit": 60, "per": "minute", "burst": 10}
    assert described(Meter(measure="spend", rule=Budget(5))) == {"limit": 5, "window": "total"}
