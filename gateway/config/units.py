"""How is a quantity written? Durations, sizes and money as people write them, to and from exact values.

A duration is held in seconds (float), a size in bytes (int), an amount of money in integer nano-dollars, a price in
integer nano-dollars per million tokens. What is read never passes through a float before it is exact: `0.1` dollars
are 100 000 000 nano-dollars and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

import msgspec

NANO = 1_000_000_000
LONGEST = 40
"""Longest text that is looked at: a quantity is a few digits and a unit."""

SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

NUMBER = r"[0-9]+(?:\.[0-9]+)?"
DURATION = rf"^{NUMBER}(?:ms|s|m|h|d)$"
SIZE = rf"^{NUMBER}(?:B|kB|MB|GB|KiB|MiB|GiB)$"
MONEY = r"^(?:\$ ?[0-9]+(?:\.[0-9]{1,9})?|[0-9]+(?:\.[0-9]{1,9})?(?: ?USD)?)$"

LONGEST_DURATION_S = 10 * 366 * 24 * 3600
LARGEST_SIZE = 2**50
DEAREST_NUSD = 1_000_000 * NANO
LARGEST_NUSD = 9_000_000 * NANO
"""Nano-dollars of the largest amount: below 2**53, so that a store that counts in doubles counts it exactly."""


class UnitError(ValueError):
    """The text is not such a quantity; the message says what is expected and what was found."""


class Unit(msgspec.Struct, frozen=True):
    """A way of writing a quantity: how it is read and shown, and its words for documents."""

    words: str
    pattern: str
    numeric: bool  # whether a bare number is one too
    parse: Callable[[str], float]
    render: Callable[[float], str]


def _shown(text: str) -> str:
    return f"`{text}`" if text.isprintable() and len(text) <= LONGEST else "other text"


def _split(text: str) -> tuple[Decimal, str] | None:
    match = re.fullmatch(rf"({NUMBER})([A-Za-z]*)", text) if len(text) <= LONGEST else None
    return (Decimal(match[1]), match[2]) if match else None


def parse_duration(text: str) -> float:
    """`500ms`, `2s`, `1.5s`, `10m`, `1h`, `30d` in seconds. Raises UnitError, also for nothing and over ten years."""
    parts = _split(text)
    if parts is None or (parts[1] and parts[1] not in SECONDS):
        raise UnitError(f"expected a duration such as `500ms`, `2s`, `10m`, `1h` or `30d`, found {_shown(text)}")
    number, unit = parts
    if not unit:
        raise UnitError(f"expected a duration with its unit, found the bare number `{text}`; write `{text}s`")
    seconds = number * SECONDS[unit]
    if seconds > LONGEST_DURATION_S:
        raise UnitError(f"expected a duration of at most ten years (`3660d`), found `{text}`")
    return float(seconds)


def render_duration(seconds: float) -> str:
    """Seconds as `parse_duration` reads them, in the largest unit that makes a whole number."""
    if not seconds:
        return "0s"
    exact = Decimal(repr(float(seconds)))
    for unit in ("d", "h", "m", "s", "ms"):
        number = exact / SECONDS[unit]
        if number == number.to_integral_value() and number * SECONDS[unit] == exact:
            return f"{number:f}".split(".", maxsplit=1)[0] + unit
    return f"{exact:f}s"


def parse_size(text: str) -> int:
    """`64KiB`, `16MiB`, `10MB` in bytes. Raises UnitError, also for a fraction of a byte."""
    parts = _split(text)
    if parts is None or (parts[1] and parts[1] not in BYTES):
        raise UnitError(f"expected a size such as `64KiB`, `16MiB` or `10MB`, found {_shown(text)}")
    number, unit = parts
    if not unit:
        example = render_size(int(number)) if number == int(number) and number else "64KiB"
        raise UnitError(f"expected a size with its unit, found the bare number `{text}`; write `{example}`")
    size = number * BYTES[unit]
    if size != int(size):
        raise UnitError(f"expected a whole number of bytes, found `{text}`")
    if size > LARGEST_SIZE:
        raise UnitError(f"expected a size of at most `{render_size(LARGEST_SIZE)}`, found `{text}`")
    return int(size)


def render_size(size: float) -> str:
    """Bytes as `parse_size` reads them, in the largest unit that makes a whole number."""
    for unit in ("GiB", "MiB", "KiB", "GB", "MB", "kB"):
        if size and size % BYTES[unit] == 0:
            return f"{int(size) // BYTES[unit]}{unit}"
    return f"{int(size)}B"


def parse_usd_per_million(text: str) -> int:
    """`0.05`, `$0.05`, `0.05 USD` in nano-dollars, exact. Raises UnitError, also for a tenth decimal place."""
    nano = _nano_dollars(text, "a price", "dollars per million tokens, such as `0.05`, `$0.05` or `0.05 USD`")
    if nano > DEAREST_NUSD:
        raise UnitError(f"expected at most 1000000 dollars per million tokens, found `{text}`")
    return nano


def parse_usd(text: str) -> int:
    """`5`, `$5`, `0.25 USD` in nano-dollars, exact. Raises UnitError, also for a tenth decimal place."""
    nano = _nano_dollars(text, "an amount", "dollars, such as `5`, `$5` or `0.25 USD`")
    if nano > LARGEST_NUSD:
        raise UnitError(f"expected at most 9000000 dollars, found `{text}`")
    return nano


def _nano_dollars(text: str, what: str, words: str) -> int:
    match = re.fullmatch(r"(\$ ?)?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)( ?USD)?", text) if len(text) <= LONGEST else None
    if match is None or (match[1] and match[3]):
        if re.fullmatch(r"-(\$ ?)?[0-9.]+( ?USD)?", text):
            raise UnitError(f"{what} must not be negative")
        raise UnitError(f"expected {words}, found {_shown(text)}")
    dollars = Decimal(match[2])
    nano = dollars * NANO
    if nano != int(nano):
        raise UnitError(f"expected dollars with at most 9 decimal places, found `{text}`")
    return int(nano)


def render_usd(nano_usd: float) -> str:
    """Nano-dollars as `parse_usd` and `parse_usd_per_million` read them: `$0.05`."""
    whole, rest = divmod(int(nano_usd), NANO)
    cents = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"${whole}.{cents}"


UNITS = {
    "duration": Unit("duration", DURATION, numeric=False, parse=parse_duration, render=render_duration),
    "size": Unit("size", SIZE, numeric=False, parse=parse_size, render=render_size),
    "usd_per_million": Unit(
        "dollars per million tokens",
        MONEY,
        numeric=True,
        parse=parse_usd_per_million,
        render=render_usd,
    ),
    "usd": Unit("dollars", MONEY, numeric=True, parse=parse_usd, render=render_usd),
}
"""What `Meta(extra={"unit": …})` in `gateway.config.model` can name."""
