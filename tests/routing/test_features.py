"""The vector that stands for a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.features import features_of


@given(st.binary(max_size=5000))
def test_any_bytes_have_a_vector_of_signed_bytes(prompt: bytes) -> None:
    vector = features_of(prompt)
    assert len(vector) == 128
    assert max(vector) <= 127
    assert vector == features_of(prompt)


def test_it_counts_words_and_neither_case_nor_order() -> None:
    assert features_of(b'"Paris in spring"') == features_of(b'"spring IN paris"')
    assert features_of(b'"Paris"') != features_of(b'"London"')
    once, four = features_of(b"tree"), features_of(b"tree tree tree tree")
    assert max(once) == 16
    assert max(four) == 32
    assert max(features_of(b"tree " * 100)) == 126


def test_of_a_long_prompt_beginning_and_end_count() -> None:
    middle = b" lorem" * 1000
    assert features_of(b"first" + middle + b" last") != features_of(b"other" + middle + b" last")
    assert features_of(b"first" + middle + b" last") != features_of(b"first" + middle + b" other")
