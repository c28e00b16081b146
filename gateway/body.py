"""What does the client ask for? The bytes of a request in, a checked `Body` out, or a refusal that names the field.

The body is decoded once. What was judged here is what a backend gets: its JSON is written anew from the decoded
values, so a key that stands twice cannot mean one thing here and another there, and fields that tierway does not know
survive. Nothing here waits or knows of HTTP; large bodies are read by the same function in a process of their own.
"""

from __future__ import annotations

import hashlib
import re
from typing import TypeVar

import msgspec

from backends.backend import Endpoint
from gateway.errors import Refusal
from gateway.request import (
    LONGEST_NAME_CHARS,
    Chat,
    Completion,
    Shared,
    contents_of_chat,
    contents_of_completion,
)

_DEEPEST = 64
_LONGEST_USER_CHARS = 256
_DEFAULT_TOKENS = 16
"""What OpenAI, and vLLM, take for the `max_tokens` of a text completion that names none."""

_T = TypeVar("_T")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a request.

    `choices` counts the answers wanted, `sequences` those that a server may generate for them (`best_of`);
    `max_tokens` is the most tokens of each that the client wants, None where it does not say; `unlimited` is then true
    where saying nothing means no limit. `logprobs` is the number of alternatives a token that the client asked for,
    None where it asked for no log-probabilities. `usage_wanted` and `usage_everywhere` are OpenAI's `include_usage`
    and vLLM's `continuous_usage_stats`. `echoed_chars` and `echoed_tokens` say how much of each answer is the prompt
    repeated: characters for text prompts, tokens for token ids, by prompt.

    Of the prompt: `text_bytes` is the UTF-8 size of all text in it, tools and schemas included; `prompt_tokens` its
    length where it came as token ids, else None; `prompt_bytes` the size of the whole body without pictures, which
    bounds whatever text a template can find in it; `messages` counts messages, or prompts; `images` counts pictures,
    clips of sound and films; `plain` is false where tokens cannot be told from the texts alone. `user` is the client's
    own word for its end user, a digest of it where it is long.
    """

    endpoint: Endpoint
    model: str
    stream: bool = False
    usage_wanted: bool = False
    usage_everywhere: bool = False
    choices: int = 1
    sequences: int = 1
    max_tokens: int | None = None
    unlimited: bool = True
    logprobs: int | None = None
    prompt_bytes: int = 0
    text_bytes: int = 0
    prompt_tokens: int | None = None
    messages: int = 0
    tools: int = 0
    images: int = 0
    plain: bool = True
    user: str | None = None
    echoed_chars: tuple[int, ...] = ()
    echoed_tokens: tuple[int, ...] = ()

    def limited_to(self, most_tokens: int) -> int:
        """Return the most tokens of each sequence in a call that is limited to `most_tokens`: never more than asked.

        A text completion without any `max_tokens` has OpenAI's default, so that no server takes its own for it.
        """
        if self.max_tokens is not None:
            return min(self.max_tokens, most_tokens)
        return most_tokens if self.unlimited else min(_DEFAULT_TOKENS, most_tokens)


class Body(msgspec.Struct, frozen=True):
    """A request that was read: its facts, and the JSON of every field that goes to a backend as it is.

    `rest` is a JSON object without its opening brace: `"messages":[…]}`, or `}` alone. `limits` and `priority` are the
    client's own limits of tokens and its priority as members of that object, each with a comma before it;
    `limit_names` are the names under which a limit of ours must stand.
    """

    asked: Asked
    rest: bytes
    stream_options: bytes | None = None
    metered_options: bytes | None = None
    limits: bytes = b""
    limit_names: tuple[str, ...] = ()
    priority: bytes = b""

    def for_backend(
        self,
        model: str,
        *,
        scored: bool,
        most_tokens: int | None = None,
        priority: int | None = None,
        metered: bool = False,
    ) -> tuple[bytes, bytes]:
        """Return the JSON for one call, in two pieces: the client's request, asked of `model`.

        With `scored` log-probabilities are asked for, one alternative a token at least, because llama.cpp takes none
        for off; with `metered` a stream's usage is asked for in every event (vLLM's `continuous_usage_stats`).
        `gateway.wire` takes out again what the client did not ask for. With `most_tokens` every limit that the client
        gave, or `max_tokens` where it gave none, becomes `Asked.limited_to` of it; with `priority` that goes in place
        of the client's own.
        """
        asked = self.asked
        head = [b'{"model":', _encode(model)]
        if asked.stream:
            head.append(b',"stream":true,"stream_options":')
            if metered:
                head.append(self.metered_options or b'{"include_usage":true,"continuous_usage_stats":true}')
            else:
                head.append(self.stream_options or b'{"include_usage":true}')
        if scored or asked.logprobs is not None:
            alternatives = max(asked.logprobs or 0, 1 if scored else 0)
            if asked.endpoint == "completions":
                head.append(b',"logprobs":%d' % alternatives)
            else:
                head.append(b',"logprobs":true')
                if alternatives:
                    head.append(b',"top_logprobs":%d' % alternatives)
        if most_tokens is None:
            head.append(self.limits)
        else:
            limit_tokens = asked.limited_to(most_tokens)
            head += [b',"%b":%d' % (name.encode(), limit_tokens) for name in self.limit_names]
        head.append(self.priority if priority is None else b',"priority":%d' % priority)
        if len(self.rest) > 1:
            head.append(b",")
        return b"".join(head), self.rest


_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_OURS = ("model", "stream", "stream_options", "logprobs", "top_logprobs")
# llama.cpp has a name of its own, which it heeds before the others.
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
# A search for 19 digits by pattern would cost more than all the rest: 14 ns a byte.
_AS_ZEROS = bytes(ord("0") if chr(one) in "0123456789" else one for one in range(256))
_LONG_NUMBER = b"0" * 19
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_body(endpoint: Endpoint, raw: bytes) -> Body:
    """Read a request. Raises `Refusal` that names the field."""
    fields = _decoded(raw)
    if endpoint == "chat/completions":
        chat = _converted(fields, Chat)
        facts = _chat_facts(chat, fields)
        contents = contents_of_chat(chat, fields)
        shared: Shared = chat
    else:
        completion = _converted(fields, Completion)
        facts = _completion_facts(completion, fields)
        contents = contents_of_completion(completion, fields)
        shared = completion
    options = shared.stream_options
    if options is not None and not shared.stream:
        raise Refusal("invalid_value", "'stream_options' is only allowed with 'stream: true'.", param="stream_options")
    # Null says the same as nothing, for all that is ours.
    given = fields.pop("stream_options", None)
    for name in _OURS:
        fields.pop(name, None)
    # Not so for limits: to vLLM a null is no limit, and nothing its default.
    names = tuple([name for name in _LIMITS if name in fields])
    limits = b"".join([b',"%b":%b' % (name.encode(), _encode(fields.pop(name))) for name in names])
    if not names or (endpoint == "completions" and "max_tokens" not in names):
        names = ("max_tokens", *names)
    priority = b',"priority":%b' % _encode(fields.pop("priority")) if "priority" in fields else b""
    merged = metered = None
    if isinstance(given, dict):
        merged = _encode({**given, "include_usage": True})
        metered = _encode({**given, "include_usage": True, "continuous_usage_stats": True})
    rest = _encode(fields)[1:]
    asked = msgspec.structs.replace(
        facts,
        stream=bool(shared.stream),
        usage_wanted=options is not None and bool(options.include_usage),
        usage_everywhere=options is not None and bool(options.continuous_usage_stats),
        # Numbers may be longer when they are written anew.
        prompt_bytes=max(len(raw), len(rest)) - contents.media_bytes,
        text_bytes=contents.text_bytes,
        images=contents.media,
        plain=contents.plain,
        user=_user(shared.user),
    )
    return Body(asked, rest, merged, metered, limits, names, priority)


def _user(given: str | None) -> str | None:
    """Return who the client says its end user is; nobody needs a megabyte of it."""
    if not given or len(given) <= _LONGEST_USER_CHARS:
        return given or None
    return "sha256:" + hashlib.sha256(given.encode()).hexdigest()


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
    if _LONG_NUMBER in raw.translate(_AS_ZEROS):
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
            path = path[:LONGEST_NAME_CHARS]
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
    path = path[:-1].removeprefix("key in `").removeprefix("$").removeprefix(".")[:LONGEST_NAME_CHARS]
    missing = _MISSING.match(what)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return Refusal("missing_required_parameter", f"Missing required parameter: '{name}'.", param=name)
    what = what.replace("`", "'")[:LONGEST_NAME_CHARS]
    code = "invalid_type" if re.match(r"Expected '[^']*', got '", what) else "invalid_value"
    return Refusal(code, f"Invalid '{path}': {what}." if path else f"{what}.", param=path or None)


def _own_limit(fields: dict[str, object]) -> int | None:
    limit = fields.get("n_predict")
    return limit if type(limit) is int and limit > 0 else None


def _chat_facts(chat: Chat, fields: dict[str, object]) -> Asked:
    for number, message in enumerate(chat.messages):
        if message.content is None and message.role != "assistant":
            param = f"messages[{number}].content"
            raise Refusal("invalid_value", f"Invalid '{param}': a {message.role} message must have one.", param=param)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise Refusal("invalid_value", "'top_logprobs' is only allowed with 'logprobs: true'.", param="top_logprobs")
    return Asked(
        endpoint="chat/completions",
        model=chat.model,
        choices=chat.n or 1,
        sequences=chat.n or 1,
        max_tokens=chat.max_completion_tokens or chat.max_tokens or _own_limit(fields),
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        messages=len(chat.messages),
        tools=len(chat.tools or ()),
    )


def _completion_facts(completion: Completion, fields: dict[str, object]) -> Asked:
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
        messages=len(prompts),
        sequences=max(each, completion.best_of or 1) * len(prompts),
        max_tokens=completion.max_tokens or _own_limit(fields),
        unlimited="max_tokens" in fields,
        logprobs=completion.logprobs,
        prompt_tokens=sum(len(one) for one in prompts if isinstance(one, list)) or None,
        echoed_chars=tuple(len(one) for one in prompts if isinstance(one, str)) if echo else (),
        echoed_tokens=tuple(len(one) for one in prompts if isinstance(one, list)) if echo else (),
    )
