"""Is a price of LiteLLM's list taken exactly, and is it told where there is none?"""

from __future__ import annotations

import sys
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.price_list import ListedPrice, LiteLlmPrices, PriceUnknownError, _listed_of
from tests.gateway.litellm_package import VERSION, install, uninstall


def why_not(model: str) -> str:
    with pytest.raises(PriceUnknownError) as caught:
        LiteLlmPrices().price_of(model)
    return str(caught.value)


def entry(**costs: str) -> bytes:
    return ("{" + ", ".join(f'"{key}": {cost}' for key, cost in costs.items()) + "}").encode()


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("gpt-4o-mini", (150_000_000, 75_000_000, 600_000_000)),
        ("gpt-4o", (2_500_000_000, 1_250_000_000, 10_000_000_000)),
        # Written 9.499999999999999e-07: the nearest integer is what was meant.
        ("novita/moonshotai/kimi-k2.7-code", (950_000_000, 190_000_000, 4_000_000_000)),
        # No price of the cache: as the input.
        ("together_ai/Qwen/Qwen2.5-72B-Instruct-Turbo", (1_200_000_000, 1_200_000_000, 1_200_000_000)),
        ("text-embedding-3-small", (20_000_000, 20_000_000, 0)),
    ],
)
def test_a_price_of_the_list_is_exact(
    model: str, price: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    listed = LiteLlmPrices().price_of(model)
    assert listed == ListedPrice(input_nusd=price[0], cached_input_nusd=price[1], output_nusd=price[2])


def test_the_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    prices = LiteLlmPrices()
    prices.price_of("gpt-4o")
    assert prices.version == VERSION
    assert "litellm" not in sys.modules


def test_the_list_is_read_once_and_not_before_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = install(tmp_path, monkeypatch)
    text = file.read_bytes()
    file.unlink()
    prices = LiteLlmPrices()
    file.write_bytes(text)
    prices.price_of("gpt-4o")
    file.unlink()
    assert prices.price_of("gpt-4o-mini").input_nusd == 150_000_000


@pytest.mark.parametrize(
    ("model", "unread"),
    [
        (
            "gemini/gemini-2.5-pro",
            (
                "cache_read_input_token_cost_above_200k_tokens",
                "input_cost_per_token_above_200k_tokens",
                "output_cost_per_token_above_200k_tokens",
            ),
        ),
        ("dashscope/qwen-turbo", ("output_cost_per_reasoning_token",)),
        ("deepseek/deepseek-chat", ()),
    ],
)
def test_prices_that_are_not_billed_by_are_named(
    model: str, unread: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    assert sorted(LiteLlmPrices().price_of(model).unread) == sorted(unread)


NO_PRICE_CASES = {
    "gpt4o": "no model `gpt4o` in LiteLLM's price list; did you mean `gpt-4o`?",
    "zzz": "no model `zzz` in LiteLLM's price list",
    "sample_spec": "no model `sample_spec` in LiteLLM's price list",
    "whisper-1": "LiteLLM's price list has `whisper-1`, but no price of each of its tokens; write the prices out",
    "dashscope/qwen-plus-latest": (
        "LiteLLM's price list has `dashscope/qwen-plus-latest`, but no price of each of its tokens; write the prices out"
    ),
    "gemini/lyria-3-clip-preview": (
        "LiteLLM's price list has `gemini/lyria-3-clip-preview` at nothing a token, but with `output_cost_per_image`, "
        "which cannot be billed here; write the prices out"
    ),
}


@pytest.mark.parametrize("model", NO_PRICE_CASES)
def test_a_model_that_cannot_be_billed_by_tokens_is_told(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    assert why_not(model) == NO_PRICE_CASES[model]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch)
    prices = LiteLlmPrices()
    with pytest.raises(PriceUnknownError, match=r"install `tierway\[hosted\]`, or write the prices out"):
        prices.price_of("gpt-4o")
    assert prices.version == ""


@pytest.mark.parametrize(
    ("content", "end"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not the JSON that it was"),
        (b"[]", "is not the JSON that it was"),
        (b'{"gpt-4o": {', "is not the JSON that it was"),
    ],
)
def test_a_list_that_cannot_be_read_is_told(
    content: bytes | None, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = install(tmp_path, monkeypatch, content)
    assert why_not("gpt-4o") == f"LiteLLM's price list `{file}` {end}"


@pytest.mark.parametrize("cost", ["-1e-6", '"NaN"', '"Infinity"', "1.1", "1e300"])
def test_a_price_that_cannot_be_is_none(cost: str) -> None:
    with pytest.raises(PriceUnknownError, match="at a price that cannot be"):
        _listed_of("m", entry(input_cost_per_token="1e-6", output_cost_per_token=cost))


@pytest.mark.parametrize("raw", [b"[]", b"7", b'{"input_cost_per_token": "dear"}', b'{"input_cost_per_token": [1]}'])
def test_an_entry_of_another_shape_is_told(raw: bytes) -> None:
    with pytest.raises(PriceUnknownError, match="the entry `m` of LiteLLM's price list cannot be read"):
        _listed_of("m", raw)


def test_of_a_fraction_the_even_neighbour_is_taken_at_a_half() -> None:
    half = _listed_of("m", entry(input_cost_per_token="2.5e-15", output_cost_per_token="3.5e-15"))
    assert (half.input_nusd, half.output_nusd) == (2, 4)
    # As a float this would be a half.
    near = _listed_of("m", entry(input_cost_per_token="0.123456789012345499999", output_cost_per_token="0"))
    assert near.input_nusd == 123_456_789_012_345


def test_what_costs_something_by_the_token_may_cost_more_by_something_else() -> None:
    listed = _listed_of("m", entry(input_cost_per_token="0", output_cost_per_token="1e-6", output_cost_per_image="1"))
    assert (listed.input_nusd, listed.output_nusd) == (0, 10**9)
    free = _listed_of("m", entry(input_cost_per_token="0", output_cost_per_token="0", input_cost_per_image="0.0"))
    assert (free.input_nusd, free.output_nusd) == (0, 0)


@given(st.decimals(0, 1, allow_nan=False, places=24), st.decimals(0, 1, allow_nan=False, places=24))
def test_any_price_is_the_nearest_integer_whatever_its_digits(paid: Decimal, earned: Decimal) -> None:
    listed = _listed_of("m", entry(input_cost_per_token=str(paid), output_cost_per_token=str(earned)))
    for nusd, cost in ((listed.input_nusd, paid), (listed.output_nusd, earned)):
        assert nusd == int(cost.scaleb(15).quantize(Decimal(1), ROUND_HALF_EVEN))
