"""What if a model said exactly this? Plays chunks, pauses and faults from a list, for tests and demonstrations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import msgspec

from backends.backend import AnswerStream, BackendFault, Call, ServerFacts
from backends.sse import DONE


class Pause(msgspec.Struct, frozen=True):
    """Let time pass before the next chunk; None: until `event` is set, or the call is left."""

    seconds: float | None = None
    event: asyncio.Event | None = None


Script = Sequence[bytes | Pause | BackendFault]
"""Chunks to yield, pauses to make, a fault to raise: in this order."""


class ScriptedBackend:
    """Answers every call with the script that `play` returns for it.

    `calls` lists the calls that came, `open_calls` counts those not yet left.
    """

    def __init__(self, play: Callable[[Call], Script]) -> None:
        self._play = play
        self.calls: list[Call] = []
        self.open_calls = 0

    def open(self, call: Call) -> AbstractAsyncContextManager[AnswerStream]:
        """Begin the script. A fault or a pause at its head happens on entering."""
        self.calls.append(call)
        return _Playing(self, self._play(call))

    async def probe(self) -> ServerFacts:
        """Return at once: a script is always there."""
        return ServerFacts()

    async def count_tokens(self, call: Call) -> int | None:
        """Return None: a script reads no prompt."""
        return None


class _Playing:
    def __init__(self, backend: ScriptedBackend, script: Script) -> None:
        self._backend = backend
        self._steps = list(script)

    async def __aenter__(self) -> Self:
        self._backend.open_calls += 1
        try:
            await self._until_chunk()
        except BaseException:
            self._backend.open_calls -= 1
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.open_calls -= 1

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        return self

    async def __anext__(self) -> list[bytes]:
        await self._until_chunk()
        if not self._steps:
            raise StopAsyncIteration
        # Hand control back, as every read from a network does.
        await asyncio.sleep(0)
        step = self._steps.pop(0)
        assert isinstance(step, bytes)  # noqa: S101 - everything else was played by _until_chunk
        return [step]

    async def _until_chunk(self) -> None:
        while self._steps and not isinstance(self._steps[0], bytes):
            step = self._steps.pop(0)
            if isinstance(step, BackendFault):
                raise step
            if isinstance(step, Pause):
                if step.seconds is not None:
                    await asyncio.sleep(step.seconds)
                else:
                    await (step.event or asyncio.Event()).wait()


def recite(
    model: str, tokens: Iterable[str], *, logprob: float = -0.05, delay_s: float | None = None
) -> ScriptedBackend:
    """Return a backend that always says `tokens`, in the shape in which vLLM says it, each with `logprob`."""
    words = tuple(tokens)

    def play(call: Call) -> Script:
        asked = msgspec.json.decode(b"".join(call.body), type=_Asked)
        teller = _Teller(model, words, logprob, chat=call.endpoint == "chat/completions", asked=asked)
        chunks = teller.stream() if call.stream else [teller.whole()]
        if delay_s is None:
            return chunks
        return [step for chunk in chunks for step in (Pause(delay_s), chunk)]

    return ScriptedBackend(play)


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Asked(msgspec.Struct):
    logprobs: bool | int | None = None
    stream_options: _StreamOptions | None = None


class _Teller:
    """Says the same words whole and streamed, for chats and for text completions."""

    def __init__(self, model: str, words: tuple[str, ...], logprob: float, *, chat: bool, asked: _Asked) -> None:
        self._words, self._logprob, self._chat = words, logprob, chat
        self._scored = asked.logprobs is not None and asked.logprobs is not False
        self._usage_wanted = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        self._head = {"id": "chatcmpl-scripted" if chat else "cmpl-scripted", "created": 0, "model": model}
        self._usage = {"prompt_tokens": 10, "completion_tokens": len(words), "total_tokens": 10 + len(words)}

    def whole(self) -> bytes:
        text = "".join(self._words)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": self._logprobs(self._words), "finish_reason": "stop"}
        kind = "chat.completion" if self._chat else "text_completion"
        return msgspec.json.encode({**self._head, "object": kind, "choices": [choice], "usage": self._usage})

    def stream(self) -> list[bytes]:
        events = [self._event({"role": "assistant", "content": ""}, ())] if self._chat else []
        events += [self._event({"content": word}, (word,)) for word in self._words]
        events.append(self._event({}, (), "stop"))
        if self._usage_wanted:
            events.append(self._sse({**self._head, "object": self._kind(), "choices": [], "usage": self._usage}))
        return [*events, DONE]

    def _event(self, delta: dict[str, str], words: tuple[str, ...], finish: str | None = None) -> bytes:
        said: dict[str, object] = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **said, "logprobs": self._logprobs(words), "finish_reason": finish}
        return self._sse({**self._head, "object": self._kind(), "choices": [choice]})

    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _logprobs(self, words: tuple[str, ...]) -> dict[str, object] | None:
        if not self._scored or not words:
            return None
        if self._chat:
            return {
                "content": [
                    {"token": word, "logprob": self._logprob, "bytes": list(word.encode()), "top_logprobs": []}
                    for word in words
                ]
            }
        return {"tokens": list(words), "token_logprobs": [self._logprob] * len(words), "text_offset": [0] * len(words)}

    @staticmethod
    def _sse(payload: dict[str, object]) -> bytes:
        return b"data: " + msgspec.json.encode(payload) + b"\n\n"
