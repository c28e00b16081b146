"""Is every request that can be read kept as it is, and every other refused by the name of its field?"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Endpoint
from gateway.body import Body, read_body
from gateway.errors import Refusal

Json = dict[str, Any]
SAID = [{"role": "user", "content": "Hi"}]
CHAT: Json = {"model": "auto", "messages": SAID}
TEXT: Json = {"model": "auto", "prompt": "Hi"}
OURS = {"model", "stream", "stream_options", "logprobs", "top_logprobs"}


def read(endpoint: Endpoint, body: Json) -> Body:
    return read_body(endpoint, json.dumps(body).encode())


def chat(**fields: Any) -> Body:
    return read("chat/completions", CHAT | fields)


def text(**fields: Any) -> Body:
    return read("completions", TEXT | fields)


def sent(body: Body, *, scored: bool = False, **ours: Any) -> Json:
    def once(pairs: list[tuple[str, Any]]) -> Json:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    found: Json = json.loads(b"".join(body.for_backend("small-1", scored=scored, **ours)), object_pairs_hook=once)
    return found


def refusal(endpoint: Endpoint, raw: bytes) -> Refusal:
    with pytest.raises(Refusal) as raised:
        read_body(endpoint, raw)
    return raised.value


# -- what is refused --------------------------------------------------------------------------------------------------

NO_JSON: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "invalid_json"),
    "blanks": (b" \n\t ", "invalid_json"),
    "words": (b"hello", "invalid_json"),
    "half": (b'{"model":"a"', "invalid_json"),
    "two": (b"{}{}", "invalid_json"),
    "a trailing comma": (b'{"model":"a",}', "invalid_json"),
    "single quotes": (b"{'model':'a'}", "invalid_json"),
    "a comment": (b'{"model":"a"/*x*/}', "invalid_json"),
    "NaN": (b'{"temperature":NaN}', "invalid_json"),
    "Infinity": (b'{"temperature":Infinity}', "invalid_json"),
    "a number too large to be one": (b'{"temperature":1e999}', "invalid_json"),
    "a leading zero": (b'{"max_tokens":01}', "invalid_json"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "invalid_json"),
    "UTF-16": ('{"model":"a"}'.encode("utf-16"), "invalid_json"),
    "no UTF-8": (b'{"model":"\xff"}', "invalid_json"),
    "a surrogate in UTF-8": (b'{"model":"\xed\xa0\x80"}', "invalid_json"),
    "half a surrogate pair": (b'{"model":"\\ud800"}', "invalid_json"),
    "half a pair and more": (b'{"model":"\\ud800 and so on and on"}', "invalid_json"),
    "the second half": (b'{"model":"\\udc00"}', "invalid_json"),
    "a raw NUL": (b'{"model":"\x00"}', "invalid_json"),
    "a raw line end in a string": (b'{"model":"\n"}', "invalid_json"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, "invalid_value"),
    "deep nesting that ends": (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_value"),
    "nesting just too deep": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "invalid_value"),
    "nested objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "invalid_value"),
    "null": (b"null", "invalid_type"),
    "a list": (b"[]", "invalid_type"),
    "a string": (b'"model"', "invalid_type"),
    "a number": (b"7", "invalid_type"),
    "an escaped NUL": (b'{"model":"a\\u0000"}', "invalid_value"),
    "an escaped NUL behind a backslash": (b'{"model":"\\\\\\u0000"}', "invalid_value"),
    "an escaped NUL in a key": (b'{"\\u0000":1}', "invalid_value"),
    "an integer out of range": (b'{"seed":18446744073709551616}', "invalid_value"),
    "a huge integer": (b'{"seed":' + b"9" * 4000 + b"}", "invalid_value"),
    "an integer that is no number any more": (b'{"seed":' + b"9" * 40_000 + b"}", "invalid_json"),
}


@pytest.mark.parametrize("name", NO_JSON)
@pytest.mark.parametrize("endpoint", get_args(Endpoint))
def test_what_is_no_object_of_json_is_refused(name: str, endpoint: Endpoint) -> None:
    raw, code = NO_JSON[name]
    found = refusal(endpoint, raw)
    assert (found.code, found.status) == (code, 400)
    assert len(found.message) < 300


def test_only_half_a_pair_is_called_so() -> None:
    assert "surrogate" in refusal("chat/completions", b'{"a":"\\ud800"}').message
    assert "surrogate" not in refusal("chat/completions", b'{"a":"\\ud83d\\ude00",}').message


MISSING = "missing_required_parameter"
TYPE = "invalid_type"
VALUE = "invalid_value"
BAD_CHATS: list[tuple[Json, str, str]] = [
    ({"model": 7}, TYPE, "model"),
    ({"model": None}, TYPE, "model"),
    ({"model": ""}, VALUE, "model"),
    ({"model": "x" * 257}, VALUE, "model"),
    ({"messages": []}, VALUE, "messages"),
    ({"messages": None}, TYPE, "messages"),
    ({"messages": "Hi"}, TYPE, "messages"),
    ({"messages": {}}, TYPE, "messages"),
    ({"messages": ["Hi"]}, TYPE, "messages[0]"),
    ({"messages": [None]}, TYPE, "messages[0]"),
    ({"messages": [{}]}, MISSING, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, VALUE, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": None}]}, VALUE, "messages[0].content"),
    ({"messages": [*SAID, {"role": "wizard", "content": "Hi"}]}, VALUE, "messages[1].role"),
    ({"messages": [{"role": 7, "content": "Hi"}]}, TYPE, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 7}]}, TYPE, "messages[0].content"),
    ({"messages": [{"role": "user", "content": {}}]}, TYPE, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, TYPE, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{}]}]}, MISSING, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, TYPE, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 7}}]}]},
        TYPE,
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        MISSING,
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, TYPE, "messages[0].tool_calls"),
    ({"stream": "true"}, TYPE, "stream"),
    ({"stream": 1}, TYPE, "stream"),
    ({"stream": True, "stream_options": "include_usage"}, TYPE, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, TYPE, "stream_options.include_usage"),
    ({"stream_options": {"include_usage": True}}, VALUE, "stream_options"),
    ({"stream": False, "stream_options": {}}, VALUE, "stream_options"),
    ({"max_tokens": 0}, VALUE, "max_tokens"),
    ({"max_tokens": -1}, VALUE, "max_tokens"),
    ({"max_tokens": "many"}, TYPE, "max_tokens"),
    ({"max_tokens": 1.5}, TYPE, "max_tokens"),
    ({"max_tokens": True}, TYPE, "max_tokens"),
    ({"max_tokens": 2**31}, VALUE, "max_tokens"),
    ({"max_tokens": 2**40}, VALUE, "max_tokens"),
    ({"max_tokens": 2**64}, VALUE, "max_tokens"),
    ({"max_tokens": 1e300}, TYPE, "max_tokens"),
    ({"max_tokens": "5"}, TYPE, "max_tokens"),
    ({"max_tokens": [5]}, TYPE, "max_tokens"),
    ({"max_completion_tokens": -1}, VALUE, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, VALUE, "max_completion_tokens"),
    ({"n": 0}, VALUE, "n"),
    ({"n": 129}, VALUE, "n"),
    ({"temperature": -0.1}, VALUE, "temperature"),
    ({"temperature": 2.1}, VALUE, "temperature"),
    ({"temperature": "hot"}, TYPE, "temperature"),
    ({"top_p": 1.1}, VALUE, "top_p"),
    ({"presence_penalty": 3}, VALUE, "presence_penalty"),
    ({"frequency_penalty": -3}, VALUE, "frequency_penalty"),
    ({"seed": 2**63}, VALUE, "seed"),
    ({"seed": "1"}, TYPE, "seed"),
    ({"stop": 7}, TYPE, "stop"),
    ({"stop": ["a", 7]}, TYPE, "stop[1]"),
    ({"logit_bias": [1]}, TYPE, "logit_bias"),
    ({"logprobs": 1}, TYPE, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, VALUE, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, VALUE, "top_logprobs"),
    ({"top_logprobs": 3}, VALUE, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 0}, VALUE, "top_logprobs"),
    ({"tools": {}}, TYPE, "tools"),
    ({"tools": [{}]}, MISSING, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, MISSING, "tools[0].function.name"),
    ({"tool_choice": 7}, TYPE, "tool_choice"),
    ({"parallel_tool_calls": "no"}, TYPE, "parallel_tool_calls"),
    ({"response_format": "json"}, TYPE, "response_format"),
    ({"response_format": {}}, MISSING, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": "x"}}, TYPE, "response_format.json_schema"),
    ({"user": 7}, TYPE, "user"),
    ({"metadata": "x"}, TYPE, "metadata"),
    ({"vendor": {"ids": [1, 2**64]}}, VALUE, "vendor.ids[1]"),
    ({"k" * 5000: 2**64}, VALUE, "k" * 256),
]
BAD_TEXTS: list[tuple[Json, str, str]] = [
    ({"prompt": None}, TYPE, "prompt"),
    ({"prompt": 7}, TYPE, "prompt"),
    ({"prompt": []}, VALUE, "prompt"),
    ({"prompt": ["a", 7]}, TYPE, "prompt"),
    ({"prompt": [1, "a"]}, TYPE, "prompt"),
    ({"prompt": [1, [2]]}, TYPE, "prompt"),
    ({"prompt": [[1], []]}, VALUE, "prompt"),
    ({"prompt": [[]]}, VALUE, "prompt"),
    ({"prompt": [1.5]}, TYPE, "prompt[0]"),
    ({"prompt": [True]}, TYPE, "prompt[0]"),
    ({"prompt": [None]}, TYPE, "prompt[0]"),
    ({"prompt": [["a"]]}, TYPE, "prompt[0][0]"),
    ({"logprobs": True}, TYPE, "logprobs"),
    ({"logprobs": 21}, VALUE, "logprobs"),
    ({"echo": "yes"}, TYPE, "echo"),
    ({"suffix": 7}, TYPE, "suffix"),
    ({"best_of": 0}, VALUE, "best_of"),
    ({"n": 0}, VALUE, "n"),
    ({"stream": "yes"}, TYPE, "stream"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD_CHATS, ids=[str(fields)[:60] for fields, _, _ in BAD_CHATS])
def test_a_bad_chat_is_refused_by_the_name_of_its_field(fields: Json, code: str, param: str) -> None:
    found = refusal("chat/completions", json.dumps(CHAT | fields).encode())
    assert (found.code, found.param, found.status) == (code, param, 400)
    assert param in found.message
    assert "`" not in found.message
    assert len(found.message) < 600


@pytest.mark.parametrize(("fields", "code", "param"), BAD_TEXTS, ids=[str(fields)[:60] for fields, _, _ in BAD_TEXTS])
def test_a_bad_completion_is_refused_by_the_name_of_its_field(fields: Json, code: str, param: str) -> None:
    found = refusal("completions", json.dumps(TEXT | fields).encode())
    assert (found.code, found.param, found.status) == (code, param, 400)


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_must_be_there_is_missed_by_name(name: str) -> None:
    found = refusal("chat/completions", json.dumps({key: CHAT[key] for key in CHAT if key != name}).encode())
    assert (found.code, found.param) == (MISSING, name)
    assert found.message == f"Missing required parameter: '{name}'."


def test_a_completion_needs_a_prompt() -> None:
    assert refusal("completions", b'{"model":"a"}').param == "prompt"


def test_a_client_cannot_name_the_field_that_is_blamed() -> None:
    role = "x` - at `$.model`"
    found = refusal("chat/completions", json.dumps({"model": "a", "messages": [{"role": role}]}).encode())
    assert found.param == "messages[0].role"


@pytest.mark.parametrize("role", [" - at `$.model" * 1200, "x" * 40_000, "`" * 40_000])
def test_a_long_wrong_value_is_neither_echoed_nor_slow(role: str) -> None:
    began_s = time.perf_counter()
    found = refusal("chat/completions", json.dumps({"model": "a", "messages": [{"role": role}]}).encode())
    assert time.perf_counter() - began_s < 0.5
    assert len(found.message) < 600


# -- what is kept -----------------------------------------------------------------------------------------------------

KEPT: Json = {
    "vendor": {"zero": 0, "null": None, "false": False, "empty": [], "deep": [[{"a": [None, 0.0, -0.5, ""]}]]},
    "priority": 0,
    "temperature": 0,
    "seed": 0,
    "user": "",
    "stop": None,
    "max_tokens": None,
    "top_p": 1e-9,
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "type": "object",
                    "properties": {"z": {"type": "integer"}, "a": {"type": ["string", "null"], "default": None}},
                    "required": ["z"],
                    "additionalProperties": False,
                },
                "strict": True,
            },
        },
        {"type": "custom", "custom": {"name": "g"}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "text": 'Grüße 🙂 \u2028 " \\ \n \t \x7f /',
    "large": [2**64 - 1, -(2**63), 1.7976931348623157e308, 5e-324, 0.1, 1e22],
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_unknown_fields_zeros_nulls_and_schemas_survive_in_their_order() -> None:
    found = sent(chat(**KEPT))
    assert found == {"model": "small-1", "messages": SAID, **KEPT}
    # What a call may replace stands at the head.
    replaceable = ["max_tokens", "priority"]
    assert list(found) == ["model", *replaceable, "messages", *(name for name in KEPT if name not in replaceable)]
    assert json.dumps(found["tools"]) == json.dumps(KEPT["tools"])


def test_the_parts_of_a_message_survive() -> None:
    messages = [
        {"role": "developer", "content": "x", "vendor": 0},
        {"role": "user", "name": "me", "content": [{"type": "text", "text": ""}, {"type": "input_audio", "x": [0]}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [{"id": "1", "type": "function", "x": 1}],
        },
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a" : 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "function", "name": "f", "content": "x"},
    ]
    body = chat(messages=messages)
    assert sent(body)["messages"] == messages
    assert (body.asked.messages, body.asked.images, body.asked.tools) == (7, 1, 0)


@pytest.mark.parametrize("prompt", ["", "Hi", ["a", ""], [1, 2, 0], [[1], [2, 3]]])
def test_every_kind_of_prompt_survives(prompt: Any) -> None:
    assert sent(text(prompt=prompt, echo=False, suffix=None, best_of=1)) == {
        "model": "small-1",
        "prompt": prompt,
        "echo": False,
        "suffix": None,
        "best_of": 1,
    }


def test_bytes_that_are_no_ascii_are_sent_as_the_same_text() -> None:
    raw = '{"model":"auto","messages":[{"role":"user","content":"é\\u00e9🙂\\ud83d\\ude42"}]}'.encode()
    assert sent(read_body("chat/completions", raw))["messages"][0]["content"] == "éé🙂🙂"


def test_what_looks_like_an_escaped_nul_is_none() -> None:
    assert sent(chat(user="\\u0000"))["user"] == "\\u0000"


def test_nesting_as_deep_as_allowed_is_read() -> None:
    nested: Any = 1
    for _ in range(63):
        nested = [nested]
    assert sent(chat(vendor=nested))["vendor"] == nested


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert sent(chat(vendor=[[]] * 1000))["vendor"] == [[]] * 1000


def test_brackets_in_a_string_are_not_deep() -> None:
    assert sent(chat(user="[" * 1000))["user"] == "[" * 1000


# -- what is asked of the backend -------------------------------------------------------------------------------------


def test_a_key_that_stands_twice_is_sent_as_it_was_judged() -> None:
    raw = (
        b'{"model":"a","model":"b","n":128,"n":1,"max_tokens":100000,"max_tokens":5,'
        b'"messages":[{"role":"user","content":"first"}],"messages":[{"role":"user","content":"x","content":"last"}],'
        b'"stream":true,"stream":false,"logprobs":true,"logprobs":null}'
    )
    body = read_body("chat/completions", raw)
    assert (body.asked.model, body.asked.choices, body.asked.max_tokens, body.asked.stream) == ("b", 1, 5, False)
    rewritten = b"".join(body.for_backend("small-1", scored=False))
    for name in (b'"model"', b'"n"', b'"max_tokens"', b'"messages"', b'"content"'):
        assert rewritten.count(name) == 1
    assert b"first" not in rewritten
    assert json.loads(rewritten) == {
        "model": "small-1",
        "n": 1,
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "last"}],
    }


def test_the_first_of_two_keys_is_not_judged() -> None:
    assert read_body("chat/completions", b'{"model":7,"model":"b","messages":[{"role":"user","content":"x"}]}')
    assert refusal("chat/completions", b'{"model":"b","messages":[{"role":"user","content":"x"}],"model":7}')


@pytest.mark.parametrize(
    ("options", "expected", "wanted", "everywhere"),
    [
        (None, {"include_usage": True}, False, False),
        ({}, {"include_usage": True}, False, False),
        ({"include_usage": None}, {"include_usage": True}, False, False),
        ({"include_usage": False}, {"include_usage": True}, False, False),
        ({"include_usage": True}, {"include_usage": True}, True, False),
        (
            {"include_usage": True, "continuous_usage_stats": True, "vendor": 0},
            {"include_usage": True, "continuous_usage_stats": True, "vendor": 0},
            True,
            True,
        ),
    ],
)
def test_a_stream_always_asks_for_usage_and_knows_whether_the_client_did(
    options: Json | None, expected: Json, wanted: bool, everywhere: bool
) -> None:
    body = chat(stream=True, stream_options=options)
    assert sent(body) == {"model": "small-1", "stream": True, "stream_options": expected, "messages": SAID}
    assert (body.asked.usage_wanted, body.asked.usage_everywhere) == (wanted, everywhere)


@pytest.mark.parametrize("stream", [None, False])
def test_a_whole_answer_is_asked_for_without_a_word_about_streams(stream: bool | None) -> None:
    body = chat(stream=stream, stream_options=None)
    assert not body.asked.stream
    assert sent(body) == {"model": "small-1", "messages": SAID}


@pytest.mark.parametrize(
    ("asked", "scored", "expected"),
    [
        ({}, False, {}),
        ({"logprobs": None, "top_logprobs": None}, False, {}),
        ({"logprobs": False}, False, {}),
        ({}, True, {"logprobs": True, "top_logprobs": 1}),
        ({"logprobs": True}, False, {"logprobs": True}),
        ({"logprobs": True, "top_logprobs": 0}, False, {"logprobs": True}),
        ({"logprobs": True}, True, {"logprobs": True, "top_logprobs": 1}),
        ({"logprobs": True, "top_logprobs": 5}, True, {"logprobs": True, "top_logprobs": 5}),
        ({"logprobs": True, "top_logprobs": 5}, False, {"logprobs": True, "top_logprobs": 5}),
    ],
)
def test_a_chat_asks_for_as_many_scores_as_anybody_wants(asked: Json, scored: bool, expected: Json) -> None:
    found = sent(chat(**asked), scored=scored)
    assert {name: found[name] for name in ("logprobs", "top_logprobs") if name in found} == expected


@pytest.mark.parametrize(
    ("asked", "scored", "expected"),
    [
        ({}, False, None),
        ({}, True, 1),
        ({"logprobs": 0}, False, 0),
        ({"logprobs": 0}, True, 1),
        ({"logprobs": 4}, True, 4),
    ],
)
def test_a_completion_asks_for_as_many_scores_as_anybody_wants(asked: Json, scored: bool, expected: int | None) -> None:
    found = sent(text(**asked), scored=scored)
    assert found.get("logprobs") == expected
    assert "top_logprobs" not in found


def test_the_name_of_a_model_is_written_as_json() -> None:
    assert json.loads(b"".join(chat().for_backend('a"b\\c/é', scored=True)))["model"] == 'a"b\\c/é'


LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"max_tokens": 50}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 700}, {"max_tokens": 50}),
        ({"max_tokens": None}, {"max_tokens": 50}),
        ({"max_completion_tokens": 700}, {"max_completion_tokens": 50}),
        ({"max_completion_tokens": 7, "max_tokens": 700}, {"max_completion_tokens": 7, "max_tokens": 7}),
        ({"max_completion_tokens": None, "max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 7}),
        # llama.cpp heeds its own name first, so a client could go past any other.
        ({"max_tokens": 7, "n_predict": -1}, {"max_tokens": 7, "n_predict": 7}),
        ({"n_predict": 7}, {"n_predict": 7}),
        ({"n_predict": "x"}, {"n_predict": 50}),
    ],
)
def test_a_limit_of_ours_stands_under_every_name_and_is_never_more_than_asked(asked: Json, expected: Json) -> None:
    body = chat(**asked)
    found = sent(body, most_tokens=50)
    assert {name: found[name] for name in LIMITS if name in found} == expected
    assert set(expected.values()) == {body.asked.limited_to(50)}
    assert sent(body) == {"model": "small-1", "messages": SAID, **asked}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # What OpenAI and vLLM take for nothing; llama.cpp would take the whole window.
        ({}, {"max_tokens": 16}),
        ({"max_tokens": None}, {"max_tokens": 50}),
        ({"max_tokens": 700}, {"max_tokens": 50}),
        ({"max_completion_tokens": 700}, {"max_tokens": 16, "max_completion_tokens": 16}),
        ({"n_predict": 7}, {"max_tokens": 7, "n_predict": 7}),
    ],
)
def test_a_completion_that_names_no_limit_gets_no_more_than_it_would(asked: Json, expected: Json) -> None:
    body = text(**asked)
    found = sent(body, most_tokens=50)
    assert {name: found[name] for name in LIMITS if name in found} == expected
    assert set(expected.values()) == {body.asked.limited_to(50)}
    assert sent(body) == {"model": "small-1", "prompt": "Hi", **asked}


@pytest.mark.parametrize("own", [{}, {"priority": 0}, {"priority": -5}, {"priority": None}, {"priority": "high"}])
def test_the_clients_priority_passes_unless_there_is_one_of_ours(own: Json) -> None:
    assert sent(chat(**own)) == {"model": "small-1", **own, "messages": SAID}
    assert sent(chat(**own), priority=-3) == {"model": "small-1", "priority": -3, "messages": SAID}


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False, "continuous_usage_stats": False, "vendor": 0}])
def test_a_metered_stream_asks_for_usage_in_every_event(options: Json | None) -> None:
    body = chat(stream=True, stream_options=options)
    expected = {**(options or {}), "include_usage": True, "continuous_usage_stats": True}
    assert sent(body, metered=True)["stream_options"] == expected
    assert not body.asked.usage_everywhere
    assert "stream_options" not in sent(chat(), metered=True)


# -- facts ------------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_chat() -> None:
    body = chat(n=3, max_tokens=10, max_completion_tokens=7, tools=[{"type": "function"}], logprobs=True, stream=True)
    asked = body.asked
    assert (asked.endpoint, asked.model, asked.choices, asked.max_tokens) == ("chat/completions", "auto", 3, 7)
    assert (asked.messages, asked.tools, asked.logprobs, asked.stream) == (1, 1, 0, True)
    assert asked.prompt_bytes > 100


@pytest.mark.parametrize(
    ("prompt", "choices", "chars", "tokens"),
    [
        ("Héllo", 2, (5,), ()),
        (["a", "bcd"], 4, (1, 3), ()),
        ([7, 8, 9], 2, (), (3,)),
        ([[7], [8, 9]], 4, (), (1, 2)),
        ("", 2, (0,), ()),
    ],
)
def test_the_choices_of_a_completion_and_what_is_echoed(
    prompt: Any, choices: int, chars: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    asked = text(prompt=prompt, n=2, echo=True).asked
    assert (asked.choices, asked.echoed_chars, asked.echoed_tokens) == (choices, chars, tokens)
    quiet = text(prompt=prompt, n=2).asked
    assert (quiet.choices, quiet.echoed_chars, quiet.echoed_tokens) == (choices, (), ())


def test_the_end_user_is_the_clients_word_or_a_digest_of_a_long_one() -> None:
    long = "ü" * 100_000
    assert [chat(user=given).asked.user for given in (None, "", "me", "x" * 256)] == [None, None, "me", "x" * 256]
    assert chat(user=long).asked.user == "sha256:" + hashlib.sha256(long.encode()).hexdigest()
    assert sent(chat(user=long))["user"] == long


@pytest.mark.parametrize(
    ("prompt", "tokens", "size_bytes", "prompts"),
    [("Grüße", None, 7, 1), (["a", "é", ""], None, 3, 3), ([7, 8, 9], 3, 0, 1), ([[7], [8, 9]], 3, 0, 2)],
)
def test_a_prompt_of_token_ids_is_counted_and_one_of_text_measured(
    prompt: Any, tokens: int | None, size_bytes: int, prompts: int
) -> None:
    asked = text(prompt=prompt, n=3).asked
    assert (asked.prompt_tokens, asked.text_bytes, asked.messages) == (tokens, size_bytes, prompts)


def test_what_a_server_may_generate_for_a_choice_is_counted() -> None:
    asked = text(prompt=["a", "b"], n=2, best_of=5).asked
    assert (asked.choices, asked.sequences) == (4, 10)
    assert chat(n=3).asked.sequences == 3


def test_many_choices_of_many_prompts_are_counted_and_not_written_out() -> None:
    asked = text(prompt=[""] * 10_000, n=128, echo=True).asked
    assert asked.choices == 1_280_000
    assert len(asked.echoed_chars) == 10_000


# -- anything at all --------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 3), st.integers(), st.sampled_from([2**31, 2**63, 2**64, 10**30]), st.floats(allow_nan=False)
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["role", "content", "type", "text", "function", "name", "url"]), st.text(max_size=3)
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
names = st.one_of(
    st.sampled_from(sorted(OURS | {"messages", "prompt", "n", "tools", "stop", "echo", "max_tokens", "logit_bias"})),
    st.text(max_size=4),
)
good = st.sampled_from([CHAT, TEXT, CHAT | TEXT, {}])
endpoints = st.sampled_from(get_args(Endpoint))


def read_or_refused(endpoint: Endpoint, raw: bytes) -> Body | None:
    """Read a body; of a refusal, see that it can be told."""
    try:
        return read_body(endpoint, raw)
    except Refusal as raised:
        refused = raised
    assert refused.status == 400
    assert json.loads(refused.body())["error"]["code"] == refused.code
    return None


@given(
    endpoints, st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda one: one.encode("utf-8", "replace")))
)
def test_any_bytes_are_read_or_refused(endpoint: Endpoint, raw: bytes) -> None:
    read_or_refused(endpoint, raw)


@given(endpoints, values)
def test_any_json_is_read_or_refused(endpoint: Endpoint, value: Any) -> None:
    read_or_refused(endpoint, json.dumps(value).encode())


@given(endpoints, good, st.dictionaries(names, values, max_size=3), st.booleans(), st.text(min_size=1, max_size=5))
def test_what_is_read_goes_out_as_json_with_only_the_model_replaced(
    endpoint: Endpoint, base: Json, fields: Json, scored: bool, model: str
) -> None:
    asked = base | fields
    body = read_or_refused(endpoint, json.dumps(asked).encode())
    if body is None:
        return
    found = json.loads(b"".join(body.for_backend(model, scored=scored)))
    assert found["model"] == model
    assert {key: value for key, value in found.items() if key not in OURS} == {
        key: value for key, value in asked.items() if key not in OURS
    }
    assert bool(found.get("stream")) == body.asked.stream == bool(asked.get("stream"))
    assert not scored or found["logprobs"]


@given(st.binary(max_size=60))
def test_any_damage_to_a_good_body_is_read_or_refused(noise: bytes) -> None:
    raw = json.dumps(CHAT | KEPT).encode()
    for at in (0, 1, len(raw) // 2, len(raw) - 1, len(raw)):
        read_or_refused("chat/completions", raw[:at] + noise + raw[at:])
