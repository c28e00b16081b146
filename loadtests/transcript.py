"""Which bytes does a vLLM server of version 0.32 answer with? Whole answers and events, written from a script.

`tests/contract/vllm/` has the recordings that these shapes are held against. An answer is written once without its
id and played to any number of requests.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

FINGERPRINT = "vllm-0.32.0-a47a8369"
END_OF_ANSWER = "<|im_end|>"  # the token that ends an answer, billed but not shown
WORDS = ("The", " capital", " of", " France", " is", " Paris", ".", " It", " lies", " on", " the", " Seine", ",")
ALTERNATIVES = (" a", " an", " this", " that", " one", " some", " any", " each", " no", " all")

Kind = Literal["chat", "text"]


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a request is answered: the text, its pace, and the fault if there is one."""

    tokens: int = 100
    """Tokens of the answer that carry text; the end token is billed besides, unless `max_tokens` cuts first."""
    pieces: tuple[str, ...] | None = None
    """The texts of the tokens, in place of `tokens` words."""
    logprob: float = -0.05
    logprobs: tuple[float, ...] | None = None
    """A log-probability for each token; the last one stands for those that follow."""
    prompt_tokens: int = 37
    cached_tokens: int = 0
    created: int | None = None
    head_delay_ms: float = 0
    interval_ms: float = 0
    """Before each token. A whole answer takes as long as its tokens would."""
    burst: int = 1
    """Events a write."""
    status: int = 200
    """From 400 on the answer is an error in vLLM's shape, or `body`, or with `html` a proxy's page."""
    body: str | None = None
    content_type: str = "application/json"
    html: bool = False
    headers: dict[str, str] = {}
    fail: Literal["close", "reset", "error", "hang"] | None = None
    """`close` ends the connection, `reset` breaks it (RST), `error` says in vLLM's words that the engine died."""
    fail_after: int | None = None
    """After so many tokens; absent: before the head of the answer."""
    times: int | None = None
    """So many requests are answered so, then it is as it was at the start. Absent: all."""


class StreamOptions(msgspec.Struct):
    """The part of `stream_options` that changes an answer."""

    include_usage: bool | None = None


class Asked(msgspec.Struct):
    """The fields of a request that change an answer; `messages` stays bytes, so that large bodies stay cheap."""

    model: str = ""
    stream: bool | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


class Order(msgspec.Struct, frozen=True):
    """What of a request decides the bytes of its answer."""

    kind: Kind
    model: str
    stream: bool
    top: int | None
    """Alternatives a token; absent: no log-probabilities at all."""
    choices: int
    prompts: int
    limit: int | None
    usage: bool


def encode(value: Any) -> bytes:
    """Write JSON as vLLM does: compact, UTF-8 as it is."""
    return msgspec.json.encode(value)


