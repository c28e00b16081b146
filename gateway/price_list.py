"""What does a hosted model cost, by LiteLLM's price list? The file that the installed `litellm` package brings.

The package itself is never imported: that takes seconds and a lot of memory, and only the file is wanted. Nothing is
looked for, nor read, before somebody asks for a model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import msgspec

from gateway.config.problem import guess, quoted
from gateway.config.units import DEAREST_NUSD

_FILE = "model_prices_and_context_window_backup.json"
_EXPLAINED = "sample_spec"
"""An entry that says what entries can hold."""
_NUSD_PER_MILLION = 10**15
"""Nano-dollars per million tokens of one dollar a token."""
_UNREAD = re.compile(
    r"(?:input_cost_per_token|output_cost_per_token|cache_read_input_token_cost)_above_[0-9]+k_tokens"
    r"|output_cost_per_reasoning_token|tiered_pricing"
)


class ListedPrice(msgspec.Struct, frozen=True, kw_only=True):
    """Nano-dollars per million tokens.

    `unread` are the keys of an entry by which some tokens of text cost something else, and which nothing is billed by:
    those of prompts above so many tokens, and that of reasoning.
    """

    input_nusd: int
    cached_input_nusd: int
    output_nusd: int
    unread: tuple[str, ...] = ()


class PriceUnknownError(Exception):
    """The list cannot say what this model costs. The message is for the operator, and says why."""


class _Entry(msgspec.Struct, frozen=True):
    """The keys of an entry that are read: dollars per token, exact as they are written."""

    input_cost_per_token: Decimal | None = None
    output_cost_per_token: Decimal | None = None
    cache_read_input_token_cost: Decimal | None = None


class LiteLlmPrices:
    """The price list. `version` is that of the installed package, empty without one."""

    def __init__(self) -> None:
        self._entries: dict[str, msgspec.Raw] | None = None

    @property
    def version(self) -> str:
        """Which list it is."""
        try:
            return importlib.metadata.version("litellm")
        except importlib.metadata.PackageNotFoundError:
            return ""

    def price_of(self, model: str) -> ListedPrice:
        """Return what a model costs. Raises `PriceUnknownError`."""
        if self._entries is None:
            self._entries = _read(_path())
        raw = self._entries.get(model)
        if raw is None or model == _EXPLAINED:
            known = (name for name in self._entries if name != _EXPLAINED)
            raise PriceUnknownError(f"no model {quoted(model)} in LiteLLM's price list{guess(model, known)}")
        return _listed_of(model, raw)


def _path() -> Path:
    # Of a top-level name this looks and does not import.
    spec = importlib.util.find_spec("litellm")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise PriceUnknownError("LiteLLM's price list is not here; install `tierway[hosted]`, or write the prices out")
    return Path(folders[0]) / _FILE


def _read(path: Path) -> dict[str, msgspec.Raw]:
    """Read the list; its entries one by one, when they are asked for, as each can hold anything."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except OSError as fault:
        reason = fault.strerror or "no reason given"
        raise PriceUnknownError(f"LiteLLM's price list `{path}` cannot be read: {reason}") from None
    except msgspec.MsgspecError:
        raise PriceUnknownError(f"LiteLLM's price list `{path}` is not the JSON that it was") from None


def _listed_of(model: str, raw: msgspec.Raw | bytes) -> ListedPrice:
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
        keys = msgspec.json.decode(raw, type=dict[str, object])
    except msgspec.MsgspecError:
        raise PriceUnknownError(f"the entry {quoted(model)} of LiteLLM's price list cannot be read") from None
    paid, earned, cached = entry.input_cost_per_token, entry.output_cost_per_token, entry.cache_read_input_token_cost
    if paid is None or earned is None:
        raise PriceUnknownError(
            f"LiteLLM's price list has {quoted(model)}, but no price of each of its tokens; write the prices out"
        )
    cached = paid if cached is None else cached
    if not (paid or earned) and (charge := _charge(keys)):
        # It would be billed as free, and is not.
        raise PriceUnknownError(
            f"LiteLLM's price list has {quoted(model)} at nothing a token, but with {quoted(charge)}, which cannot be "
            "billed here; write the prices out"
        )
    return ListedPrice(
        input_nusd=_nusd(model, paid),
        cached_input_nusd=_nusd(model, cached),
        output_nusd=_nusd(model, earned),
        unread=tuple(key for key in keys if _UNREAD.fullmatch(key)),
    )


def _charge(keys: dict[str, object]) -> str | None:
    """Return a key of an entry that says that it costs something after all."""
    costs = (key for key, cost in keys.items() if "_cost_per_" in key and isinstance(cost, int | float) and cost)
    return next(costs, None)


def _nusd(model: str, usd_per_token: Decimal) -> int:
    """Return nano-dollars per million tokens, of a fraction the nearest: half to even, as `round` does."""
    if not (usd_per_token.is_finite() and 0 <= usd_per_token <= Decimal(DEAREST_NUSD) / _NUSD_PER_MILLION):
        message = f"LiteLLM's price list has {quoted(model)} at a price that cannot be; write the prices out"
        raise PriceUnknownError(message)
    return round(Fraction(usd_per_token) * _NUSD_PER_MILLION)
