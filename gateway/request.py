"""Which fields of a request do we look into, and which text of it does a prompt hold? The client's JSON as types.

The structs are views: a field that is not in them is kept and not judged. What a field may be is what OpenAI's API says
of it; the rest is the servers' to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

LONGEST_NAME_CHARS = 256
MOST_TOKENS = 2**31 - 1

_Text = str | None
_Count = Annotated[int, Meta(ge=1, le=MOST_TOKENS)] | None
_Flag = bool | None


class StreamOptions(msgspec.Struct):
    """What a stream tells beside the answer."""

    include_usage: _Flag = None
    continuous_usage_stats: _Flag = None


class ImageUrl(msgspec.Struct):
    """A picture, by its address or whole in a `data:` URL."""

    url: str


class Part(msgspec.Struct):
    """A part of a message: text, a picture, or something that only some servers know."""

    type: str
    text: _Text = None
    image_url: ImageUrl | str | None = None
    refusal: object = None
    input_audio: object = None
    audio_url: object = None
    video_url: object = None


class Function(msgspec.Struct):
    """What a tool is called."""

    name: str


class Tool(msgspec.Struct):
    """A tool that the model may call."""

    type: str
    function: Function | None = None


class CalledFunction(msgspec.Struct):
    """What the model called, and with what."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model made earlier in the conversation."""

    id: _Text = None
    type: _Text = None
    function: CalledFunction | None = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: _Text = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: _Text = None
    reasoning: object = None
    reasoning_content: object = None


class ResponseFormat(msgspec.Struct):
    """The shape that an answer must have."""

    type: str
    json_schema: dict[str, object] | None = None


class Shared(msgspec.Struct):
    """The parameters that both endpoints have."""

    model: Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME_CHARS)]
    stream: _Flag = None
    stream_options: StreamOptions | None = None
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


class Chat(Shared, kw_only=True):
    """A request to `chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _Count = None
    logprobs: _Flag = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: _Flag = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, object] | None = None


class Completion(Shared, kw_only=True):
    """A request to `completions`."""

    prompt: Annotated[str, Meta()] | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: _Flag = None
    suffix: _Text = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None


# -- what a prompt is made of ------------------------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode
# Fields that a chat template may write into the prompt, as JSON or whole.
_TEMPLATE_FIELDS = ("documents", "chat_template", "chat_template_kwargs")
# With one of these only the server's own template knows what the prompt is: its `/tokenize` is not told of them.
_ONLY_THE_SERVER_KNOWS = ("documents", "reasoning_effort", "functions", "truncate_prompt_tokens", "prompt_embeds")


class Contents(msgspec.Struct):
    """What a prompt is made of.

    `texts` are its pieces, JSON for what is not text. `media` counts pictures, clips of sound and films, whose
    encoded data of `media_bytes` is in no text. `plain` is false where tokens cannot be told from the texts and the
    number of messages alone.
    """

    texts: list[str | bytes]
    media: int = 0
    media_bytes: int = 0
    plain: bool = True

    @property
    def text_bytes(self) -> int:
        """Size of all text in UTF-8."""
        return sum(len(one) if isinstance(one, bytes) or one.isascii() else len(one.encode()) for one in self.texts)


def contents_of_chat(chat: Chat, fields: Mapping[str, object]) -> Contents:
    """Say what the prompt of a chat holds; `fields` is the request as it was decoded."""
    found = Contents([])
    texts = found.texts
    for message in chat.messages:
        content = message.content
        if isinstance(content, str):
            texts.append(content)
        elif content is not None:
            _add_parts(content, found)
        if message.name is not None:
            texts.append(message.name)
        if message.tool_call_id is not None:
            texts.append(message.tool_call_id)
        for call in message.tool_calls or ():
            if call.function is not None:
                texts += (call.id or "", call.function.name, call.function.arguments)
        for thought in (message.reasoning, message.reasoning_content):
            if isinstance(thought, str):
                texts.append(thought)
    if chat.tools:
        texts.append(_encode(fields["tools"]))
        found.plain = chat.tool_choice != "none"
    if chat.response_format is not None and chat.response_format.json_schema is not None:
        # Some servers show the schema to the model, some only hold it to it.
        texts.append(_encode(chat.response_format.json_schema))
    for name in _TEMPLATE_FIELDS:
        if fields.get(name) is not None:
            texts.append(_encode(fields[name]))
    found.plain = found.plain and not found.media and all(fields.get(name) is None for name in _ONLY_THE_SERVER_KNOWS)
    return found


def _add_parts(parts: list[Part], found: Contents) -> None:
    for part in parts:
        if part.text is not None:
            found.texts.append(part.text)
        if isinstance(part.refusal, str):
            found.texts.append(part.refusal)
        for one in (part.image_url, part.input_audio, part.audio_url, part.video_url):
            if one is not None:
                found.media += 1
                found.media_bytes += len(one.url) if isinstance(one, ImageUrl) else len(_encode(one))


def contents_of_completion(completion: Completion, fields: Mapping[str, object]) -> Contents:
    """Say what the prompts of a completion hold; prompts of token ids hold no text."""
    prompt = completion.prompt
    texts: list[str | bytes] = [prompt] if isinstance(prompt, str) else [one for one in prompt if isinstance(one, str)]
    plain = not completion.suffix and all(fields.get(name) is None for name in _ONLY_THE_SERVER_KNOWS)
    if completion.suffix:
        texts.append(completion.suffix)
    return Contents(texts, plain=plain)
