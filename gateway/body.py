"""What does the client ask for? The bytes of a request in, a checked `Body` out, or a refusal that names the field.

The body is decoded once. What was judged here is what a backend gets: its JSON is written anew from the decoded
values, so a key that stands twice cannot mean one thing here and another there, and fields that tierway does not know
survive. Nothing here waits or knows of HTTP; large bodies are read by the same function in a process of their own.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from backends.backend import Endpoint
from gateway.errors import Refusal

_DEEPEST = 64
_LONGEST_NAME_CHARS = 256

_T = TypeVar("_T")

_Text = str | None
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
_Flag = bool | None


class _StreamOptions(msgspec.Struct):
    include_usage: _Flag = None
    continuous_usage_stats: _Flag = None


class _ImageUrl(msgspec.Struct):
    url: str


class _Part(msgspec.Struct):
    type: str
    text: _Text = None
    image_url: _ImageUrl | str | None = None


class _Function(msgspec.Struct):
    name: str


class _Tool(msgspec.Struct):
    type: str
    function: _Function | None = None


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    id: _Text = None
    type: _Text = None
    function: _CalledFunction | None = None


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    name: _Text = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: _Text = None


class _ResponseFormat(msgspec.Struct):
    type: str
    json_schema: dict[str, object] | None = None


class _Shared(msgspec.Struct):
    """The parameters that both endpoints have."""

    model: Annotated[str, Meta(min_length=1, max_length=_LONGEST_NAME_CHARS)]
    stream: _Flag = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Count = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    user: _Text = None


class _Chat(_Shared, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    max_completion_tokens: _Count = None
    logprobs: _Flag = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: _Flag = None
    response_format: _ResponseFormat | None = None
    metadata: dict[str, object] | None = None


class _Completion(_Shared, kw_only=True):
    prompt: Annotated[str, Meta()] | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: _Flag = None
    suffix: _Text = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a request.

    `choices` counts the answers wanted; `logprobs` is the number of alternatives a token that the client asked for,
    None where it asked for no log-probabilities. `usage_wanted` and `usage_everywhere` are OpenAI's `include_usage` and
    vLLM's `continuous_usage_stats`. `echoed_chars` and `echoed_tokens` say how much of each answer is
    the prompt repeated: characters for text prompts, tokens for token ids, by prompt.
    """

    endpoint: Endpoint
    model: str
    stream: bool = False
    usage_wanted: bool = False
    usage_everywhere: bool = False
    choices: int = 1
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_bytes: int = 0
    messages: int = 0
    tools: int = 0
    images: int = 0
    echoed_chars: tuple[int, ...] = ()
    echoed_tokens: tuple[int, ...] = ()


class Body(msgspec.Struct, frozen=True):
    """A request that was read: its facts, and the JSON of every field that goes to a backend as it is.

    `rest` is a JSON object without its opening brace: `"messages":[…]}`, or `}` alone.
    """

    asked: Asked
    rest: bytes
    stream_options: bytes | None = None

    def for_backend(self, model: str, *, scored: bool) -> tuple[bytes, bytes]:
        """Return the JSON for one call, in two pieces: the client's request, asked of `model`.

        With `scored` log-probabilities are asked for, one alternative a token at least, because llama.cpp takes none
        for off; `gateway.wire` takes out again what the client did not ask for.
        """
        asked = self.asked
        head = [b'{"model":', msgspec.json.encode(model)]
        if asked.stream:
            head += [b',"stream":true,"stream_options":', self.stream_options or b'{"include_usage":true}']
        if scored or asked.logprobs is not None:
            alternatives = max(asked.logprobs or 0, 1 if scored else 0)
            if asked.endpoint == "completions":
                head.append(b',"logprobs":%d' % alternatives)
            else:
                head.append(b',"logprobs":true')
                if alternatives:
                    head.append(b',"top_logprobs":%d' % alternatives)
        if len(self.rest) > 1:
            head.append(b",")
        return b"".join(head), self.rest


_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_OURS = ("model", "stream", "stream_options", "logprobs", "top_logprobs")
_LONG_NUMBER = re.compile(rb"\d{19}")
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_body(endpoint: Endpoint, raw: bytes) -> Body:
    """Read a request. Raises `Refusal` that names the field."""
    fields = _decoded(raw)
    if endpoint == "chat/completions":
        chat = _converted(fields, _Chat)
        facts = _chat_facts(chat)
        shared: _Shared = chat
    else:
        completion = _converted(fields, _Completion)
        facts = _completion_facts(completion)
        shared = completion
    options = shared.stream_options
    if options is not None and not shared.stream:
        raise Refusal("invalid_value", "'stream_options' is only allowed with 'stream: true'.", param="stream_options")
    # Null says the same as nothing, for all that is ours.
    given = fields.pop("stream_options", None)
    for name in _OURS:
        fields.pop(name, None)
    asked = msgspec.structs.replace(
        facts,
        stream=bool(shared.stream),
        usage_wanted=options is not None and bool(options.include_usage),
        usage_everywhere=options is not None and bool(options.continuous_usage_stats),
        prompt_bytes=len(raw),
    )
    merged = _encode({**given, "include_usage": True}) if isinstance(given, dict) else None
    return Body(asked, _encode(fields)[1:], merged)


