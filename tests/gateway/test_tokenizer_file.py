"""Does a model's own tokenizer count, and is it said what is missing where it cannot?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gateway.tokenizer_file import TokenizerFile, TokenizerUnusable, why_unusable
from tests.gateway.tiny_tokenizer import write_tokenizer


def test_a_whole_prompt_has_one_token_more_than_its_text(tmp_path: Path) -> None:
    file = TokenizerFile(write_tokenizer(tmp_path))
    assert file.count("hello hello", whole=False) == 2
    assert file.count("hello hello", whole=True) == 3
    assert file.count("", whole=True) == 1
    # Bytes that it never saw are a token each, and the blank before them.
    assert file.count("é", whole=False) == 3


def test_a_file_that_is_not_there_or_no_tokenizer_is_told(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    assert "no file" in (why_unusable(missing) or "")
    (tmp_path / "bad.json").write_text("{}")
    assert why_unusable(str(tmp_path / "bad.json")) is None
    for name in ("none.json", "bad.json"):
        with pytest.raises(TokenizerUnusable, match=name):
            TokenizerFile(str(tmp_path / name))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    path = write_tokenizer(tmp_path)
    assert "tierway[tokenizers]" in (why_unusable(path) or "")
    with pytest.raises(TokenizerUnusable, match=r"tierway\[tokenizers\]"):
        TokenizerFile(path)
