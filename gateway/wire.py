"""What did the model say, and which part of it is the client's? Everything we add to a call is taken out again here.

A tap sits between one backend and the client. It reads the signals, the usage and the end of an answer as they pass,
and lets through what the client would have got without us: log-probabilities asked for our sake become `null`, the
usage we asked for disappears. Where the shape of an event is known that is a splice of bytes; only where it is not is
the event decoded and written anew. On the way it never looks into an event twice.

The sequence `"finish_reason":` in an event can only be a key: inside a JSON string its quotes would be escaped. All
searches here rest on that.
"""

from __future__ import annotations

import re
from contextlib import suppress
from math import nan
from typing import Any, Protocol

import msgspec

from backends.backend import Broken
from backends.sse import DONE, data_of
from gateway.answer import Answer, Choice, Usage, answer_part, read_answer, text_of
from gateway.body import Asked
from routing.confidence import ChoiceSignals, Signals


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of an attempt.

    `counted` says that some were counted or estimated here, because the server reported none that can be true.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    counted: bool = False


_LARGEST_WINDOW_TOKENS = 10_000_000
"""Where nobody says how large a window is: no bill of more tokens can be true."""
_LONGEST_VERSION_CHARS = 128

_read_any = msgspec.json.Decoder(dict[str, Any]).decode
_write = msgspec.json.Encoder().encode

_ORDINARY = b'"finish_reason":null'
_SCORES = b'"logprobs":{'
_NO_SCORES = b'"logprobs":null'
_WIDE_SCORES = re.compile(rb'"logprobs"(?:\s|:\s)')
_USAGE = re.compile(rb'"usage"\s*:')
_LAST_USAGE = b'],"usage":{'
_NEXT_CHOICE = b"}},{"
_NEXT_KEY = b'},"'
_VLLM_END = b'},"finish_reason":'
_LLAMA_END = b']}}],"created":'


class Tap(Protocol):
    """What every answer goes through on its way out, chunk by chunk."""

    signals: Signals
    complete: bool
    done: bool
    model_version: str | None

    def feed(self, chunk: bytes) -> bytes | None:
        """Take one chunk, return what of it is the client's. Raises `Broken` for what is no answer."""
        ...

    @property
    def begun(self) -> bool:
        """Whether anything of an answer, or of its reasoning, has come."""
        ...

    @property
    def ended(self) -> bool:
        """Whether every choice that began has finished: all there is, even if fewer than were asked for."""
        ...

    def usage(self) -> TokenUsage:
        """Return what the server reported, or what we counted where it reported nothing that can be true."""
        ...