def _decoded(raw: bytes) -> dict[str, object]:
    if not raw.strip():
        raise Refusal("invalid_json", "The body is empty; a JSON object is expected.")
    try:
        fields = _decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise Refusal("invalid_json", "The body is not valid UTF-8.") from None
    except msgspec.DecodeError as error:
        said = str(error)
        # A half close to the end looks to the decoder as if the rest was missing.
        if "surrogate" in said or ("truncated" in said and _SURROGATE.search(raw)):
            raise Refusal(
                "invalid_json", "The body has half a surrogate pair (\\uD800 to \\uDFFF) in a string."
            ) from None
        raise Refusal("invalid_json", f"The body is not valid JSON: {said}.") from None
    if not isinstance(fields, dict):
        raise Refusal("invalid_type", "The body must be a JSON object.")
    if raw.count(b"{") + raw.count(b"[") > _DEEPEST:
        _check_depth(fields)
    if b"\\u0000" in raw and _ESCAPED_NUL.search(raw):
        raise Refusal("invalid_value", "The body has a NUL character (\\u0000), which no model can read.")
    if _LONG_NUMBER.search(raw):
        _check_integers(fields)
    return fields


def _check_depth(fields: object) -> None:
    level: list[object] = [fields]
    for _ in range(_DEEPEST):
        level = [
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)  # type: ignore[attr-defined]
            if isinstance(value, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> Refusal:
    return Refusal("invalid_value", f"The body is nested more than {_DEEPEST} levels deep.")


def _check_integers(value: object, path: str = "") -> None:
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            path = path[:_LONGEST_NAME_CHARS]
            raise Refusal("invalid_value", f"'{path}' is an integer out of range.", param=path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_integers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_integers(inner, f"{path}[{index}]")


def _converted(fields: object, wanted: type[_T]) -> _T:
    try:
        return msgspec.convert(fields, wanted)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None


_AT = " - at `"
_MISSING = re.compile(r"Object missing required field `(.*)`")


def _named(message: str) -> Refusal:
    """Say what msgspec found wrong in the words of the API: the field's path first."""
    # The path stands last. What stands before it may quote the client, who could write such a path as well.
    what, _, path = message.rpartition(_AT) if message.endswith("`") and _AT in message else (message, "", "")
    path = path[:-1].removeprefix("key in `").removeprefix("$").removeprefix(".")[:_LONGEST_NAME_CHARS]
    missing = _MISSING.match(what)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return Refusal("missing_required_parameter", f"Missing required parameter: '{name}'.", param=name)
    what = what.replace("`", "'")[:_LONGEST_NAME_CHARS]
    code = "invalid_type" if re.match(r"Expected '[^']*', got '", what) else "invalid_value"
    return Refusal(code, f"Invalid '{path}': {what}." if path else f"{what}.", param=path or None)


def _chat_facts(chat: _Chat) -> Asked:
    images = 0
    for number, message in enumerate(chat.messages):
        content = message.content
        if content is None:
            if message.role != "assistant":
                param = f"messages[{number}].content"
                raise Refusal(
                    "invalid_value", f"Invalid '{param}': a {message.role} message must have one.", param=param
                )
        elif not isinstance(content, str):
            images += sum(part.image_url is not None for part in content)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise Refusal("invalid_value", "'top_logprobs' is only allowed with 'logprobs: true'.", param="top_logprobs")
    return Asked(
        endpoint="chat/completions",
        model=chat.model,
        choices=chat.n or 1,
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        messages=len(chat.messages),
        tools=len(chat.tools or ()),
        images=images,
    )


def _completion_facts(completion: _Completion) -> Asked:
    prompt = completion.prompt
    ids = isinstance(prompt, list) and isinstance(prompt[0], int)
    if isinstance(prompt, list) and any(type(one) is not type(prompt[0]) for one in prompt):
        raise Refusal("invalid_type", "Invalid 'prompt': text and token ids cannot be mixed.", param="prompt")
    prompts: list[object] = [prompt] if isinstance(prompt, str) or ids else [*prompt]
    if not all(prompts) and isinstance(prompts[0], list):
        raise Refusal("invalid_value", "Invalid 'prompt': a prompt of token ids must not be empty.", param="prompt")
    each = completion.n or 1
    echo = bool(completion.echo)
    return Asked(
        endpoint="completions",
        model=completion.model,
        choices=each * len(prompts),
        max_tokens=completion.max_tokens,
        logprobs=completion.logprobs,
        echoed_chars=tuple(len(one) for one in prompts if isinstance(one, str)) if echo else (),
        echoed_tokens=tuple(len(one) for one in prompts if isinstance(one, list)) if echo else (),
    )
