"""Does the official client work against a gateway as if it were OpenAI's own server? Unchanged, sync and async."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from tests.running import ALICE, BOB, NARROW, Stack

TEXT = "The capital of France is Paris. It"  # the eight tokens of the scripted answer
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "strict": True,
            "parameters": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"zulu": {"type": "string"}, "alpha": {"type": "integer"}, "city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def client_of(stack: Stack, key: str = ALICE, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{stack.gateway.url}/v1", api_key=key, timeout=20, **options)


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    with client_of(stack) as client:
        yield client


def wire_events(client: OpenAI, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed chat as they came, unknown fields too."""
    answer = client.chat.completions.create(messages=ASK, stream=True, **fields)
    return [chunk.to_dict() for chunk in answer]


# -- chat: whole and streamed -----------------------------------------------------------------------------------------


def test_a_whole_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="auto", messages=ASK)
    assert isinstance(answer, ChatCompletion)
    assert answer.object == "chat.completion"
    assert answer.model == Stack.SMALL
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is None, "asked for by the gateway, not by the client"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (37, 9, 46)


@pytest.mark.parametrize("model", ["auto", "gpt-4o", "small", Stack.SMALL])
def test_a_streamed_chat_by_every_kind_of_name(client: OpenAI, model: str) -> None:
    chunks = list(client.chat.completions.create(model=model, messages=ASK, stream=True))
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.model for chunk in chunks} == {Stack.SMALL}
    assert all(len(chunk.choices) == 1 for chunk in chunks), "a usage chunk nobody asked for"
    assert all(chunk.usage is None for chunk in chunks)
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.choices[0].logprobs is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT


def test_fields_that_must_be_there_though_null_are_there(client: OpenAI) -> None:
    for chunk in wire_events(client, model="auto"):
        (choice,) = chunk["choices"]
        assert choice["logprobs"] is None
        assert "finish_reason" in choice
    whole = client.chat.completions.create(model="auto", messages=ASK).to_dict()
    assert '"refusal": null' in json.dumps(whole)


@pytest.mark.parametrize("model", ["auto", "small"])
def test_usage_comes_last_with_empty_choices_when_asked_for(client: OpenAI, model: str) -> None:
    chunks = wire_events(client, model=model, stream_options={"include_usage": True})
    assert [len(chunk["choices"]) for chunk in chunks] == [1] * (len(chunks) - 1) + [0]
    assert chunks[-1]["usage"]["total_tokens"] == 46
    assert chunks[-1]["id"] == chunks[0]["id"]
    assert not any(chunk.get("usage") for chunk in chunks[:-1])


@pytest.mark.parametrize("model", ["auto", "small"])
def test_usage_that_was_declined_does_not_come(client: OpenAI, model: str) -> None:
    chunks = wire_events(client, model=model, stream_options={"include_usage": False})
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("top", [None, 0, 1, 3, 20])
def test_exactly_the_logprobs_that_were_asked_for(client: OpenAI, model: str, top: int | None) -> None:
    asked = {} if top is None else {"top_logprobs": top}
    answer = client.chat.completions.create(model=model, messages=ASK, logprobs=True, **asked)  # type: ignore[call-overload]
    content = answer.choices[0].logprobs.content
    assert [one.token for one in content] == [
        "The",
        " capital",
        " of",
        " France",
        " is",
        " Paris",
        ".",
        " It",
        "<|im_end|>",
    ]
    assert {len(one.top_logprobs) for one in content} == {top or 0}
    chunks = client.chat.completions.create(model=model, messages=ASK, logprobs=True, stream=True, **asked)  # type: ignore[call-overload]
    scored = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [one.content[0].token for one in scored] == [one.token for one in content]
    assert {len(one.content[0].top_logprobs) for one in scored} == {top or 0}


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_that_were_declined_do_not_come(client: OpenAI, model: str, stream: bool) -> None:
    if stream:
        choices = [chunk["choices"][0] for chunk in wire_events(client, model=model, logprobs=False)]
    else:
        answer = client.chat.completions.create(model=model, messages=ASK, logprobs=False)
        choices = [answer.to_dict()["choices"][0]]  # type: ignore[index]
    assert all(choice["logprobs"] is None for choice in choices)


