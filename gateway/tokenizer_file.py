"""How many tokens has a text by a model's own `tokenizer.json`? The only module that knows the `tokenizers` library.

Belongs in a child process, as `gateway.ranks` does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


class TokenizerUnusable(Exception):  # noqa: N818 - says what is wrong, not that it is an error
    """There is no such file, it is no tokenizer, or the library is not installed."""


def why_unusable(path: str) -> str | None:
    """Say in half a sentence why `path` cannot be used, None where nothing speaks against it. Loads nothing."""
    if importlib.util.find_spec("tokenizers") is None:
        return "needs the package `tokenizers`; the extra brings it: pip install 'tierway[tokenizers]'"
    return None if Path(path).is_file() else f"there is no file {path}"


class TokenizerFile:
    """The tokenizer in one file. Raises `TokenizerUnusable`."""

    def __init__(self, path: str) -> None:
        reason = why_unusable(path)
        if reason is not None:
            raise TokenizerUnusable(reason)
        # An optional dependency, large, and wanted in a child process alone.
        from tokenizers import Tokenizer  # noqa: PLC0415

        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as why:  # noqa: BLE001 - the library raises nothing narrower
            raise TokenizerUnusable(f"{path} is no tokenizer: {why}") from None

    def count(self, text: str, *, whole: bool) -> int:
        """Return how many tokens `text` has; a `whole` prompt with those that stand before and after it (BOS)."""
        return len(self._tokenizer.encode(text, add_special_tokens=whole))