def make_tap(
    asked: Asked,
    *,
    scored: bool,
    read_tokens: int,
    prompt_tokens: int | None = None,
    context_tokens: int | None = None,
) -> Tap:
    """Return the tap for one attempt.

    With `scored` log-probabilities were asked for our sake; of a stream the first `read_tokens` of every choice are
    read, the rest is only taken out. `prompt_tokens` is what to tell of the prompt where the server reports nothing,
    `context_tokens` the window of its model: who reports more is not believed.
    """
    if prompt_tokens is None:
        prompt_tokens = asked.prompt_tokens if asked.prompt_tokens is not None else -(-asked.prompt_bytes // 4)
    # Every choice, and every prompt of a text completion, has a window of its own.
    sequences = max(asked.sequences, asked.choices, asked.messages if asked.endpoint == "completions" else 1)
    most_tokens = sequences * (context_tokens or _LARGEST_WINDOW_TOKENS)
    if asked.stream:
        return StreamTap(asked, prompt_tokens, most_tokens, scored=scored, read_tokens=read_tokens)
    return WholeTap(asked, prompt_tokens, most_tokens, scored=scored)


class _Tap:
    """What both taps share: signals, usage and taking out what is ours.

    `complete` says that every choice has finished, `done` that the server has said so.
    """

    def __init__(self, asked: Asked, prompt_tokens: int, most_tokens: int, *, scored: bool) -> None:
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        self._most_tokens = most_tokens
        self._strip_scores = scored and asked.logprobs is None
        self._trim_scores = scored and asked.logprobs == 0
        self._reported: Usage | None = None
        self._reported_at = 0
        # The last event with a bill in it that was not read; it is read when somebody wants to know.
        self._unread_bill: bytes | None = None
        self._spoken_tokens = 0
        self._text_chars: dict[int, int] = {}
        self._score_tokens: dict[int, int] = {}
        self.signals: Signals = {}
        self.events = 0
        self.complete = False
        self.done = False
        self.model_version: str | None = None

    def _note_version(self, answer: Answer) -> None:
        """Note what the server says its model and its own version are."""
        said = answer.system_fingerprint
        if self.model_version is None and isinstance(said, str) and said:
            self.model_version = said[:_LONGEST_VERSION_CHARS]

    def _answer_logprobs(self, choice: Choice) -> list[float]:
        """Return the log-probabilities of the answer's own tokens: no reasoning, no echoed prompt."""
        scores = choice.logprobs
        if scores is None:
            return []
        if scores.content is not None:
            tokens = scores.content
            if choice.message is not None:
                tokens = answer_part(tokens, choice.message)
            return [nan if one.logprob is None else one.logprob for one in tokens]
        if scores.token_logprobs is None:
            return []
        first = self._echoed(choice, scores.token_logprobs, scores.text_offset or [])
        return [nan if one is None else one for one in scores.token_logprobs[first:]]

    def _echoed(self, choice: Choice, scores: list[float | None], offsets: list[int]) -> int:
        """How many of the tokens are the prompt's, repeated because of `echo`.

        The prompt comes first. Once it has been repeated, vLLM counts its offsets anew: they say nothing then.
        """
        asked, index = self._asked, choice.index
        if asked.echoed_tokens:
            seen = self._score_tokens.get(index, 0)
            self._score_tokens[index] = seen + len(scores)
            return max(0, _of_choice(asked.echoed_tokens, index, asked.choices) - seen)
        if asked.echoed_chars:
            chars, seen = _of_choice(asked.echoed_chars, index, asked.choices), self._text_chars.get(index, 0)
            self._text_chars[index] = seen + len(choice.text or "")
            return sum(offset < chars for offset in offsets) if seen < chars else 0
        return 0

    def usage(self) -> TokenUsage:
        """Return what the server reported, or what we counted where it reported nothing that can be true."""
        if self._unread_bill is not None:
            payload, self._unread_bill = data_of(self._unread_bill), None
            with suppress(Broken):
                bill = read_answer(payload or b"").usage
                if bill is not None and self._believable(bill):
                    self._reported = bill
        reported = self._reported
        if reported is not None and self._believable(reported):
            prompt, completion = reported.prompt_tokens_details, reported.completion_tokens_details
            # A bill in the middle of a stream is out of date with the next token.
            unbilled_tokens = max(0, self.events - self._reported_at)
            billed_tokens = (reported.completion_tokens or 0) + unbilled_tokens
            # llama.cpp bills one choice of several: what was seen is the least that was made.
            seen_tokens = self._seen_tokens() if self._asked.choices > 1 else 0
            cached_tokens = max(0, (prompt.cached_tokens or 0) if prompt else 0)
            reasoning_tokens = max(0, (completion.reasoning_tokens or 0) if completion else 0)
            completion_tokens = max(billed_tokens, seen_tokens)
            return TokenUsage(
                prompt_tokens=reported.prompt_tokens,
                cached_prompt_tokens=min(cached_tokens, reported.prompt_tokens),
                completion_tokens=completion_tokens,
                reasoning_tokens=min(reasoning_tokens, completion_tokens),
                counted=(
                    unbilled_tokens > 0
                    or seen_tokens > billed_tokens
                    or cached_tokens > reported.prompt_tokens
                    or reasoning_tokens > completion_tokens
                ),
            )
        # A token is an event on the wire, near enough; what comes whole has about four bytes a token.
        return TokenUsage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=max(self.events, self._spoken_tokens),
            counted=True,
        )

    def _believable(self, reported: Usage) -> bool:
        """Whether a bill can be true: something was read, something was said where it was seen, and both fit."""
        prompt_tokens, completion_tokens = reported.prompt_tokens, reported.completion_tokens or 0
        if not 0 < prompt_tokens <= self._most_tokens or not 0 <= completion_tokens <= self._most_tokens:
            return False
        return completion_tokens > 0 or not any(one.pieces or one.reasoning_pieces for one in self.signals.values())

    def _seen_tokens(self) -> int:
        """How many tokens there are at least. The first and the last event of a choice in a stream carry none."""
        scored_tokens = sum(one.scored_tokens for one in self.signals.values())
        return max(scored_tokens, self.events - 2 * self._asked.choices)

    @property
    def ended(self) -> bool:
        """Whether every choice that began has finished."""
        return bool(self.signals) and all(one.finished for one in self.signals.values())

    @property
    def begun(self) -> bool:
        """Whether anything of an answer, or of its reasoning, has come."""
        return any(one.pieces or one.reasoning_pieces or one.finished for one in self.signals.values())

    def _client_json(self, payload: bytes, *, strip_usage: bool = False) -> bytes:
        if not strip_usage and self._strip_scores:
            spliced = _without_scores(payload)
            if spliced is not None:
                return spliced
        answer = _decoded_anew(payload)
        if strip_usage:
            answer.pop("usage", None)
        choices = answer.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            scores = choice.get("logprobs") if isinstance(choice, dict) else None
            if not isinstance(scores, dict):
                continue
            if self._strip_scores:
                choice["logprobs"] = None
                if "prompt_logprobs" in choice and (self._asked.echoed_chars or self._asked.echoed_tokens):
                    # vLLM adds the scores of an echoed prompt beside those of the answer.
                    choice["prompt_logprobs"] = None
            elif self._trim_scores:
                _trim(scores)
        return _write(answer)