@pytest.mark.parametrize("model", ["auto", "small"])
def test_two_choices(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=ASK, n=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, TEXT), (1, TEXT)]
    said = {0: "", 1: ""}
    finished = []
    for chunk in client.chat.completions.create(model=model, messages=ASK, n=2, stream=True):
        for choice in chunk.choices:
            assert choice.logprobs is None
            said[choice.index] += choice.delta.content or ""
            finished += [choice.index] if choice.finish_reason else []
    assert said == {0: TEXT, 1: TEXT}
    assert sorted(finished) == [0, 1]


def test_max_tokens_cuts(client: OpenAI) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = client.chat.completions.create(model="auto", messages=ASK, **limit)  # type: ignore[call-overload]
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("The capital of", "length")


def test_the_client_s_own_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="auto", messages=ASK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") == 9  # the first has the role and no text
    assert kinds.count("content.done") == 1
    assert final.choices[0].message.content == TEXT


# -- what reaches the backend -----------------------------------------------------------------------------------------


def test_every_parameter_passes_unchanged(client: OpenAI, stack: Stack) -> None:
    given: dict[str, Any] = {
        "stop": ["\n\n", "END"],
        "seed": 42,
        "temperature": 0,
        "top_p": 1.0,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.0,
        "logit_bias": {"50256": -100},
        "user": "someone",
        "max_completion_tokens": 6,
        "metadata": {"purpose": "a test"},
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "strict": True, "schema": TOOLS[0]["function"]["parameters"]},
        },
        "reasoning_effort": "low",
    }
    unknown = {
        "top_k": 0,
        "min_p": 0.0,
        "priority": -1,
        "chat_template_kwargs": {"enable_thinking": False, "none": None},
        "guided_regex": None,
        "vendor": [1, 2.5, "ü", {"deep": [[]]}],
        "big": 2**63,
    }
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="auto",
            messages=ASK,
            extra_body=unknown,
            **given,
            stream=stream,
        )
        if stream:
            list(answer)
    for request in stack.small.requests():
        body = request["body"]
        assert body["model"] == Stack.SMALL
        assert body["messages"] == ASK
        assert {name: body[name] for name in (*given, *unknown)} == {**given, **unknown}
        # Order within a schema decides what a constrained model writes first.
        assert list(body["tools"][0]["function"]["parameters"]["properties"]) == ["zulu", "alpha", "city"]
        assert body["logprobs"] is True, "the gateway's own"


def test_images_and_other_parts_pass_unchanged(client: OpenAI, stack: Stack) -> None:
    pixel = "data:image/png;base64,iVBORw0KGgo" + "A" * 60_000 + "=="
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief.", "name": "ops"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": pixel, "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
    ]
    answer = client.chat.completions.create(model="auto", messages=messages)
    assert answer.choices[0].message.content == TEXT
    assert stack.small.requests()[-1]["body"]["messages"] == messages


def test_nothing_of_the_client_s_own_head_goes_upstream_but_the_trace(client: OpenAI, stack: Stack) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.chat.completions.create(
        model="auto",
        messages=ASK,
        extra_headers={
            "traceparent": trace,
            "cookie": "session=1",
            "x-api-key": ALICE,
            "x-secret": "s",
            "te": "trailers",
        },
    )
    headers = stack.small.requests()[-1]["headers"]
    assert headers["traceparent"] == trace
    assert set(headers) <= {"host", "content-type", "content-length", "accept-encoding", "traceparent"}, headers
    assert ALICE not in str(headers)


# -- tools, structured answers, and answers that no script describes --------------------------------------------------