class Author:
    """Writes the answer to an order: everything that follows the answer's id, as bytes."""

    def __init__(self, script: Script, order: Order) -> None:
        self._script = script
        self._order = order
        full = (
            script.pieces if script.pieces is not None else tuple(WORDS[i % len(WORDS)] for i in range(script.tokens))
        )
        self.cut = order.limit is not None and order.limit <= len(full)
        self.pieces = full[: order.limit] if self.cut else full
        self.reason = "length" if self.cut else "stop"
        self.billed = len(self.pieces) + (not self.cut)  # of one choice
        self.created = script.created if script.created is not None else int(time.time())

    def _logprob(self, at: int) -> float:
        given = self._script.logprobs
        return given[min(at, len(given) - 1)] if given else self._script.logprob

    def _alternatives(self, token: str, logprob: float, count: int) -> list[tuple[str, float]]:
        """Return the token itself, then `count - 1` less likely ones, as a greedy answer has them."""
        others = [word for word in ALTERNATIVES if word != token]
        return [(token, logprob), *((others[i % len(others)], logprob - 2.5 - i) for i in range(count - 1))]

    def _chat_entry(self, token: str, at: int) -> dict[str, Any]:
        logprob = self._logprob(at)
        entry: dict[str, Any] = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
        top = self._alternatives(token, logprob, self._order.top) if self._order.top else []
        entry["top_logprobs"] = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in top]
        return entry

    def _text_logprobs(self, first: int, tokens: tuple[str, ...], offset: int) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for at, token in enumerate(tokens, first):
            logprob = self._logprob(at)
            found["text_offset"].append(offset)
            found["token_logprobs"].append(logprob)
            found["tokens"].append(token)
            found["top_logprobs"].append(dict(self._alternatives(token, logprob, max(1, self._order.top or 0))))
            offset += len(token)
        return found

    def _logprobs_of(self, first: int, tokens: tuple[str, ...]) -> dict[str, Any] | None:
        if self._order.top is None:
            return None
        if self._order.kind == "chat":
            return {"content": [self._chat_entry(token, at) for at, token in enumerate(tokens, first)]}
        return self._text_logprobs(first, tokens, sum(map(len, self.pieces[:first])))

    def _usage(self, *, streamed: bool) -> dict[str, Any]:
        order, script = self._order, self._script
        prompt, completion = script.prompt_tokens, self.billed * order.choices * order.prompts
        details: dict[str, Any] = {"cached_tokens": script.cached_tokens}
        if order.kind == "chat" or not streamed:
            details["created_cache_tokens"] = 0 if order.kind == "chat" else None
        usage: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + completion}
        usage["completion_tokens"] = completion
        if not streamed:
            details["multimodal_tokens"] = None
        usage["prompt_tokens_details"] = details
        if not streamed:
            usage["completion_tokens_details"] = None
        return usage

    def _open(self, answer_object: str) -> dict[str, Any]:
        return {"object": answer_object, "created": self.created, "model": self._order.model}

    def _after_id(self, answer: dict[str, Any]) -> bytes:
        return b'",' + encode(answer)[1:]

    def whole(self) -> bytes:
        """Write the rest of a whole answer, from the quotation mark that ends the id."""
        order = self._order
        tokens = self.pieces if self.cut else (*self.pieces, END_OF_ANSWER)
        choices = []
        for index in range(order.choices * order.prompts):
            choice: dict[str, Any] = {"index": index}
            if order.kind == "chat":
                choice["message"] = {"role": "assistant", "content": "".join(self.pieces)} | dict.fromkeys(
                    ("refusal", "annotations", "audio", "function_call", "reasoning")
                )
            else:
                choice["text"] = "".join(self.pieces)
            choice |= {"logprobs": self._logprobs_of(0, tokens), "finish_reason": self.reason, "stop_reason": None}
            choice["token_ids"] = None
            if order.kind == "text":
                choice |= {"prompt_logprobs": None, "prompt_token_ids": None}
            choice["routed_experts"] = None
            choices.append(choice)
        answer = self._open("chat.completion" if order.kind == "chat" else "text_completion")
        answer |= {"choices": choices, "service_tier": None, "system_fingerprint": FINGERPRINT}
        answer["usage"] = self._usage(streamed=False)
        if order.kind == "chat":
            answer |= dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "prompt_text"))
        return self._after_id(answer | dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "metrics")))

    def _event(self, choice: dict[str, Any], *, last: bool) -> bytes:
        chunk = self._open("chat.completion.chunk" if self._order.kind == "chat" else "text_completion")
        chunk["choices"] = [choice]
        if last and not self._order.usage:  # else the usage chunk carries it
            chunk["system_fingerprint"] = FINGERPRINT
        return self._after_id(chunk) + b"\n\n"

    def _role_event(self, index: int) -> bytes:
        chunk = self._open("chat.completion.chunk")
        delta = {"role": "assistant", "content": ""}
        chunk["choices"] = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        return self._after_id(chunk | {"prompt_token_ids": None, "prompt_text": None}) + b"\n\n"

    def _token_event(self, index: int, at: int) -> bytes:
        ends = at == self.billed - 1
        shown = self.pieces[at] if at < len(self.pieces) else None
        logprobs = self._logprobs_of(at, (shown if shown is not None else END_OF_ANSWER,))
        reason = self.reason if ends else None
        if self._order.kind == "chat":
            choice: dict[str, Any] = {"index": index, "delta": {} if shown is None else {"content": shown}}
            choice |= {"logprobs": logprobs, "finish_reason": reason}
            if ends:
                choice["stop_reason"] = None
        else:
            choice = {"index": index, "text": shown or "", "logprobs": logprobs, "finish_reason": reason}
            choice |= {"stop_reason": None, "prompt_token_ids": None}
        choice["token_ids"] = None
        return self._event(choice, last=ends)

    def events(self) -> list[tuple[bytes, int]]:
        """Write the rest of every event of a streamed answer, each with the number of its token from 1 (0: none)."""
        order = self._order
        every = range(order.choices * order.prompts)
        events = [(self._role_event(index), 0) for index in every] if order.kind == "chat" else []
        events += [(self._token_event(index, at), at + 1) for at in range(self.billed) for index in every]
        if order.usage:
            chunk = self._open("chat.completion.chunk" if order.kind == "chat" else "text_completion")
            chunk |= {"choices": [], "usage": self._usage(streamed=True), "system_fingerprint": FINGERPRINT}
            events.append((self._after_id(chunk) + b"\n\n", 0))
        return events


class Answer(msgspec.Struct, frozen=True):
    """The bytes of one order under one script, ready to be played to any number of requests."""

    tokens: int
    """Billed tokens of all choices."""
    steps: int
    """Tokens of one choice."""
    whole: bytes
    events: list[tuple[bytes, int]]


def write_answer(script: Script, order: Order) -> Answer:
    """Write all bytes of an answer but its id."""
    author = Author(script, order)
    total = author.billed * order.choices * order.prompts
    if order.stream:
        return Answer(total, author.billed, b"", author.events())
    return Answer(total, author.billed, author.whole(), [])


def order_of(kind: Kind, asked: Asked) -> Order:
    """Return the part of a request that decides the bytes of its answer."""
    if kind == "chat":
        top = (asked.top_logprobs or 0) if asked.logprobs else None
    else:
        top = int(asked.logprobs) if asked.logprobs is not None and asked.logprobs is not False else None
    prompts = 1
    if kind == "text" and bytes(asked.prompt).startswith(b"["):
        given = msgspec.json.decode(asked.prompt)
        prompts = len(given) if given and not isinstance(given[0], int) else 1
    return Order(
        kind=kind,
        model=asked.model,
        stream=bool(asked.stream),
        top=top,
        choices=asked.n or 1,
        prompts=prompts,
        limit=asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens,
        usage=bool(asked.stream and asked.stream_options is not None and asked.stream_options.include_usage),
    )
