"""Is what servers say of themselves and of prompts read as the recordings have it?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import ServerFacts, Window
from backends.server_facts import count_in, facts_of, text_question

RECORDED = Path(__file__).parents[1] / "contract"


def recorded(name: str) -> bytes:
    answer = json.loads((RECORDED / f"{name}.json").read_bytes())["response"]["body"]
    return json.dumps(answer, separators=(",", ":")).encode()


def test_the_lists_of_models_say_what_serves_and_how_much_it_reads() -> None:
    vllm, llama = facts_of(recorded("vllm/get_v1_models")), facts_of(recorded("llamacpp/get_v1_models"))
    assert vllm == ServerFacts(software="vllm", windows=(Window("smollm2-135m", 2048),))
    assert llama == ServerFacts(software="llamacpp", windows=(Window("smollm2", 2048),))


def test_a_window_is_that_of_the_model_or_the_only_one() -> None:
    one, two = Window("a", 1000), Window("b", 2000)
    assert ServerFacts(windows=(one, two)).context_tokens("b") == 2000
    assert ServerFacts(windows=(one, two)).context_tokens("c") is None
    assert ServerFacts(windows=(one,)).context_tokens("c") == 1000
    assert ServerFacts().context_tokens("a") is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b'{"data":[]}',
        b'{"data":[{"id":"gpt-4o","owned_by":"system"}]}',
        b'{"data":[{"id":"a","max_model_len":-1}]}',
        b'{"data":{}}',
    ],
)
def test_other_servers_say_nothing(answer: bytes) -> None:
    assert facts_of(answer) == ServerFacts()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vllm/tokenize_chat", 37),
        ("vllm/tokenize_prompt", 2),
        ("llamacpp/count_chat", 37),
        ("llamacpp/tokenize_content", 2),
        # A question in vLLM's words: an empty list is no count.
        ("llamacpp/tokenize_prompt", None),
    ],
)
def test_recorded_counts_are_read(name: str, tokens: int | None) -> None:
    assert count_in(recorded(name)) == tokens


@pytest.mark.parametrize("name", ["vllm", "llamacpp"])
def test_a_long_list_of_ids_is_counted_without_reading_it(name: str) -> None:
    ids = ",".join(str(one) for one in range(50_000))
    head = '{"count":50000,"max_model_len":9,"tokens":[' if name == "vllm" else '{"tokens":['
    assert count_in(f"{head}{ids}]}}".encode()) == 50_000


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"[]", b"{", b'{"count":-1}', b'{"count":"3"}', b'{"tokens":["a"]}', b"\xff"]
)
def test_what_is_no_count_is_none(answer: bytes) -> None:
    assert count_in(answer) is None
    assert count_in(answer + b" " * 70_000) is None


@given(st.binary(max_size=60))
def test_any_answer_is_read_or_none(answer: bytes) -> None:
    assert facts_of(answer).windows == ()
    count_in(answer)


@given(st.text())
def test_the_question_for_a_text_is_its_json_as_it_stood(prompt: str) -> None:
    given_ = json.dumps({"model": "m", "prompt": prompt, "n": 2}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    asked = text_question(given_)
    assert asked is not None
    assert json.loads(b"".join(asked)) == {"add_special": True, "content": prompt}


@pytest.mark.parametrize("prompt", [["a"], [1, 2], [[1]]])
def test_there_is_no_question_for_what_is_not_one_text(prompt: object) -> None:
    assert text_question(json.dumps({"prompt": prompt}).encode()) is None