def head_of(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-7", "object": kind, "created": 1, "model": "reciter-9b"}


def called(index: int, call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    call: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
    if call_id is not None:
        call |= {"id": call_id, "type": "function"}
        call["function"]["name"] = name
    return call


def token(text: str, logprob: float = -0.01) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode()),
        "top_logprobs": [{"token": text, "logprob": logprob, "bytes": None}],
    }


@pytest.mark.parametrize("model", ["told", "reciter"])
def test_parallel_tool_calls_whole(client: OpenAI, stack: Stack, model: str) -> None:
    calls = [
        {
            "id": f"call-{city}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'},
        }
        for city in ("Oslo", "Rome")
    ]
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls, "vendor": {"a": 0}}
    scores = {"content": [token("x")] * 4}
    choice = {"index": 0, "message": message, "logprobs": scores, "finish_reason": "tool_calls", "stop_reason": None}
    stack.reciter.recite(
        whole={
            **head_of("chat.completion"),
            "choices": [choice],
            "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9},
            "vendor": [None, 0],
        }
    )
    answer = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=True
    )
    found = answer.choices[0].message.tool_calls
    assert found is not None
    assert [(one.id, one.function.arguments) for one in found if one.type == "function"] == [
        ("call-Oslo", '{"city": "Oslo"}'),
        ("call-Rome", '{"city": "Rome"}'),
    ]
    assert answer.choices[0].finish_reason == "tool_calls"
    wire: Any = answer.to_dict()
    assert wire["vendor"] == [None, 0], "unknown fields of an answer come back"
    assert wire["choices"][0]["message"]["vendor"] == {"a": 0}
    if model == "told":
        assert wire["choices"][0]["logprobs"] is None
    (body,) = stack.reciter.bodies
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == (TOOLS, "required", True)


@pytest.mark.parametrize("model", ["told", "reciter"])
def test_parallel_tool_calls_streamed(client: OpenAI, stack: Stack, model: str) -> None:
    def event(delta: dict[str, Any], finish: str | None = None, scores: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": scores, "finish_reason": finish}
        return {**head_of("chat.completion.chunk"), "choices": [choice], "vendor": 0}

    scored = model == "told"
    deltas = [
        called(0, "call-1", "get_weather", ""),
        called(0, None, None, '{"ci'),
        called(0, None, None, 'ty": "Oslo"}'),
        called(1, "call-2", "get_weather", '{"city": "Ro'),
        called(1, None, None, 'me"}'),
    ]
    stack.reciter.recite(
        stream=[
            event({"role": "assistant", "content": None}),
            *(event({"tool_calls": [one]}, None, {"content": [token("x")]} if scored else None) for one in deltas),
            event({}, "tool_calls"),
            {
                **head_of("chat.completion.chunk"),
                "choices": [],
                "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
            },
            "[DONE]",
        ]
    )
    chunks = wire_events(client, model=model, tools=TOOLS)
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)
    assert all(chunk["vendor"] == 0 for chunk in chunks)
    got = [one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert got == deltas
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    with client.chat.completions.stream(model=model, messages=ASK, tools=TOOLS) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert calls is not None
    assert [one.function.arguments for one in calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']


def test_a_structured_answer_parses(client: OpenAI, stack: Stack) -> None:
    stack.small.script(pieces=['{"city":', ' "Paris"', "}"])
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "object"}}}
    answer = client.chat.completions.create(model="auto", messages=ASK, response_format=wanted)
    assert json.loads(answer.choices[0].message.content or "") == {"city": "Paris"}
    assert stack.small.requests()[-1]["body"]["response_format"] == wanted