class StreamTap(_Tap):
    """For server-sent events."""

    def __init__(self, asked: Asked, prompt_tokens: int, most_tokens: int, *, scored: bool, read_tokens: int) -> None:
        super().__init__(asked, prompt_tokens, most_tokens, scored=scored)
        self._read_tokens = read_tokens if scored else 0
        self._unread = True
        # Events of several choices at once may hold one end beside another's middle.
        self._single = asked.choices == 1
        self._usage_everywhere = self._billed = False
        self._last_kind: dict[int, str] = {}
        self._finished: set[int] = set()

    def feed(self, event: bytes) -> bytes | None:
        """Take one server-sent event, return what of it is the client's. Raises `Broken` for an error event."""
        if not self._unread and self._single and _ORDINARY in event:
            self.events += 1
            strip_usage = self._usage_everywhere
            if self._billed:
                head, found, tail = event.rpartition(_LAST_USAGE)
                if found:
                    self._unread_bill, self._reported_at = event, self.events
                    if strip_usage and tail.partition(b"}")[2] == b"}\n\n":
                        # The bill is the last thing in it, as vLLM writes it.
                        event, strip_usage = head + b"]}\n\n", False
            if not strip_usage and not self._trim_scores:
                if not self._strip_scores:
                    return event
                spliced = _without_scores(event)
                if spliced is not None:
                    return spliced
            return self._rewritten(event)
        return self._feed_slowly(event)

    def _feed_slowly(self, event: bytes) -> bytes | None:
        if event == DONE:
            self.done = True
            return None
        payload = data_of(event)
        if payload is None:
            return event
        if payload == b"[DONE]":
            self.done = True
            return None
        answer = read_answer(payload)
        if answer.error is not None:
            raise Broken("it reports an error in the middle of its answer")
        self._note_version(answer)
        choices = answer.choices or ()
        if answer.usage is not None:
            self._reported, self._unread_bill = answer.usage, None
            self._reported_at = self.events + bool(choices)
            self._billed |= bool(choices)
        for choice in choices:
            self._read_delta(choice)
        if not choices:
            # llama.cpp bills every choice on its own, in the middle; the client's is the last.
            wanted = (self._asked.usage_wanted and self.complete) or answer.usage is None
            return event if wanted else None
        self.events += 1
        if not self._asked.usage_everywhere and _USAGE.search(event):
            # OpenAI's chunks have a usage of null where usage was asked for.
            self._usage_everywhere |= not self._asked.usage_wanted or answer.usage is not None
        if self._unread and all(one.answer_tokens >= self._read_tokens for one in self.signals.values()):
            self._unread = not any(one.pieces or one.reasoning_pieces for one in self.signals.values())
        self.complete = len(self._finished) >= self._asked.choices
        passed = self._rewritten(event)
        if answer.usage is not None and self.complete and self._asked.usage_wanted and self._usage_everywhere:
            # Some servers bill in the last chunk of the answer; OpenAI does in one without choices.
            passed += _usage_chunk(payload)
        return passed

    def _read_delta(self, choice: Choice) -> None:
        signals = self.signals.get(choice.index)
        if signals is None:
            signals = self.signals[choice.index] = ChoiceSignals()
        said = choice.delta
        kind = self._last_kind.get(choice.index, "")
        if choice.text:
            kind = "answer"
        elif said is not None:
            if said.content or said.tool_calls or said.refusal:
                kind = "answer"
            elif said.reasoning or said.reasoning_content:
                kind = "reasoning"
        spoke = kind != "" and (
            bool(choice.text)
            or (
                said is not None
                and bool(said.content or said.tool_calls or said.refusal or said.reasoning or said.reasoning_content)
            )
        )
        self._last_kind[choice.index] = kind
        if kind == "answer":
            signals.pieces += spoke
            signals.add(self._answer_logprobs(choice))
        elif kind == "reasoning":
            signals.reasoning_pieces += spoke
        if choice.finish_reason:
            signals.finished = True
            self._finished.add(choice.index)

    def _rewritten(self, event: bytes) -> bytes:
        """Take out what is ours, by splice where possible."""
        strip_usage = self._usage_everywhere and _USAGE.search(event) is not None
        if not strip_usage and not self._trim_scores:
            if not self._strip_scores:
                return event
            spliced = _without_scores(event)
            if spliced is not None:
                return spliced
        payload = data_of(event)
        return event if payload is None else b"data: " + self._client_json(payload, strip_usage=strip_usage) + b"\n\n"


