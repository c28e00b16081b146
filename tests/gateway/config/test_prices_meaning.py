"""Is a price that nothing could be billed by told, with its place?"""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.load import ConfigError, load, parse
from gateway.config.prices_meaning import moment_s, stated
from gateway.config.readiness import check
from tests.gateway.litellm_package import install, uninstall

GOOD = (Path(__file__).parent / "good.yaml").read_text()
SMALL = "price: {input: 0.02, output: $0.04}"
LARGE = "price: {input: 0.1 USD, output: 1}"
OWN = "tokens: [a]"
WAYS = "a price is `input` and `output`, or `gpu`, or `litellm`"
CHEAPER = "but tiers stand cheapest first"


def edited(*edits: tuple[str, str]) -> str:
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def problems_of(*edits: tuple[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(edited(*edits), "g.yaml")
    return [str(problem).removeprefix("g.yaml:") for problem in caught.value.problems]


def warnings_of(*edits: tuple[str, str]) -> list[str]:
    return [str(warning).removeprefix("g.yaml:") for warning in parse(edited(*edits), "g.yaml").warnings]


def later(*changes: tuple[str, str]) -> str:
    lines = [f"\n      - {{at: {at}, price: {{{price}}}}}" for at, price in changes]
    return f"\n    later_prices:{''.join(lines)}"


FEBRUARY, MARCH = "2027-02-01T00:00:00Z", "2027-03-01T00:00:00Z"
GPU = "gpu: {usd_per_hour: 2.50, count: 4}"

GOOD_CASES = {
    "cached input": (SMALL, "price: {input: 0.02, cached_input: 0.01, output: 0.04}"),
    "cached input at the price of input": (SMALL, "price: {input: 0.02, cached_input: 0.02, output: 0.04}"),
    "as the tier below": (LARGE, "price: {input: 0.02, output: 0.04}"),
    "for nothing": (SMALL, "price: {input: 0, output: 0}"),
    "a gpu": (LARGE, f"price: {{{GPU}}}"),
    "a gpu that plays a script": (SMALL, f"price: {{{GPU}}}"),
    "a thousand gpus": (LARGE, "price: {gpu: {usd_per_hour: 9000, count: 1000}}"),
    "one gpu": (LARGE, "price: {gpu: {usd_per_hour: $2.50}}"),
    "litellm": (LARGE, "price: {litellm: gpt-4o}"),
    "a backend's own": (OWN, f"tokens: [a], price: {{{GPU}}}"),
    "later": (LARGE, LARGE + later((FEBRUARY, "input: 2, output: 3"), (MARCH, GPU))),
    "later, in other zones": (LARGE, LARGE + later((FEBRUARY, GPU), ("2027-02-01T00:30:00+00:00", "litellm: m"))),
    "a backend's own, later": (OWN, f"tokens: [a], later_prices: [{{at: {FEBRUARY}, price: {{litellm: m}}}}]"),
}


@pytest.mark.parametrize("case", GOOD_CASES)
def test_what_can_be_billed_by_is_taken(case: str) -> None:
    assert warnings_of(GOOD_CASES[case]) == []


def test_spending_on_a_gpu_can_be_limited() -> None:
    limits = ("keys:", "limits: [{name: l, scope: {key: each}, spend: {usd: 5, per: day}}]\nkeys:")
    assert warnings_of((LARGE, f"price: {{{GPU}}}"), limits) == []


PROBLEM_CASES = {
    "nothing": ((SMALL, "price: {}"), [f"8:12: tiers[0].price: no price in it; {WAYS}"]),
    "input alone": ((SMALL, "price: {input: 1}"), ["8:12: tiers[0].price: missing key `output`"]),
    "output alone": ((SMALL, "price: {output: 1}"), ["8:12: tiers[0].price: missing key `input`"]),
    "cached input alone": (
        (SMALL, "price: {cached_input: 1}"),
        ["8:12: tiers[0].price: missing key `input`", "8:12: tiers[0].price: missing key `output`"],
    ),
    "tokens and hours": (
        (SMALL, f"price: {{input: 1, {GPU}, output: 2}}"),
        [
            f"8:20: tiers[0].price.input: not beside `gpu`: {WAYS}",
            f"8:68: tiers[0].price.output: not beside `gpu`: {WAYS}",
        ],
    ),
    "hours and cached tokens": (
        (SMALL, f"price: {{{GPU}, cached_input: 2}}"),
        [f"8:64: tiers[0].price.cached_input: not beside `gpu`: {WAYS}"],
    ),
    "hours and a list": (
        (SMALL, f"price: {{litellm: gpt-4o, {GPU}}}"),
        [f"8:22: tiers[0].price.litellm: not beside `gpu`: {WAYS}"],
    ),
    "a list and tokens": (
        (SMALL, "price: {litellm: gpt-4o, output: 1}"),
        [f"8:38: tiers[0].price.output: not beside `litellm`: {WAYS}"],
    ),
    "misspelt": (
        (SMALL, "price: {input: 1, ouput: 1}"),
        ["8:23: tiers[0].price: unknown key `ouput`; did you mean `output`?"],
    ),
    "no price": ((SMALL, "price: 1"), ["8:12: tiers[0].price: expected a mapping, found `1`"]),
    "no number": (
        (SMALL, "price: {input: much, output: 1}"),
        [
            (
                "8:20: tiers[0].price.input: expected dollars per million tokens, such as `0.05`, `$0.05` or "
                "`0.05 USD`, found `much`"
            )
        ],
    ),
    "a gpu for nothing": (
        (SMALL, "price: {gpu: {usd_per_hour: 0}}"),
        ["8:33: tiers[0].price.gpu.usd_per_hour: must be more than 0, found `0`"],
    ),
    "a gpu that is none": (
        (SMALL, "price: {gpu: {usd_per_hour: 1, count: 0}}"),
        ["8:43: tiers[0].price.gpu.count: must be at least 1, found `0`"],
    ),
    "gpus that nobody can pay": (
        (SMALL, "price: {gpu: {usd_per_hour: 9000, count: 1001}}"),
        ["8:18: tiers[0].price.gpu: more than $9000000.00 an hour together"],
    ),
    "a gpu without a price": (
        (SMALL, "price: {gpu: {count: 1}}"),
        ["8:18: tiers[0].price.gpu: missing key `usd_per_hour`"],
    ),
    "a model without a name": (
        (SMALL, 'price: {litellm: ""}'),
        ["8:22: tiers[0].price.litellm: expected text, found empty text"],
    ),
    "a backend's own": (
        (OWN, f"tokens: [a], price: {{{GPU}, input: 1}}"),
        [f"3:104: backends.one.price.input: not beside `gpu`: {WAYS}"],
    ),
    "later": (
        (SMALL, SMALL + later((FEBRUARY, "input: 1"))),
        ["10:43: tiers[0].later_prices[0].price: missing key `output`"],
    ),
    "later, of a backend": (
        (OWN, f"tokens: [a], later_prices: [{{at: {FEBRUARY}, price: {{}}}}]"),
        [f"3:101: backends.one.later_prices[0].price: no price in it; {WAYS}"],
    ),
    "not in order": (
        (SMALL, SMALL + later((MARCH, GPU), (FEBRUARY, GPU))),
        ["11:14: tiers[0].later_prices[1].at: not after tiers[0].later_prices[0].at; prices stand in order of time"],
    ),
    "at once, in another zone": (
        (SMALL, SMALL + later((FEBRUARY, GPU), ("2027-02-01T01:00:00+01:00", GPU))),
        ["11:14: tiers[0].later_prices[1].at: not after tiers[0].later_prices[0].at; prices stand in order of time"],
    ),
    "not in order, of a backend": (
        (
            OWN,
            f"tokens: [a], later_prices: [{{at: {MARCH}, price: {{{GPU}}}}}, {{at: {FEBRUARY}, price: {{{GPU}}}}}]",
        ),
        [
            (
                "3:146: backends.one.later_prices[1].at: not after backends.one.later_prices[0].at; prices stand in "
                "order of time"
            )
        ],
    ),
    "a day that is none": (
        (SMALL, SMALL + later(("2027-02-30T00:00:00Z", GPU), (FEBRUARY, GPU))),
        ["10:14: tiers[0].later_prices[0].at: `2027-02-30T00:00:00Z` is no day or time of the calendar"],
    ),
    "a day without a zone": (
        (SMALL, SMALL + later(("2027-02-01", GPU))),
        ["10:14: tiers[0].later_prices[0].at: expected a time with its zone, such as `2027-01-31T00:00:00Z`"],
    ),
    "before all years": (
        (SMALL, SMALL + later(("0000-12-31T00:00:00Z", GPU))),
        ["10:14: tiers[0].later_prices[0].at: `0000-12-31T00:00:00Z` is no day or time of the calendar"],
    ),
    "no moment": (
        (SMALL, f"{SMALL}\n    later_prices: [{{price: {{{GPU}}}}}]"),
        ["9:20: tiers[0].later_prices[0]: missing key `at`"],
    ),
}


@pytest.mark.parametrize("case", PROBLEM_CASES)
def test_what_nothing_could_be_billed_by_is_told(case: str) -> None:
    edit, messages = PROBLEM_CASES[case]
    assert problems_of(edit) == messages


def test_every_moment_that_is_wrong_is_told() -> None:
    wrong = later((MARCH, GPU), ("2027-13-01T00:00:00Z", GPU), (FEBRUARY, GPU), ("2027-02-02T00:00:00Z", GPU))
    assert [problem.split(": ")[0] for problem in problems_of((SMALL, SMALL + wrong))] == ["11:14", "12:14", "13:14"]


def test_a_shared_price_is_told_at_each_use() -> None:
    assert problems_of((SMALL, "price: &p {input: 1}"), (LARGE, "price: *p")) == [
        "8:12: tiers[0].price: missing key `output`",
        "8:12: tiers[1].price: missing key `output`",
    ]


WARNING_CASES = {
    "dear cache later": (
        [(LARGE, LARGE + later((FEBRUARY, "input: 2, cached_input: 3, output: 3")))],
        ("13:68: tiers[1].later_prices[0].price.cached_input: dearer than `input`: a cache hit should not cost more"),
    ),
    "dear cache of a backend": (
        [(OWN, "tokens: [a], price: {input: 1, cached_input: 2, output: 1}")],
        "3:84: backends.one.price.cached_input: dearer than `input`: a cache hit should not cost more",
    ),
    "cheaper than below, later": (
        [(LARGE, LARGE + later((FEBRUARY, "input: 0.01, output: 3")))],
        f"13:51: tiers[1].later_prices[0].price.input: cheaper than tiers[0].price.input, {CHEAPER}",
    ),
    "dearer below, later": (
        [(SMALL, SMALL + later((FEBRUARY, "input: 0.05, output: 3")))],
        f"13:37: tiers[1].price.output: cheaper than tiers[0].later_prices[0].price.output, {CHEAPER}",
    ),
    "cheaper only while both apply": (
        [
            (SMALL, SMALL + later((FEBRUARY, "input: 0.05, output: 3"), (MARCH, GPU))),
            (LARGE, LARGE + later((FEBRUARY, "input: 5, output: 5"), (MARCH, "input: 0, output: 0"))),
        ],
        None,
    ),
    "a gpu, of which nobody knows": ([(SMALL, f"price: {{{GPU}}}")], None),
    "a list, of which nobody knows": ([(SMALL, "price: {litellm: m}")], None),
}


@pytest.mark.parametrize("case", WARNING_CASES)
def test_what_is_odd_but_works_is_a_warning(case: str) -> None:
    edits, message = WARNING_CASES[case]
    assert warnings_of(*edits) == ([] if message is None else [message])


def test_every_price_of_a_file_is_found_with_its_place() -> None:
    text = edited(
        (OWN, f"tokens: [a], price: {{{GPU}}}, later_prices: [{{at: {MARCH}, price: {{litellm: m}}}}]"),
        (LARGE, LARGE + later((FEBRUARY, "litellm: n"))),
    )
    loaded = parse(text)
    found = {one.place: (one.from_s, one.price.litellm) for one in stated(loaded.config)}
    assert all(place in loaded.marks for place in found)
    assert found == {
        ("tiers", 0, "price"): (float("-inf"), None),
        ("tiers", 1, "price"): (float("-inf"), None),
        ("tiers", 1, "later_prices", 0, "price"): (moment_s(FEBRUARY), "n"),
        ("backends", "one", "price"): (float("-inf"), None),
        ("backends", "one", "later_prices", 0, "price"): (moment_s(MARCH), "m"),
    }


def unready(folder: Path, text: str) -> list[str]:
    file = folder / "g.yaml"
    file.write_text(text)
    return [str(problem).removeprefix(f"{file}:") for problem in check(load(file), workers=1)]


def test_before_the_start_every_model_is_looked_up_in_litellms_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    text = edited(
        (SMALL, "price: {litellm: gpt-4o-mini}"),
        (OWN, "tokens: [a], price: {litellm: whisper-1}"),
        (LARGE, LARGE + later((FEBRUARY, "litellm: gpt4o"), (MARCH, "litellm: gpt-4o"))),
    )
    assert unready(tmp_path, text) == [
        (
            "3:69: backends.one.price.litellm: LiteLLM's price list has `whisper-1`, but no price of each of its tokens; "
            "write the prices out"
        ),
        (
            "13:53: tiers[1].later_prices[0].price.litellm: no model `gpt4o` in LiteLLM's price list; did you mean "
            "`gpt-4o`?"
        ),
    ]


def test_without_litellm_its_prices_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch)
    assert unready(tmp_path, edited((SMALL, "price: {litellm: gpt-4o}"))) == [
        (
            "8:22: tiers[0].price.litellm: LiteLLM's price list is not here; install `tierway[hosted]`, or write the "
            "prices out"
        )
    ]
    assert unready(tmp_path, GOOD) == []