def test_reasoning_fields_of_other_servers_come_back(client: OpenAI, stack: Stack) -> None:
    def event(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {
            **head_of("chat.completion.chunk"),
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        }

    said = [{"role": "assistant", "content": ""}, {"reasoning": "Hm"}, {"reasoning_content": "m"}, {"content": "Yes"}]
    stack.reciter.recite(stream=[*map(event, said), event({}, "stop"), "[DONE]"])
    chunks = wire_events(client, model="reciter")
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [*said, {}]


# -- text completions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("Once", 1), (["Once", "Twice"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_completions_of_every_prompt(client: OpenAI, stack: Stack, model: str, prompt: Any, texts: int) -> None:
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=4)
    assert answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == ["The capital of France"] * texts
    assert [choice.index for choice in answer.choices] == list(range(texts))
    assert all(choice.logprobs is None for choice in answer.choices)
    assert all(choice.finish_reason == "length" for choice in answer.choices)
    assert stack.small.requests()[-1]["body"]["prompt"] == prompt
    said = dict.fromkeys(range(texts), "")
    for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=4, stream=True):
        assert chunk.usage is None
        for choice in chunk.choices:
            assert choice.text is not None, "a text completion's chunk never carries null text"
            assert choice.logprobs is None
            said[choice.index] += choice.text
    assert set(said.values()) == {"The capital of France"}


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_completions_with_logprobs(client: OpenAI, model: str, wanted: int) -> None:
    answer = client.completions.create(model=model, prompt="Once", logprobs=wanted, max_tokens=3)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens == ["The", " capital", " of"]
    assert scores.token_logprobs == [-0.05] * 3
    assert scores.top_logprobs is not None
    assert {len(top) for top in scores.top_logprobs} == {max(1, wanted)}


def test_completions_with_usage(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(model="auto", prompt="Once", stream=True, stream_options={"include_usage": True})
    )
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


# -- models -----------------------------------------------------------------------------------------------------------


def test_models_are_listed(client: OpenAI) -> None:
    models = client.models.list().data
    names = {model.id for model in models}
    assert {"auto", "gpt-4o", "small", "medium", "large", Stack.SMALL, Stack.MEDIUM, Stack.LARGE} <= names
    assert all(model.object == "model" and model.owned_by and model.created for model in models)


def test_a_key_sees_and_gets_only_what_is_permitted(stack: Stack) -> None:
    with client_of(stack, NARROW) as client:
        names = {model.id for model in client.models.list()}
        assert {"auto", "small"} <= names
        assert not names & {"medium", "large", "reciter", Stack.LARGE}
        with pytest.raises(openai.NotFoundError) as hidden:
            client.chat.completions.create(model="large", messages=ASK)
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="larch", messages=ASK)
        assert hidden.value.message.replace("large", "larch") == missing.value.message
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("large")
    assert stack.large.seen == 0


def test_a_model_with_a_slash_is_found_plain_and_encoded(client: OpenAI, stack: Stack) -> None:
    assert client.models.retrieve(Stack.SMALL).id == Stack.SMALL
    for path in ("tiny/small-1b", "tiny%2Fsmall-1b", "tiny%2fsmall-1b"):
        reply = stack.gateway.get(f"/v1/models/{path}", ALICE)
        assert (reply.status, reply.json()["id"]) == (200, Stack.SMALL), path
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tiny/other")
    assert caught.value.code == "model_not_found"


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_key_is_an_authentication_error(stack: Stack, stream: bool) -> None:
    with client_of(stack, "tw-wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model="auto", messages=ASK, stream=stream)
    assert caught.value.response.headers["www-authenticate"].startswith("Bearer")
    assert caught.value.code == "invalid_api_key"
    assert "tw-wrong" not in caught.value.response.text


def test_a_key_in_the_other_header(stack: Stack) -> None:
    body = {"model": "auto", "messages": ASK}
    assert stack.gateway.post("/v1/chat/completions", body, None, x_api_key=ALICE).status == 200
    for scheme in ("bearer", "BEARER", "BeArEr"):
        assert stack.gateway.post("/v1/chat/completions", body, None, authorization=f"{scheme} {ALICE}").status == 200


def test_a_refused_body_is_a_bad_request(client: OpenAI, stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="auto", messages=[])
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="auto", messages=ASK, temperature=7)
    assert caught.value.param == "temperature"
    assert stack.small.seen == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_final_failure_is_not_retried(client: OpenAI, stack: Stack, stream: bool) -> None:
    for upstream in stack.upstreams:
        upstream.script(status=500)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="auto", messages=ASK, stream=stream)
    assert caught.value.status_code == 502
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert [upstream.seen for upstream in stack.upstreams] == [1, 1, 1]