class WholeTap(_Tap):
    """For an answer in one piece."""

    def feed(self, body: bytes) -> bytes | None:
        """Take a whole answer, return the client's. Raises `Broken` where it is none."""
        answer = read_answer(body)
        if answer.error is not None:
            raise Broken("it answers 200 with an error in it")
        if not answer.choices:
            raise Broken("its answer has no choices")
        self._note_version(answer)
        for choice in answer.choices:
            signals = self.signals[choice.index] = ChoiceSignals(finished=True)
            said = choice.message
            spoken = text_of(choice)
            signals.pieces += bool(spoken)
            if said is not None and (said.reasoning or said.reasoning_content):
                signals.reasoning_pieces += 1
            signals.add(self._answer_logprobs(choice))
            self._spoken_tokens += max(signals.scored_tokens, -(-len(spoken.encode()) // 4))
        self.events += 1
        self._reported, self._reported_at = answer.usage, self.events
        self.complete = self.done = True
        return self._client_json(body) if self._strip_scores or self._trim_scores else body


def _decoded_anew(payload: bytes) -> dict[str, Any]:
    try:
        return _read_any(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Broken(f"its answer is not JSON: {error}") from None


def _of_choice(echoed: tuple[int, ...], index: int, choices: int) -> int:
    """Return what is repeated of the prompt that choice belongs to: every prompt has as many choices."""
    number = index // max(1, choices // len(echoed))
    return echoed[number] if number < len(echoed) else 0


def _without_scores(text: bytes) -> bytes | None:
    """Replace the log-probabilities of the only choice by null; None where the shape is not a known one."""
    start = text.find(_SCORES)
    if start < 0:
        # Some servers write a blank behind the colon: those may be scores as well.
        return None if _WIDE_SCORES.search(text) else text
    end = text.find(_VLLM_END, start)
    if end < 0:
        end = text.find(_LLAMA_END, start)
        if end < 0 or text.find(_NEXT_CHOICE, start, end) >= 0:
            return None
        end += 1
    if text.find(_SCORES, end) >= 0 or b'"prompt_logprobs":[' in text or text.find(_NEXT_KEY, start, end) >= 0:
        return None
    return b"%b%b%b" % (text[:start], _NO_SCORES, text[end + 1 :])


def _usage_chunk(payload: bytes) -> bytes:
    """Return the bill in a chunk's `usage` as a chunk of its own, without choices."""
    answer = _read_any(payload)
    answer["choices"] = []
    return b"data: " + _write(answer) + b"\n\n"


def _trim(scores: dict[str, Any]) -> None:
    """Leave only the token that was taken: the client asked for no alternatives."""
    content = scores.get("content")
    for token in content if isinstance(content, list) else ():
        if isinstance(token, dict):
            token["top_logprobs"] = []
    tops, tokens = scores.get("top_logprobs"), scores.get("tokens")
    if isinstance(tops, list) and isinstance(tokens, list):
        scores["top_logprobs"] = [
            {token: top[token]} if isinstance(top, dict) and token in top else top
            for token, top in zip(tokens, tops, strict=False)
        ]
