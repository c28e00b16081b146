"""A package `litellm` with its price list, for tests: a part of the real file, and nothing that may be imported.

`litellm_prices.json` is an excerpt of `model_prices_and_context_window_backup.json` of litellm 1.109.1 (MIT licence,
copyright Berri AI, https://github.com/BerriAI/litellm): some entries, of each the keys about costs, numbers as they were
written there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

VERSION = "1.109.1"
LIST = (Path(__file__).parent / "litellm_prices.json").read_bytes()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None = LIST) -> Path:
    """Put the package into a folder and the folder first on the path; return where its price list is."""
    package, told = folder / "litellm", folder / f"litellm-{VERSION}.dist-info"
    package.mkdir()
    told.mkdir()
    (package / "__init__.py").write_text('raise AssertionError("imported")\n')
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: litellm\nVersion: {VERSION}\n")
    file = package / "model_prices_and_context_window_backup.json"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.syspath_prepend(folder)
    return file


def uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every package off the path, whether a real litellm is there or not."""
    monkeypatch.setattr(sys, "path", [])
