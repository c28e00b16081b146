"""Are tokens counted as tiktoken counts them, with no network and of any text?"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import socket

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gateway import ranks
from gateway.ranks import Encoding, encoding_of, rank_file_bytes

NAMES = ("cl100k_base", "o200k_base")


@pytest.fixture(scope="module", params=NAMES)
def encoding(request: pytest.FixtureRequest) -> Encoding:
    return Encoding(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_the_rank_files_are_those_that_tiktoken_would_fetch(name: str) -> None:
    digest = hashlib.sha256(gzip.decompress(rank_file_bytes(name))).hexdigest()
    assert f'expected_hash="{digest}"' in inspect.getsource(getattr(openai_public, name))


@pytest.mark.parametrize("name", [*NAMES, "o200k_harmony"])
def test_the_patterns_are_tiktokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    assert ranks._ENCODINGS[name][1] == openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-3.5-turbo-0125", "cl100k_base"),
        ("openai/gpt-oss-20b", "o200k_harmony"),
        ("gpt2", None),
        ("smollm2-135m", None),
        ("", None),
    ],
)
def test_an_encoding_is_known_by_the_models_name(model: str, name: str | None) -> None:
    assert encoding_of(model) == name


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a socket was wanted")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    # From OpenAI's cookbook.
    assert Encoding("cl100k_base").count("tiktoken is great!") == (6, True)


def whole(encoding: Encoding, text: str) -> int:
    inner: tiktoken.Encoding = encoding._encoding
    return len(inner.encode_ordinary(text))


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["word", "I'll", "é", "  ", "\n", "12345", "x=1;", "你好", "🙂", "A b"]), max_size=60
    )
)
def test_a_text_in_pieces_has_as_many_tokens_as_whole(encoding: Encoding, words: list[str]) -> None:
    text = " ".join(words)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranks, "_PIECE_CHARS", 40)
        patched.setattr(ranks, "_CUT_WITHIN_CHARS", 30)
        tokens, sure = encoding.count(text)
    if sure:
        assert tokens == whole(encoding, text)
    else:
        assert abs(tokens - whole(encoding, text)) <= len(text)


def test_long_prose_is_counted_exactly(encoding: Encoding) -> None:
    text = "It was the best of times, it was the worst of times. \n" * 3000
    assert encoding.count(text) == (whole(encoding, text), True)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "🙂", "\t ", "!"])
def test_a_megabyte_of_one_thing_is_counted_near_enough(encoding: Encoding, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    tokens, sure = encoding.count(text)
    assert 0 < tokens <= 1_000_000
    assert not sure
