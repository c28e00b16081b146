"""Is everything told that makes no sense in limits, and nothing of those that do?"""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.load import ConfigError, parse

GOOD = (Path(__file__).parent / "good.yaml").read_text()
ONE_A_DAY = "requests: {limit: 1, per: day}"
ADMIN = ("{port: 0}", "{port: 0, admin: {port: 0, key: {from: env, name: K}}}")
REDIS = 'state: {kind: redis, addresses: ["r:1"], partition: PARTITION}\n'


def file_with(*limits: str, edits: tuple[tuple[str, str], ...] = (), more: str = "") -> str:
    """Return the good file with these limits from line 21 on, and more below them."""
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return text + "".join(["limits:\n", *(f"  - {{{limit}}}\n" for limit in limits), more])


def problems_of(text: str) -> list[str]:
    try:
        parse(text, "g")
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def warnings_of(text: str) -> list[str]:
    return [str(warning) for warning in parse(text, "g").warnings]


GOOD_LIMITS = [
    f"name: l, {ONE_A_DAY}",
    f"name: l, scope: {{key: each, user: each, tier: each}}, {ONE_A_DAY}",
    f"name: l, scope: {{key: k, team: t, user: anyone at all, route: auto, model: gpt-4o, tier: small}}, {ONE_A_DAY}",
    f"name: l, scope: {{route: m-two, model: small}}, {ONE_A_DAY}",
    "name: l, concurrent: 1, max_wait: 0s",
    "name: l, spend: {usd: 5}",
    "name: l, spend: {usd: $5, per: month, window: calendar, timezone: Europe/Berlin}",
    "name: l, spend: {usd: 0.25 USD, per: day, window: rolling}",
    "name: l, spend: {usd: 5, per: day, window: rolling, timezone: UTC}",
    "name: l, reserve: strict, input_tokens: {limit: 1, per: day}",
    "name: l, reserve: strict, scope: {tier: small}, spend: {usd: 5}",
    "name: l, reserve: strict, scope: {route: m-one}, spend: {usd: 5}",
    "name: l, reserve: strict, scope: {model: small}, tokens: {limit: 1, per: day, burst: 5}",
]


@pytest.mark.parametrize("limit", GOOD_LIMITS)
def test_what_makes_sense_is_taken_without_a_word(limit: str) -> None:
    assert warnings_of(file_with(limit, edits=(("  - name: k\n", "  - name: k\n    team: t\n"),))) == []


def test_values_have_their_units() -> None:
    limits = parse(file_with("name: l, spend: {usd: 0.25 USD}, concurrent: 3", "name: m, concurrent: 1, max_wait: 0s"))
    first, second = limits.config.limits
    assert first.spend is not None
    assert first.spend.usd == 250_000_000
    assert (first.max_wait, second.max_wait) == (5.0, 0.0)


