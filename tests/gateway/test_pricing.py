"""Is it the right price at the right time, under a version that means the same everywhere?"""

from __future__ import annotations

import gc
from datetime import UTC, datetime
from fractions import Fraction
from math import inf
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.load import parse
from gateway.ledger.rows import PriceRow
from gateway.price_list import LiteLlmPrices, PriceUnknownError
from gateway.pricing import PriceList, Pricing, Schedule, Terms, dearest, pricing_of
from policies.cost import Cost, Price, cost_of, sum_of
from tests.gateway.litellm_package import install, uninstall

GOOD = (Path(__file__).parent / "config/good.yaml").read_text()
TIER = "price: {input: 0.02, output: $0.04}"
LARGE = "price: {input: 0.1 USD, output: 1}"
GPU = "price: {gpu: {usd_per_hour: 1.80, count: 2}}"
FEBRUARY = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
MARCH = datetime(2027, 3, 1, tzinfo=UTC).timestamp()
HOUR_S = 3600


class Used(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


def pricing(*edits: tuple[str, str]) -> Pricing:
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return pricing_of(parse(text).config, LiteLlmPrices())


def numbers(price: Price | PriceRow) -> tuple[int, int, int]:
    return price.input_nusd, price.cached_input_nusd, price.output_nusd


def later(*changes: str) -> str:
    return "".join(f"\n    {line}" for line in ("later_prices:", *(f"  - {change}" for change in changes)))


IN_FEBRUARY = later("{at: 2027-02-01T00:00:00Z, price: {input: 0.03, output: 0.05, cached_input: 0.01}}")


def test_a_tiers_price_is_that_of_its_backends() -> None:
    prices = pricing().at(0)
    assert numbers(prices.backends["one"]) == (20_000_000, 20_000_000, 40_000_000)
    assert prices.tiers == {"small": prices.backends["one"], "large": prices.backends["two"]}
    assert not prices.backends["one"].gpu


def test_a_backends_own_price_goes_before_its_tiers_and_the_tier_has_the_dearest() -> None:
    prices = pricing(
        ("model: m-two}", "model: m-two, price: {input: 0.05, cached_input: 0.01, output: 2}}"),
        ("tiers:", '  three: {kind: vllm, url: "http://h:2", model: m-two}\ntiers:'),
        ("[two]", "[two, three]"),
    ).at(0)
    assert numbers(prices.backends["two"]) == (50_000_000, 10_000_000, 2_000_000_000)
    assert numbers(prices.backends["three"]) == (100_000_000, 100_000_000, 1_000_000_000)
    assert numbers(prices.tiers["large"]) == (100_000_000, 100_000_000, 2_000_000_000)


def test_a_change_applies_from_its_moment_on_and_those_that_began_before_keep_theirs() -> None:
    priced = pricing((TIER, TIER + IN_FEBRUARY))
    before = priced.at(FEBRUARY - 0.001)
    after = priced.at(FEBRUARY)
    assert numbers(before.backends["one"]) == (20_000_000, 20_000_000, 40_000_000)
    assert numbers(after.backends["one"]) == (30_000_000, 10_000_000, 50_000_000)
    assert before.backends["one"].version != after.backends["one"].version
    assert before.backends["two"] == after.backends["two"]


def test_between_two_changes_it_is_the_same_object() -> None:
    priced = pricing((TIER, TIER + IN_FEBRUARY))
    assert priced.at(0) is priced.at(FEBRUARY - 1)
    assert priced.at(FEBRUARY) is priced.at(MARCH)


def test_a_clock_that_goes_back_brings_the_older_price_back() -> None:
    priced = pricing((TIER, TIER + IN_FEBRUARY))
    before = priced.at(FEBRUARY - 1)
    assert priced.at(FEBRUARY) != before
    again = priced.at(FEBRUARY - 1)
    assert again == before
    assert again.rows == before.rows


def test_a_backend_with_later_prices_alone_has_its_tiers_until_then() -> None:
    own = "model: m-one, later_prices: [{at: 2027-03-01T00:00:00Z, price: {input: 1, output: 2}}], tokens"
    priced = pricing((TIER, TIER + IN_FEBRUARY), ("model: m-one, tokens", own))
    inputs = [numbers(priced.at(at).backends["one"])[0] for at in (0, FEBRUARY, MARCH)]
    assert inputs == [20_000_000, 30_000_000, 1_000_000_000]


def test_a_backend_with_a_price_of_its_own_has_nothing_of_its_tiers_later_ones() -> None:
    priced = pricing(
        (TIER, TIER + IN_FEBRUARY), ("model: m-one, tokens", "model: m-one, price: {input: 1, output: 2}, tokens")
    )
    assert numbers(priced.at(FEBRUARY).backends["one"]) == numbers(priced.at(0).backends["one"])


def test_a_version_is_of_the_content_and_the_place() -> None:
    version = pricing().at(0).backends["one"].version
    assert len(version) == 16
    assert pricing().at(FEBRUARY).backends["one"].version == version
    assert pricing(("0.02", "$0.020")).at(0).backends["one"].version == version
    for edits in (
        [("0.02", "0.03")],
        [("$0.04", "$0.05")],
        [("0.02,", "0.02, cached_input: 0.01,")],
        [("name: small", "name: s"), ("tier: small", "tier: s")],
    ):
        assert pricing(*edits).at(0).backends["one"].version != version
    assert pricing(("one:", "uno:"), ("[one]", "[uno]")).at(0).backends["uno"].version != version
    # A price that comes back later is the same price.
    back = later("{at: 2027-02-01T00:00:00Z, price: {input: 9, output: 9}}", f"{{at: 2027-03-01T00:00:00Z, {TIER}}}")
    assert pricing((TIER, TIER + back)).at(MARCH).backends["one"].version == version


def test_a_version_says_in_the_ledger_what_was_billed_by() -> None:
    priced = pricing((LARGE, GPU))
    prices = priced.at(12.345)
    row = priced.row(prices.backends["one"].version)
    assert row is prices.rows[prices.backends["one"].version]
    assert row == PriceRow(
        version=prices.backends["one"].version,
        at_ms=12_345,
        tier="small",
        backend="one",
        kind="tokens",
        input_nusd=20_000_000,
        cached_input_nusd=20_000_000,
        output_nusd=40_000_000,
        hour_nusd=None,
    )
    row = priced.row(prices.backends["two"].version)
    assert row is not None
    assert (row.kind, row.hour_nusd, numbers(row)) == ("gpu", 3_600_000_000, numbers(prices.backends["two"]))
    assert priced.row("0" * 16) is None


def test_a_row_is_there_as_long_as_somebody_holds_its_list() -> None:
    priced = pricing((LARGE, GPU))
    held = priced.at(0)
    version = held.backends["two"].version
    for nusd in range(100):
        priced.set_provisional("two", input_nusd=nusd, cached_input_nusd=0, output_nusd=nusd, now_s=0)
        priced.at(0)
    gc.collect()
    row = priced.row(version)
    assert row is not None
    assert row is held.rows[version]
    del held, row
    gc.collect()
    assert priced.row(version) is None
    assert len(priced._rows) == 2


def test_a_price_of_litellm_is_its_own_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    prices = pricing((LARGE, "price: {litellm: gpt-4o-mini}")).at(0)
    price = prices.backends["two"]
    assert numbers(price) == (150_000_000, 75_000_000, 600_000_000)
    assert prices.rows[price.version].kind == "litellm"
    written = pricing((LARGE, "price: {input: 0.15, cached_input: 0.075, output: 0.6}")).at(0).backends["two"]
    assert (numbers(written), written.version != price.version) == (numbers(price), True)


def test_where_nothing_is_priced_by_litellm_its_list_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(GOOD).config
    listed = parse(GOOD.replace(LARGE, "price: {litellm: gpt-4o}")).config
    uninstall(monkeypatch)
    pricing_of(config, LiteLlmPrices())
    with pytest.raises(PriceUnknownError):
        pricing_of(listed, LiteLlmPrices())


def test_a_gpu_of_which_nothing_was_measured_is_taken_to_be_busy() -> None:
    price = pricing((LARGE, GPU)).at(0).backends["two"]
    # Two GPUs at $1.80: $3.60 an hour, over 3.6 million tokens written or 36 million read.
    assert numbers(price) == (100_000_000, 0, 1_000_000_000)
    assert price.gpu
    assert cost_of(price, Used(prompt_tokens=10, completion_tokens=3)) == Cost(gpu_nusd=1_000 + 3_000)


def test_what_was_measured_is_a_new_price_from_then_on() -> None:
    priced = pricing((LARGE, GPU))
    before = priced.at(0)
    priced.set_provisional("two", input_nusd=5, cached_input_nusd=1, output_nusd=70, now_s=10)
    after = priced.at(10)
    assert numbers(before.backends["two"]) == (100_000_000, 0, 1_000_000_000)
    assert numbers(after.backends["two"]) == numbers(after.tiers["large"]) == (5, 1, 70)
    assert after.backends["two"].gpu
    assert after.backends["two"].version != before.backends["two"].version
    assert after.rows[after.backends["two"].version].hour_nusd == 3_600_000_000
    assert after.backends["one"] == before.backends["one"]
    priced.set_provisional("two", input_nusd=5, cached_input_nusd=1, output_nusd=70, now_s=20)
    assert priced.at(20) is after


def test_a_measured_price_follows_that_of_the_hour() -> None:
    half = later(
        "{at: 2027-02-01T00:00:00Z, price: {gpu: {usd_per_hour: 1.80}}}",
        "{at: 2027-03-01T00:00:00Z, price: {input: 1, output: 1}}",
    )
    priced = pricing((LARGE, GPU + half))
    priced.set_provisional("two", input_nusd=5, cached_input_nusd=7, output_nusd=70, now_s=10)
    assert numbers(priced.at(FEBRUARY).backends["two"]) == (2, 4, 35)  # 2.5 and 3.5: half to even
    priced.set_provisional("two", input_nusd=7, cached_input_nusd=0, output_nusd=71, now_s=10)
    assert numbers(priced.at(FEBRUARY).backends["two"]) == (4, 0, 36)
    priced.set_provisional("two", input_nusd=8, cached_input_nusd=0, output_nusd=80, now_s=FEBRUARY)
    assert numbers(priced.at(FEBRUARY).backends["two"]) == (8, 0, 80)
    assert numbers(priced.at(FEBRUARY - 1).backends["two"]) == (16, 0, 160)
    assert numbers(priced.at(MARCH).backends["two"]) == (10**9, 10**9, 10**9)


def test_what_is_no_gpu_has_no_provisional_price() -> None:
    priced = pricing()
    before = priced.at(0)
    priced.set_provisional("one", input_nusd=5, cached_input_nusd=0, output_nusd=70, now_s=0)
    priced.set_provisional("nobody", input_nusd=5, cached_input_nusd=0, output_nusd=70, now_s=0)
    assert priced.at(0) is before


def test_a_negative_provisional_price_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        pricing((LARGE, GPU)).set_provisional("two", input_nusd=0, cached_input_nusd=-1, output_nusd=0, now_s=0)


def test_the_hours_of_a_moment_are_those_of_the_gpus_then() -> None:
    change = later(
        "{at: 2027-02-01T00:00:00Z, price: {gpu: {usd_per_hour: 2.5}}}",
        "{at: 2027-03-01T00:00:00Z, price: {input: 1, output: 1}}",
    )
    priced = pricing((LARGE, GPU + change))
    (hour,) = priced.hours(0).values()
    assert (hour.tier, hour.backend, hour.hour_nusd, hour.row.hour_nusd) == (
        "large",
        "two",
        3_600_000_000,
        3_600_000_000,
    )
    assert priced.hours(FEBRUARY)["two"].hour_nusd == 2_500_000_000
    assert priced.hours(MARCH) == {}
    assert hour.row.version == priced.at(0).backends["two"].version
    priced.set_provisional("two", input_nusd=5, cached_input_nusd=0, output_nusd=70, now_s=0)
    assert priced.hours(0)["two"].row == hour.row


def test_an_hour_in_which_the_price_changes_costs_each_for_its_time() -> None:
    change = later(
        "{at: 2027-02-01T00:20:00Z, price: {gpu: {usd_per_hour: 1}}}",
        "{at: 2027-02-01T03:59:59Z, price: {input: 1, output: 1}}",
    )
    priced = pricing((LARGE, GPU + change))
    hour = int(FEBRUARY) // HOUR_S
    assert priced.hours_of(hour - 1)["two"].hour_nusd == 3_600_000_000
    assert priced.hours_of(hour)["two"].hour_nusd == 1_200_000_000 + 666_666_667
    assert priced.hours_of(hour)["two"].row.hour_nusd == 1_000_000_000
    assert priced.hours_of(hour + 1)["two"].hour_nusd == 1_000_000_000
    assert priced.hours_of(hour + 3)["two"].hour_nusd == 999_722_222  # a second of it was no GPU's any more
    assert priced.hours_of(hour + 4) == {}
    assert "one" not in priced.hours_of(hour)


def test_a_server_with_a_price_of_its_own_costs_that_in_every_hour() -> None:
    change = later("{at: 2027-02-01T00:20:00Z, price: {gpu: {usd_per_hour: 1}}}")
    own = ("model: m-two}", "model: m-two, price: {gpu: {usd_per_hour: 5}}}")
    assert pricing((LARGE, GPU + change), own).hours_of(int(FEBRUARY) // HOUR_S)["two"].hour_nusd == 5_000_000_000


def test_the_same_tokens_on_a_server_of_another_price_are_another_version() -> None:
    cheap, dear = (Pricing({"t": {"b": ((-inf, gpu(hour_nusd)),)}}).at(0).backends["b"] for hour_nusd in (10, 20))
    assert numbers(cheap) == numbers(dear)
    assert cheap.version != dear.version


def gpu(hour_nusd: int) -> Terms:
    return Terms(kind="gpu", input_nusd=1, cached_input_nusd=0, output_nusd=1, hour_nusd=hour_nusd)


money = st.integers(1, 10**15)


@given(money, st.dictionaries(st.integers(-10, 2 * HOUR_S), money, max_size=6))
def test_an_hour_is_the_exact_mean_of_its_seconds_rounded_once(first: int, changes: dict[int, int]) -> None:
    schedule: Schedule = ((-inf, gpu(first)), *((float(at), gpu(nusd)) for at, nusd in sorted(changes.items())))
    priced = Pricing({"t": {"b": schedule}})
    seconds = []
    for second in range(HOUR_S, 2 * HOUR_S):
        begun = [at for at in changes if at <= second]
        seconds.append(changes[max(begun)] if begun else first)
    assert priced.hours_of(1)["b"].hour_nusd == round(Fraction(sum(seconds), HOUR_S))


per_million = st.integers(0, 10**15)
terms = st.builds(
    Terms,
    kind=st.sampled_from(("tokens", "gpu", "litellm")),
    input_nusd=per_million,
    cached_input_nusd=per_million,
    output_nusd=per_million,
    hour_nusd=st.one_of(st.none(), money),
)
counts = st.integers(0, 10**7)
used = st.builds(Used, prompt_tokens=counts, cached_prompt_tokens=counts, completion_tokens=counts)


@given(st.lists(st.tuples(terms, used), min_size=1, max_size=8))
def test_a_bill_can_be_made_again_from_what_the_ledger_keeps(calls: list[tuple[Terms, Used]]) -> None:
    priced = Pricing({"t": {f"b{i}": ((-inf, one),) for i, (one, _) in enumerate(calls)}})
    prices = priced.at(0)
    billed = [cost_of(prices.backends[f"b{i}"], usage) for i, (_, usage) in enumerate(calls)]
    again = []
    for i, (_, usage) in enumerate(calls):
        stored = msgspec.json.decode(msgspec.json.encode(prices.rows[prices.backends[f"b{i}"].version]), type=PriceRow)
        price = Price(
            input_nusd=stored.input_nusd,
            cached_input_nusd=stored.cached_input_nusd,
            output_nusd=stored.output_nusd,
            gpu=stored.kind == "gpu",
        )
        again.append(cost_of(price, usage))
    assert again == billed
    assert sum_of(again).total_nusd == sum(one.total_nusd for one in billed)


@given(
    st.lists(
        st.builds(
            Price, input_nusd=per_million, cached_input_nusd=per_million, output_nusd=per_million, gpu=st.booleans()
        ),
        min_size=1,
    )
)
def test_the_dearest_of_several_is_below_none_of_them(prices: list[Price]) -> None:
    most = dearest(prices)
    assert all(have >= part for one in prices for have, part in zip(numbers(most), numbers(one), strict=True))
    assert all(
        have in parts for have, parts in zip(numbers(most), zip(*map(numbers, prices), strict=True), strict=True)
    )


def test_a_plain_price_applies_for_ever() -> None:
    price = Price(input_nusd=1, cached_input_nusd=2, output_nusd=3)
    priced = Pricing({"t": {"b": price}})
    assert numbers(priced.at(-1e9).backends["b"]) == numbers(priced.at(1e12).backends["b"]) == (1, 2, 3)
    assert PriceList.of({"t": {"b": price}}).tiers["t"] is price
