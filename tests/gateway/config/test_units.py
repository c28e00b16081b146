"""Are quantities read exactly, written as they are read, and is everything else refused?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.units import (
    DEAREST_NUSD,
    LARGEST_NUSD,
    LARGEST_SIZE,
    LONGEST_DURATION_S,
    UnitError,
    parse_duration,
    parse_size,
    parse_usd,
    parse_usd_per_million,
    render_duration,
    render_size,
    render_usd,
)


@given(st.integers(0, LONGEST_DURATION_S * 1000))
def test_durations_come_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(render_duration(seconds)) == seconds


@given(st.integers(1, LARGEST_SIZE))
def test_sizes_come_back(size: int) -> None:
    assert parse_size(render_size(size)) == size


@given(st.integers(0, DEAREST_NUSD))
def test_prices_come_back_exactly(nano_usd: int) -> None:
    text = render_usd(nano_usd)
    assert parse_usd_per_million(text) == parse_usd_per_million(text[1:] + " USD") == nano_usd


@given(st.integers(0, LARGEST_NUSD))
def test_amounts_come_back_exactly(nano_usd: int) -> None:
    text = render_usd(nano_usd)
    assert parse_usd(text) == parse_usd(text[1:] + " USD") == parse_usd(text[1:]) == nano_usd


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("2s", 2.0),
        ("1.5s", 1.5),
        ("10m", 600.0),
        ("1h", 3600.0),
        ("30d", 2592000.0),
        ("0.1s", 0.1),
        ("0s", 0.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("64KiB", 65536), ("16MiB", 2**24), ("1GiB", 2**30), ("10kB", 10_000), ("1.5MB", 1_500_000), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "nano_usd"),
    [
        ("0.05", 50000000),
        ("$0.05", 50000000),
        ("0.05 USD", 50000000),
        ("0.1", 100000000),
        ("0", 0),
        ("0.000000001", 1),
        (".5", 500000000),
        ("3", 3000000000),
        ("3.", 3000000000),
    ],
)
def test_prices(text: str, nano_usd: int) -> None:
    assert parse_usd_per_million(text) == nano_usd


@pytest.mark.parametrize(
    "text", ["", "s", "1", "1 s", "-1s", "1w", "1e3s", "nan", "infs", "٣s", "1" * 99 + "s", "9999d", "1s\n"]
)
def test_not_durations(text: str) -> None:
    with pytest.raises(UnitError):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "1", "16M", "16mb", "0.5B", "-1B", "1e3B", "inf", "99999999GiB"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(UnitError):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "$", "-1", "1e3", "nan", ".inf", "$1 USD", "1 EUR", "0.0000000001", "1000001", "1_000"]
)
def test_not_prices(text: str) -> None:
    with pytest.raises(UnitError):
        parse_usd_per_million(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 EUR", "expected dollars, such as `5`, `$5` or `0.25 USD`, found `5 EUR`"),
        ("5s", "expected dollars, such as `5`, `$5` or `0.25 USD`, found `5s`"),
        ("-5", "an amount must not be negative"),
        ("9000000.01", "expected at most 9000000 dollars, found `9000000.01`"),
        ("0.0000000001", "expected dollars with at most 9 decimal places, found `0.0000000001`"),
    ],
)
def test_not_amounts(text: str, message: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_usd(text)
    assert str(caught.value) == message
