"""What is in an answer, as far as we look into it? The parts that confidence and bill are read from, as types.

Everything else in an answer passes unseen, so nothing here is ever written back.
"""

from __future__ import annotations

from typing import Any

import msgspec

from backends.backend import Broken


class PromptDetails(msgspec.Struct):
    """What of a prompt cost less."""

    cached_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    """What of a completion was not shown."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """The server's bill, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Token(msgspec.Struct):
    """One token of chat's `logprobs.content`; its log-probability in nats."""

    logprob: float | None = None
    token: str = ""


class Logprobs(msgspec.Struct):
    """Chat's shape has `content`, that of text completions the parallel lists."""

    content: list[Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    text_offset: list[int] | None = None


class CalledFunction(msgspec.Struct):
    """The function of a tool call, or a piece of it."""

    arguments: str | None = None
    name: str | None = None


class ToolCall(msgspec.Struct):
    """A tool call, or a piece of one."""

    function: CalledFunction | None = None


class Said(msgspec.Struct):
    """A message, or a piece of one."""

    content: Any = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct):
    """One answer, or a piece of one: `message` and `delta` of chats, `text` of text completions."""

    index: int = 0
    delta: Said | None = None
    message: Said | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Answer(msgspec.Struct):
    """A whole answer, or one chunk of a stream."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    system_fingerprint: Any = None


class _AnswerWithoutBill(msgspec.Struct):
    choices: list[Choice] | None = None
    error: Any = None
    system_fingerprint: Any = None


_NO_BILL = Usage(prompt_tokens=-1)

_decode = msgspec.json.Decoder(Answer).decode
_decode_without_bill = msgspec.json.Decoder(_AnswerWithoutBill).decode


def read_answer(payload: bytes) -> Answer:
    """Decode a whole answer or the payload of an event. Raises `Broken` for what is in no shape of OpenAI's."""
    try:
        return _decode(payload)
    except msgspec.ValidationError as error:
        if "$.usage" not in str(error):
            raise Broken(f"its answer is not in OpenAI's shape: {error}") from None
        # A bill that cannot be read is as good as one that cannot be true: the answer is an answer all the same.
        answer = _decode_without_bill(payload)
        return Answer(answer.choices, _NO_BILL, answer.error, answer.system_fingerprint)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Broken(f"its answer is not in OpenAI's shape: {error}") from None


def text_of(choice: Choice) -> str:
    """Return what a choice of a whole answer says: its text, or the arguments of its tool calls."""
    if choice.text is not None:
        return choice.text
    said = choice.message
    if said is None:
        return ""
    if said.tool_calls:
        return "".join(call.function.arguments or "" for call in said.tool_calls if call.function is not None) or "{}"
    return said.content if isinstance(said.content, str) else (said.refusal or "")


def answer_part(tokens: list[Token], said: Said) -> list[Token]:
    """Return the tokens that spell the answer, where reasoning or the marks of a tool call stand around it."""
    if not (said.reasoning or said.reasoning_content or said.tool_calls):
        return tokens
    wanted = [said.content] if isinstance(said.content, str) and said.content else []
    wanted += [
        call.function.arguments
        for call in said.tool_calls or ()
        if call.function is not None and call.function.arguments
    ]
    text = "".join(one.token for one in tokens)
    spans = [(found, found + len(one)) for one in wanted if (found := text.rfind(one)) >= 0]
    if not spans:
        # A server that writes the arguments anew leaves nothing to find: all but the reasoning counts then.
        reasoning = said.reasoning or said.reasoning_content
        return [] if reasoning and not said.tool_calls else tokens
    part: list[Token] = []
    start = 0
    for one in tokens:
        end = start + len(one.token)
        if any(start < last and end > first for first, last in spans):
            part.append(one)
        start = end
    return part
