"""What clients are told of their limits."""

from __future__ import annotations

import pytest

from gateway.refusing import rate_headers, refusal_of, shown_ms
from policies.accounts import Budget, Concurrency, Entry, Rate, Rule, Short, Standing
from policies.limits import Account, Limit, Measure, Meter


@pytest.mark.parametrize(
    ("duration_ms", "shown"),
    [
        (0, "0ms"),
        (-1, "0ms"),
        (20, "20ms"),
        (1000, "1s"),
        (1500, "1.5s"),
        (60_000, "1m0s"),
        (361_250, "6m1.25s"),
        (3_600_000, "1h0m0s"),
        (90_061_000, "25h1m1s"),
    ],
)
def test_durations_are_written_as_openai_does(duration_ms: int, shown: str) -> None:
    assert shown_ms(duration_ms) == shown


def account(measure: Measure, rule: Rule, *, name: str = "some", shadow: bool = False) -> Account:
    meter = Meter(measure=measure, rule=rule)
    limit = Limit(name=name, scope=(("key", "each"),), meters=(meter,), shadow=shadow)
    return Account(limit, meter, "key=alice", f"{name}/{measure}/key=alice")


MINUTE = Rate(60, 60_000, 60)
REQUESTS = account("requests", MINUTE)
SPEND = account("spend", Budget(10**9))


def test_shadow_limits_and_budgets_are_in_no_header() -> None:
    accounts = [account("requests", MINUTE, shadow=True), SPEND, account("concurrent", Concurrency(3))]
    assert rate_headers(accounts, [Standing(1, 0, 5)] * 3) == []


def test_the_worst_is_told() -> None:
    accounts = [REQUESTS, SPEND]
    entries = [Entry("a", MINUTE, taken=1), Entry("b", Budget(10**9), held=5)]
    standings = [Standing(60, 0, 60_000), Standing(10**9, 0, -1)]
    slow = Short(0, "used", 61_001)
    assert refusal_of(accounts, entries, standings, [slow, Short(1, "used", -1)]).code == "insufficient_quota"
    refusal = refusal_of(accounts, entries, standings, [slow])
    assert refusal.retry_after_s == 62
    assert refusal.message.endswith("Try again in 62 s.")
    assert refusal_of(accounts, entries, standings, [slow, Short(1, "never", -1)]).code == "request_exceeds_limit"


def test_a_budget_that_others_have_reserved_is_not_exhausted() -> None:
    entry = Entry("b", Budget(10**9), held=5)
    refusal = refusal_of([SPEND], [entry], [Standing(0, 10**9, -1)], [Short(0, "reserved", -1)])
    assert (refusal.code, refusal.retry_after_s) == ("rate_limit_exceeded", 1)
    assert "an estimate" in refusal.message


def test_the_longest_wait_is_the_one_told() -> None:
    accounts = [REQUESTS, account("tokens", Rate(100, 60_000, 100))]
    entries = [Entry("a", MINUTE, taken=1), Entry("b", MINUTE, held=50)]
    short = [Short(0, "used", 100), Short(1, "used", 30_000)]
    refusal = refusal_of(accounts, entries, [Standing(60, 0, 1), Standing(90, 0, 1)], short)
    assert refusal.retry_after_s == 30
    assert "100 tokens per minute" in refusal.message
