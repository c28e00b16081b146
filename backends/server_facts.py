"""What does a server say of itself and of a prompt? vLLM's and llama.cpp's answers beside OpenAI's protocol."""

from __future__ import annotations

import re
from contextlib import suppress

import msgspec

from backends.backend import ServerFacts, Window

_FEW_BYTES = 64 * 1024


class _Meta(msgspec.Struct):
    n_ctx: int | None = None


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    meta: _Meta | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


_decode_models = msgspec.json.Decoder(_Models).decode


def facts_of(models: bytes) -> ServerFacts:
    """Read a list of models (`/v1/models`): vLLM has `max_model_len` in it, llama.cpp `meta.n_ctx`, others neither."""
    try:
        found = _decode_models(models).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ServerFacts()
    owners = {one.owned_by for one in found}
    windows = []
    for one in found:
        tokens = one.max_model_len or (one.meta.n_ctx if one.meta is not None else None)
        if tokens is not None and tokens > 0:
            windows.append(Window(one.id, tokens))
    return ServerFacts(
        software="vllm" if owners == {"vllm"} else "llamacpp" if owners == {"llamacpp"} else None,
        windows=tuple(windows),
    )


class _Prompt(msgspec.Struct):
    prompt: msgspec.Raw


_decode_prompt = msgspec.json.Decoder(_Prompt).decode


def text_question(completion: bytes) -> tuple[bytes, ...] | None:
    """Return what llama.cpp's `/tokenize` is asked for the prompt of a text completion; None where it is not one text.

    The JSON of the prompt is only searched for, never decoded.
    """
    prompt = bytes(_decode_prompt(completion).prompt)
    return (b'{"add_special":true,"content":', prompt, b"}") if prompt.startswith(b'"') else None


class _Counted(msgspec.Struct):
    count: int | None = None
    input_tokens: int | None = None
    tokens: list[int] | None = None


_decode_counted = msgspec.json.Decoder(_Counted).decode
# A megabyte of token ids would take milliseconds to decode. vLLM writes its count first, llama.cpp nothing but ids.
_COUNT_FIRST = re.compile(rb'\{"count":([0-9]{1,9}),')
_IDS_ALONE = re.compile(rb'\{"tokens":\[[0-9]')


def count_in(answer: bytes) -> int | None:
    """Read the answer of `/tokenize` or of llama.cpp's `input_tokens`; None where no number is in it.

    An empty list is none either: it is llama.cpp's answer to a question that it does not know.
    """
    if len(answer) > _FEW_BYTES:
        first = _COUNT_FIRST.match(answer)
        if first is not None:
            return int(first[1])
        if _IDS_ALONE.match(answer) and answer.rstrip().endswith(b"]}"):
            return answer.count(b",") + 1
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = _decode_counted(answer)
        number = found.count if found.count is not None else found.input_tokens
        if number is None and found.tokens:
            number = len(found.tokens)
        return number if number is not None and number >= 0 else None
    return None