def test_a_backend_s_refusal_is_the_client_s_to_mend(client: OpenAI, stack: Stack) -> None:
    error: dict[str, Any] = {
        "message": "tools need --enable-auto-tool-choice",
        "type": "BadRequestError",
        "param": "tools",
        "code": 400,
    }
    for upstream in stack.upstreams:
        upstream.script(status=400, body=json.dumps({"error": error}))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="auto", messages=ASK)
    assert error["message"] in caught.value.message
    assert (caught.value.param, caught.value.code) == ("tools", None), "a code is text or null"


def test_a_full_backend_asks_to_come_back(stack: Stack) -> None:
    for upstream in stack.upstreams:
        upstream.script(status=429, headers={"retry-after": "7"})
    with client_of(stack, max_retries=0) as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="auto", messages=ASK)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "7"
    assert "x-should-retry" not in caught.value.response.headers
    for upstream in stack.upstreams:
        upstream.script(status=503, headers={"retry-after": "1"}, times=1)
    with client_of(stack, max_retries=1) as client:
        assert client.chat.completions.create(model="auto", messages=ASK).choices[0].message.content == TEXT


def test_a_stream_that_breaks_is_an_error_in_the_client(client: OpenAI, stack: Stack) -> None:
    stack.small.script(fail="reset", fail_after=6, interval_ms=5)
    said = ""

    def listen() -> None:
        nonlocal said
        for chunk in client.chat.completions.create(model="auto", messages=ASK, stream=True):
            assert chunk.choices[0].finish_reason is None
            said += chunk.choices[0].delta.content or ""

    with pytest.raises(openai.APIError) as caught:
        listen()
    assert TEXT.startswith(said)
    assert said
    assert caught.value.code == "stream_broken"


# -- what the client learns -------------------------------------------------------------------------------------------


def test_headers_say_who_answered(client: OpenAI, stack: Stack) -> None:
    stack.small.script(logprob=-2)
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=ASK, extra_headers={"x-request-id": "mine-1"}
    )
    headers = raw.headers
    assert headers["x-request-id"] == "mine-1"
    assert headers["x-tierway-exchange-id"].startswith("tw")
    assert headers["x-tierway-tier"] == "medium"
    assert headers["x-tierway-model"] == Stack.MEDIUM
    assert headers["x-tierway-attempts"] == "2"
    assert headers["x-tierway-confidence"] == "0.9512"
    assert headers["x-tierway-confidence-kind"] == "raw"
    assert headers["x-tierway-cost-usd"] == "0.0000066"  # 37 and 9 tokens at 0.02/0.04, and again at 0.10/0.20
    assert headers["x-tierway-config"]
    assert "x-tierway-degraded" not in headers
    assert raw.parse().choices[0].message.content == TEXT


def test_an_insane_request_id_is_replaced(client: OpenAI) -> None:
    for given in ("has space", "x" * 129, 'quote"s', "semi;colon"):
        raw = client.models.with_raw_response.list(extra_headers={"x-request-id": given})
        assert raw.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("stream", [False, True])