STRICT = "`strict` reserves the longest answer, and that of tier `large` is not known; give it `max_output_tokens` or `context_tokens`"
CASES = {
    "nothing limited": (
        "name: l",
        "21:5: limits[0]: limits nothing; it needs at least one of `requests`, `tokens`, `input_tokens`, `output_tokens`, `concurrent`, `spend`",
    ),
    "unknown key": (
        f"name: l, scope: {{key: K-}}, {ONE_A_DAY}",
        "21:28: limits[0].scope.key: no key `K-`; did you mean `k`?",
    ),
    "each misspelt": (
        f"name: l, scope: {{key: eahc}}, {ONE_A_DAY}",
        "21:28: limits[0].scope.key: no key `eahc`; did you mean `each`?",
    ),
    "unknown team": (
        f"name: l, scope: {{team: web}}, {ONE_A_DAY}",
        "21:29: limits[0].scope.team: no team `web`; a team without keys in this file has to stand in `teams`",
    ),
    "unknown route": (
        f"name: l, scope: {{route: atuo}}, {ONE_A_DAY}",
        "21:30: limits[0].scope.route: no route, tier or model `atuo`; did you mean `auto`?",
    ),
    "alias for a route": (
        f"name: l, scope: {{route: gpt-4o}}, {ONE_A_DAY}",
        "21:30: limits[0].scope.route: `gpt-4o` is an alias of route `auto`; name that, or use `model`",
    ),
    "unknown model": (
        f"name: l, scope: {{model: gpt-4}}, {ONE_A_DAY}",
        "21:30: limits[0].scope.model: no route, alias, tier or model `gpt-4`; did you mean `gpt-4o`?",
    ),
    "unknown tier": (
        f"name: l, scope: {{tier: smal}}, {ONE_A_DAY}",
        "21:29: limits[0].scope.tier: no tier `smal`; did you mean `small`?",
    ),
    "window for ever": (
        "name: l, spend: {usd: 5, window: calendar}",
        "21:39: limits[0].spend.window: needs `per`: without it the sum is for ever, and has no window",
    ),
    "zone for ever": (
        "name: l, spend: {usd: 5, timezone: UTC}",
        "21:41: limits[0].spend.timezone: needs `per`: without it the sum is for ever, and has no window",
    ),
    "rolling in a zone": (
        "name: l, spend: {usd: 5, per: day, window: rolling, timezone: Europe/Berlin}",
        "21:68: limits[0].spend.timezone: a rolling window looks back from now, whatever the calendar says; leave it out",
    ),
    "unknown zone": (
        "name: l, spend: {usd: 5, per: day, timezone: Europe/Berln}",
        "21:51: limits[0].spend.timezone: no time zone `Europe/Berln`; did you mean `Europe/Berlin`?",
    ),
    "path for a zone": (
        "name: l, spend: {usd: 5, per: day, timezone: ../../../etc/passwd}",
        "21:51: limits[0].spend.timezone: no time zone `../../../etc/passwd`",
    ),
    "strict spend": ("name: l, spend: {usd: 5}, reserve: strict", f"21:41: limits[0].reserve: {STRICT}"),
    "strict tokens of a route": (
        "name: l, scope: {route: auto}, tokens: {limit: 1, per: day}, reserve: strict",
        f"21:76: limits[0].reserve: {STRICT}",
    ),
    "strict tokens of an alias": (
        "name: l, scope: {model: gpt-4o}, output_tokens: {limit: 1, per: day}, reserve: strict",
        f"21:85: limits[0].reserve: {STRICT}",
    ),
    "strict of a key that may ask for it": (
        "name: l, scope: {key: k}, tokens: {limit: 1, per: day}, reserve: strict",
        f"21:71: limits[0].reserve: {STRICT}",
    ),
    "no limit": (
        "name: l, requests: {limit: 0, per: day}",
        "21:33: limits[0].requests.limit: must be at least 1, found `0`",
    ),
    "no burst": (
        "name: l, requests: {limit: 1, per: day, burst: 0}",
        "21:53: limits[0].requests.burst: must be at least 1, found `0`",
    ),
    "rate for a month": (
        "name: l, requests: {limit: 1, per: month}",
        "21:41: limits[0].requests.per: expected one of `day`, `hour`, `minute`, `second`, found `month`",
    ),
    "euros": (
        "name: l, spend: {usd: 5 EUR}",
        "21:28: limits[0].spend.usd: expected dollars, such as `5`, `$5` or `0.25 USD`, found `5 EUR`",
    ),
    "no dollars": ("name: l, spend: {usd: 0}", "21:28: limits[0].spend.usd: must be more than 0, found `0`"),
    "too many dollars": (
        "name: l, spend: {usd: 9000001}",
        "21:28: limits[0].spend.usd: expected at most 9000000 dollars, found `9000001`",
    ),
    "no wait by nothing": (
        "name: l, concurrent: 1, max_wait: null",
        "21:40: limits[0].max_wait: expected a duration such as `2s`, found nothing",
    ),
    "endless wait": (
        "name: l, concurrent: 1, max_wait: 2h",
        "21:40: limits[0].max_wait: must be at most `1h`, found `2h`",
    ),
    "long user": (
        f"name: l, concurrent: 1, scope: {{user: {'u' * 257}}}",
        "21:44: limits[0].scope.user: expected at most 256 characters, found 257",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_makes_no_sense_is_told_with_its_place(case: str) -> None:
    limit, message = CASES[case]
    assert problems_of(file_with(limit)) == [f"g:{message}"]


def test_two_limits_of_one_name_are_told() -> None:
    assert problems_of(file_with("name: l, concurrent: 1", "name: l, concurrent: 2")) == [
        "g:22:12: limits[1].name: a second limit `l`; the first is at 21:12"
    ]


def test_more_limits_than_a_request_should_be_held_against_are_refused() -> None:
    many = [f"name: l{number}, concurrent: 1" for number in range(1001)]
    assert problems_of(file_with(*many)) == ["g:21:3: limits: expected a list, at most 1000, found 1001"]
    assert problems_of(file_with(*many[:-1])) == []


def test_a_key_that_only_the_store_can_have_is_a_warning() -> None:
    limit = f"name: l, scope: {{key: alice}}, {ONE_A_DAY}"
    assert warnings_of(file_with(limit, edits=(ADMIN,))) == [
        "g:21:28: limits[0].scope.key: no key `alice` in this file; only one of the admin API can have it"
    ]


def test_a_team_of_the_store_stands_in_teams() -> None:
    limit = f"name: l, scope: {{team: web}}, {ONE_A_DAY}"
    assert problems_of(file_with(limit, more="teams: [web]\n")) == []
    assert problems_of(file_with(limit, more="teams: [wbe]\n")) == [
        "g:21:29: limits[0].scope.team: no team `web`; did you mean `wbe`?"
    ]


def test_strict_is_content_with_a_length_or_a_window_of_every_tier_within_reach() -> None:
    limit = "name: l, spend: {usd: 5}, reserve: strict"
    price = "price: {input: 0.1 USD, output: 1}"
    for length in ("max_output_tokens: 10", "context_tokens: 10"):
        assert problems_of(file_with(limit, edits=((price, f"{price}\n    {length}"),))) == []
    assert (
        problems_of(
            file_with(
                "name: l, scope: {key: k}, spend: {usd: 5}, reserve: strict", edits=(("[auto, m-two]", "[m-one]"),)
            )
        )
        == []
    )


def test_strict_names_every_tier_that_needs_a_length() -> None:
    vllm = '{kind: vllm, url: "http://h:2", model: m-one}'
    text = file_with(
        "name: l, spend: {usd: 5}, reserve: strict",
        edits=(("{kind: scripted, model: m-one, tokens: [a]}", vllm),),
    )
    (problem,) = problems_of(text)
    assert "that of tiers `small`, `large` is not known" in problem


PARTITION_CASES = {
    "everybody together": (
        "team",
        [f"name: l, {ONE_A_DAY}"],
        ["21:5: limits[0].scope: crosses partitions: with `partition: team` its scope needs `team` or `key`"],
    ),
    "a user of any team": (
        "team",
        [f"name: l, scope: {{user: each}}, {ONE_A_DAY}"],
        ["21:22: limits[0].scope: crosses partitions: with `partition: team` its scope needs `team` or `key`"],
    ),
    "a team across keys": (
        "key",
        [f"name: l, scope: {{team: each}}, {ONE_A_DAY}"],
        ["21:22: limits[0].scope: crosses partitions: with `partition: key` its scope needs `key`"],
    ),
    "within": ("team", [f"name: l, scope: {{team: each}}, {ONE_A_DAY}", "name: m, concurrent: 1, scope: {key: k}"], []),
    "within a key": ("key", [f"name: l, scope: {{key: each, user: each}}, {ONE_A_DAY}"], []),
    "a tier alone": (
        "team",
        [f"name: l, scope: {{tier: small}}, {ONE_A_DAY}", f"name: m, scope: {{tier: large, key: each}}, {ONE_A_DAY}"],
        [],
    ),
    "a tier as a whole and by team": (
        "team",
        [f"name: l, scope: {{tier: small}}, {ONE_A_DAY}", f"name: m, scope: {{tier: small, team: each}}, {ONE_A_DAY}"],
        [
            (
                "22:29: limits[1].scope.tier: counts tier `small` by `team` or `key`, and limit `l` counts it as a whole: "
                "those are two partitions"
            )
        ],
    ),
    "each tier": (
        "key",
        [f"name: l, scope: {{tier: each, key: each}}, {ONE_A_DAY}", f"name: m, scope: {{tier: large}}, {ONE_A_DAY}"],
        [
            (
                "21:29: limits[0].scope.tier: counts tier `large` by `key`, and limit `m` counts it as a whole: those are "
                "two partitions"
            )
        ],
    ),
    "one deployment": (
        "deployment",
        [f"name: l, scope: {{tier: each}}, {ONE_A_DAY}", f"name: m, scope: {{tier: each, key: k}}, {ONE_A_DAY}"],
        [],
    ),
}


@pytest.mark.parametrize("case", PARTITION_CASES)
def test_a_limit_that_crosses_partitions_is_told(case: str) -> None:
    partition, limits, messages = PARTITION_CASES[case]
    text = file_with(*limits, more=REDIS.replace("PARTITION", partition))
    assert problems_of(text) == [f"g:{message}" for message in messages]


def test_the_queue_of_a_tier_counts_it_as_a_whole() -> None:
    text = file_with(
        f"name: l, scope: {{tier: small, key: each}}, {ONE_A_DAY}",
        edits=(("name: small\n", "name: small\n    queue: {concurrent: 2}\n"),),
        more=REDIS.replace("PARTITION", "key"),
    )
    assert problems_of(text) == [
        (
            "g:22:29: limits[0].scope.tier: counts tier `small` by `key`, and its `queue` counts it as a whole: those are two "
            "partitions"
        )
    ]


BROKEN_CASES = {
    "measure misspelt": ("name: l, request: {limit: 1, per: day}", "unknown key `request`; did you mean `requests`?"),
    "measure broken": ("name: l, requests: 5", "limits[0].requests: expected a mapping, found `5`"),
    "per misspelt": (
        "name: l, spend: {usd: 5, pre: day, timezone: UTC}",
        "limits[0].spend: unknown key `pre`; did you mean `per`?",
    ),
    "name of a list": (f"name: [l], {ONE_A_DAY}", "limits[0].name: expected a name"),
    "scope of a list": (
        f"name: l, scope: {{key: [k]}}, {ONE_A_DAY}",
        "limits[0].scope.key: expected text, found a list",
    ),
    "word for a limit": (
        "name: l, requests: {limit: few, per: day}",
        "limits[0].requests.limit: expected a whole number",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CASES)
def test_of_a_fault_of_form_nothing_follows(case: str) -> None:
    limit, message = BROKEN_CASES[case]
    (problem,) = problems_of(file_with(limit, more=REDIS.replace("PARTITION", "deployment")))
    assert message in problem


def test_where_names_could_not_be_read_none_is_unknown() -> None:
    limit = f"name: l, scope: {{key: a, team: b, route: c, model: d, tier: e}}, {ONE_A_DAY}"
    broken = (("name: k\n", "name: [k]\n    team: [b]\n"), ("name: large", "name: [large]"), ("  auto:", "  no:"))
    assert not [problem for problem in problems_of(file_with(limit, edits=broken)) if "limits" in problem]


def test_a_machine_without_time_zones_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> set[str]:
        return set()

    monkeypatch.setattr("gateway.config.limits_meaning.available_timezones", none)
    text = file_with("name: l, spend: {usd: 5, per: day, timezone: Nowhere}")
    assert problems_of(text) == [
        "g:21:51: limits[0].spend.timezone: this machine knows no time zones but `UTC`; install its package `tzdata`"
    ]
    assert problems_of(file_with("name: l, spend: {usd: 5, per: day, timezone: UTC}")) == []
