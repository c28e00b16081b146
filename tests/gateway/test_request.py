"""Is all text that goes into a prompt found, and nothing else?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.body import Asked, read_body

Json = dict[str, Any]
PICTURE = "data:image/png;base64," + "A" * 10_000


def chat(*messages: Json, **fields: Any) -> Asked:
    raw = json.dumps({"model": "m", "messages": [*messages], **fields}).encode()
    return read_body("chat/completions", raw).asked


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def compact(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.one_of(texts, st.lists(texts, max_size=3)), min_size=1, max_size=4), texts, texts)
def test_the_size_is_that_of_all_text_in_utf8_and_never_more_than_the_body(
    contents: list[str | list[str]], name: str, arguments: str
) -> None:
    messages = [
        user(one if isinstance(one, str) else [{"type": "text", "text": text} for text in one]) for one in contents
    ]
    call = {"id": "c", "function": {"name": name, "arguments": arguments}}
    asked = chat(*messages, {"role": "assistant", "tool_calls": [call]}, {**user("x"), "name": name})
    spoken = "".join(one if isinstance(one, str) else "".join(one) for one in contents)
    assert asked.text_bytes == len((spoken + "c" + name + arguments + "x" + name).encode())
    assert asked.text_bytes <= asked.prompt_bytes


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "ü"}}]}, None),
        ({"documents": [{"title": "t", "text": "long"}]}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}, 24),
        ({"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stop": ["x"], "vendor": "v"}, 0),
    ],
)
def test_what_templates_write_as_json_is_measured_as_json(fields: Json, added: int | None) -> None:
    expected = compact(next(iter(fields.values()))) if added is None else added
    assert chat(user("Hi"), **fields).text_bytes == 2 + expected


def test_thoughts_refusals_and_ids_are_text() -> None:
    messages = (
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "no"}],
            "reasoning_content": "hm",
            "reasoning": 7,
        },
        {"role": "tool", "content": "4", "tool_call_id": "id"},
    )
    assert chat(*messages).text_bytes == 2 + 2 + 1 + 2


def test_pictures_and_sound_are_counted_and_their_data_is_no_text() -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
        {"type": "image_url", "image_url": PICTURE},
        {"type": "input_audio", "input_audio": {"data": "A" * 10_000, "format": "wav"}},
    ]
    asked = chat(user(parts))
    assert (asked.images, asked.text_bytes, asked.plain) == (3, 13, False)
    assert asked.prompt_bytes < 500


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"tools": [{"type": "function"}]}, True),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, False),
        ({"documents": []}, False),
        ({"reasoning_effort": "low"}, False),
        ({"reasoning_effort": None}, True),
    ],
)
def test_where_only_the_server_knows_its_prompt_it_is_not_plain(fields: Json, plain: bool) -> None:
    assert chat(user("Hi"), **fields).plain == plain


def test_numbers_that_grow_when_they_are_written_anew_are_within_the_size_of_the_body() -> None:
    raw = (
        b'{"model":"m","messages":[{"role":"user","content":""}],"tools":[{"type":"f","x":[' + b"1E15," * 999 + b"1]}]}"
    )
    asked = read_body("chat/completions", raw).asked
    assert len(raw) < asked.text_bytes <= asked.prompt_bytes