def test_the_decision_is_for_the_key_that_asked(client: OpenAI, stack: Stack, stream: bool) -> None:
    stack.small.script(logprob=-2)
    raw: Any = client.chat.completions.with_raw_response.create(model="auto", messages=ASK, stream=stream)
    if stream:
        list(raw.parse())
    exchange_id = raw.headers["x-tierway-exchange-id"]
    decision: Any = client.get(f"/requests/{exchange_id}", cast_to=object)
    assert decision["object"] == "tierway.decision"
    assert decision["exchange_id"] == exchange_id
    assert (decision["key"], decision["ending"], decision["tier"]) == ("alice", "answered", "medium")
    assert [(one["tier"], one["outcome"]) for one in decision["attempts"]] == [
        ("small", "doubted"),
        ("medium", "accepted"),
    ]
    assert float(decision["cost_usd"]) == pytest.approx(sum(float(one["cost_usd"]) for one in decision["attempts"]))
    assert all(one["ended_s"] >= one["started_s"] for one in decision["attempts"])
    assert "capital" not in json.dumps(decision), "never a word of prompt or answer"
    for key in (BOB, NARROW):
        with client_of(stack, key) as other, pytest.raises(openai.NotFoundError) as hidden:
            other.get(f"/requests/{exchange_id}", cast_to=object)
        assert hidden.value.code == "exchange_not_found"
    with client_of(stack, "tw-wrong") as other, pytest.raises(openai.AuthenticationError):
        other.get(f"/requests/{exchange_id}", cast_to=object)


@pytest.mark.parametrize("model", ["auto", "small"])
def test_a_comment_at_the_end_for_those_who_ask(stack: Stack, model: str) -> None:
    reply = stack.gateway.chat(model, {"x-tierway-include": "comment"}, stream=True)
    comment = reply.events[-2]
    assert reply.events[-1] == "[DONE]"
    assert comment.startswith(": tierway ")
    note = json.loads(comment.removeprefix(": tierway "))
    assert note["exchange_id"] == reply.headers["x-tierway-exchange-id"]
    assert (note["tier"], note["cost_usd"], note["attempts"]) == ("small", "0.0000011", 1)
    assert ": tierway" not in stack.gateway.chat(model, stream=True).body.decode()


@pytest.mark.parametrize("model", ["auto", "small"])
def test_a_note_in_the_usage_chunk_for_those_who_ask(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ASK,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-tierway-include": "usage"},
    )
    last = [chunk.to_dict() for chunk in answer][-1]
    note: Any = last["tierway"]
    assert last["choices"] == []
    assert (note["tier"], note["model"], note["degraded"]) == ("small", Stack.SMALL, False)


def test_comments_do_not_disturb_the_client(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="auto", messages=ASK, stream=True, extra_headers={"x-tierway-include": "comment"}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == TEXT


# -- the same, asynchronously -----------------------------------------------------------------------------------------


def test_the_async_client(stack: Stack) -> None:
    async def play() -> None:
        async with AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key=ALICE, timeout=20) as client:
            whole = await client.chat.completions.create(model="auto", messages=ASK)
            assert whole.choices[0].message.content == TEXT
            stream = await client.chat.completions.create(model="auto", messages=ASK, stream=True)
            said = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(said) == TEXT
            text = await client.completions.create(model="auto", prompt=["Once", "Twice"], max_tokens=2)
            assert [choice.text for choice in text.choices] == ["The capital", "The capital"]
            assert (await client.models.retrieve(Stack.SMALL)).id == Stack.SMALL
            assert "auto" in [model.id async for model in client.models.list()]
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="gpt-17", messages=ASK)
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model="auto", messages=[])

            async def one(number: int) -> str:
                answer = await client.chat.completions.create(
                    model="auto", messages=ASK, stream=True, extra_headers={"x-request-id": f"n-{number}"}
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            assert await asyncio.gather(*map(one, range(30))) == [TEXT] * 30

    asyncio.run(play())


def test_an_async_client_that_leaves_frees_the_backend(stack: Stack) -> None:
    stack.small.script(interval_ms=50, tokens=1000)

    async def play() -> None:
        async with AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key=ALICE, timeout=20) as client:
            stream = await client.chat.completions.create(model="small", messages=ASK, stream=True)
            async for _ in stream:
                break
            await stream.close()
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=0.2, max_retries=0).chat.completions.create(
                    model="small", messages=ASK
                )

    asyncio.run(play())
    assert stack.small.idle(1.0)
    assert stack.small.state()["aborted"] == 2
