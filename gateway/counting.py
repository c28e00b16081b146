"""How many tokens has a prompt? An upper bound and an estimate at once, the exact number where it can be had.

What is learned is learned from what servers report: tokens per byte of text and tokens around it, by model. Rules a
reader must not break:

* `bound` and `estimate` cost microseconds and wait for nothing: every request asks for them.
* `exact` is for the few requests whose bound comes near a limit. It waits `_PATIENCE_S` at most and never raises.
* Only an answer that the model's server would give as well is called exact.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from math import ceil

from backends.backend import Backend, BackendFault, Call
from gateway.body import Asked, Body
from gateway.tally import Count, Tally
from policies.quantiles import RecentQuantile

__all__ = ["Count", "TokenCounter"]

# Before anything is learned. English prose has 0.22 to 0.25 tokens a byte, source code 0.25 to 0.4, Chinese 0.25 to
# 0.5, base64 up to 0.75, and a tokenizer that parts digits one for each: half a token covers all but the last two.
_FIRST_BOUND_RATIO = 0.5
_FIRST_RATIO = 1 / 3.5
# Templates write 3 to 5 tokens about each message, and up to a hundred or so before all of them.
_MESSAGE_TOKENS = 4
_MOST_MESSAGE_TOKENS = 8
_FIRST_OVERHEAD_TOKENS = 16
_FIRST_BOUND_OVERHEAD_TOKENS = 64
# 85 to 2,900 for most models, 16,384 at most for Qwen's at full resolution.
_IMAGE_TOKENS = 1024
_BOUND_IMAGE_TOKENS = 4096
# No byte is more than one token, but templates write long preambles of their own.
_HARD_OVERHEAD_TOKENS = 512
_HARD_MESSAGE_TOKENS = 16
_HARD_IMAGE_TOKENS = 16_384

_MARGIN = 1.1
_ENOUGH = 8
"""Observations after which they are believed alone."""
_LONG_TEXT_BYTES = 512
"""A text of this size says how many tokens a byte has; a shorter one how many stand around it."""

_LIKE_OPENAIS = re.compile(r"(?:ft:)?(?:gpt|chatgpt|o[0-9]|text-|davinci|babbage|code-)")

_PATIENCE_S = 0.25
_SERVER_LIMIT_S = 2.0
_MOST_AT_ONCE = 16
_MOST_REMEMBERED = 4096
_LARGEST_COUNTED_BYTES = 4 * 1024 * 1024
"""As text a million tokens, as much as any window holds."""
_DIGESTED_HERE_BYTES = 64 * 1024


class _Learned:
    """What a model's server has reported."""

    def __init__(self) -> None:
        self.ratios = RecentQuantile()
        self.overheads = RecentQuantile()
        self.images = RecentQuantile()


class TokenCounter:
    """Counts the prompt tokens of requests.

    `backends` are asked by name; `tokenizers` are paths of a `tokenizer.json`, by backend, where the operator gave one.
    """

    def __init__(self, backends: Mapping[str, Backend], tokenizers: Mapping[str, str] | None = None) -> None:
        self._backends = backends
        self._tokenizers = tokenizers or {}
        self._learned: dict[str, _Learned] = {}
        self._nothing = _Learned()
        self._tally = Tally()
        self._unknown: set[str] = set()
        self._remembered: OrderedDict[tuple[str, bytes], Count] = OrderedDict()
        self._under_way: dict[tuple[str, bytes], asyncio.Task[Count | None]] = {}

    async def open(self, models: Iterable[str]) -> None:
        """Start the child if it will have anything to count, so that the first request does not wait for that."""
        if self._tokenizers or any(_counted_here(model, self._unknown) for model in models):
            await self._tally.open()

    # -- at once ---------------------------------------------------------------------------------------------------

    def bound(self, model: str, asked: Asked, *, hard: bool = False) -> int:
        """Return how many tokens the prompt has at most, as far as can be told from what `model` was seen to make.

        With `hard` whatever it was seen to make: a token for every byte, and the most that pictures can come to.
        """
        if asked.prompt_tokens is not None:
            return asked.prompt_tokens
        parts = asked.messages
        most = (
            asked.prompt_bytes
            + _HARD_OVERHEAD_TOKENS
            + parts * _HARD_MESSAGE_TOKENS
            + asked.images * _HARD_IMAGE_TOKENS
        )
        if hard:
            return most
        learned = self._learned.get(model) or self._nothing
        ratio = _most(learned.ratios, _FIRST_BOUND_RATIO)
        overhead = _most(learned.overheads, _FIRST_BOUND_OVERHEAD_TOKENS)
        tokens = asked.text_bytes * ratio + overhead + parts * _MOST_MESSAGE_TOKENS
        if asked.images:
            tokens += asked.images * _most(learned.images, _BOUND_IMAGE_TOKENS)
        return min(most, ceil(tokens))

    def estimate(self, model: str, asked: Asked) -> int:
        """Return how many tokens the prompt most likely has."""
        if asked.prompt_tokens is not None:
            return asked.prompt_tokens
        learned = self._learned.get(model) or self._nothing
        tokens = _text_tokens(learned, asked) + _usual(learned.overheads, _FIRST_OVERHEAD_TOKENS)
        return ceil(tokens + asked.images * _usual(learned.images, _IMAGE_TOKENS))

    def learn(self, model: str, asked: Asked, prompt_tokens: int) -> None:
        """Learn from a server's own word for how many tokens the prompt of `asked` has, unless it cannot be true."""
        if asked.prompt_tokens is not None or not 0 < prompt_tokens <= self.bound(model, asked, hard=True):
            return
        learned = self._learned.get(model)
        if learned is None:
            learned = self._learned[model] = _Learned()
        overhead = _usual(learned.overheads, _FIRST_OVERHEAD_TOKENS)
        around = prompt_tokens - asked.messages * _MESSAGE_TOKENS
        if asked.images:
            learned.images.add(max(0.0, prompt_tokens - _text_tokens(learned, asked) - overhead) / asked.images)
        elif not asked.plain:
            return
        elif asked.text_bytes >= _LONG_TEXT_BYTES:
            learned.ratios.add(max(0.0, around - overhead) / asked.text_bytes)
        else:
            learned.overheads.add(max(0.0, prompt_tokens - _text_tokens(learned, asked)))

    # -- exactly ---------------------------------------------------------------------------------------------------

    async def exact(self, backend: str, model: str, body: Body) -> Count | None:
        """Count the prompt as well as can be: by its token ids, the backend's server, a tokenizer here.

        None where nobody can tell in time. The same request twice is counted once.
        """
        asked = body.asked
        if asked.prompt_tokens is not None:
            return Count(asked.prompt_tokens, asked.plain)
        if asked.prompt_bytes > _LARGEST_COUNTED_BYTES:
            return None
        key = (model, await _digest(body.rest))
        known = self._remembered.get(key)
        if known is not None:
            self._remembered.move_to_end(key)
            return known
        task = self._under_way.get(key)
        if task is None:
            if len(self._under_way) >= _MOST_AT_ONCE:
                return None
            task = self._under_way[key] = asyncio.create_task(self._count(backend, model, body))
            task.add_done_callback(lambda done: self._counted(key, done))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                # Who comes later may still use what this one cannot wait for.
                return await asyncio.shield(task)
        except TimeoutError:
            return None

    def _counted(self, key: tuple[str, bytes], done: asyncio.Task[Count | None]) -> None:
        self._under_way.pop(key, None)
        count = None if done.cancelled() else done.result()
        if count is not None:
            self._remembered[key] = count
            if len(self._remembered) > _MOST_REMEMBERED:
                self._remembered.popitem(last=False)

    async def _count(self, backend: str, model: str, body: Body) -> Count | None:
        asked, tokenizer = body.asked, self._tokenizers.get(backend)
        # Of a chat the server knows the template, which is in no tokenizer's file.
        if tokenizer is None or asked.endpoint == "chat/completions":
            tokens = await self._ask_server(self._backends[backend], model, body)
            if tokens is not None:
                return Count(tokens, asked.plain)
        if tokenizer is None and not _counted_here(model, self._unknown):
            return None
        try:
            count = await self._tally.count(asked.endpoint, model, body.rest, tokenizer)
        except (asyncio.IncompleteReadError, OSError):
            return None
        if count is None:
            self._unknown.add(model)
        return count

    async def _ask_server(self, backend: Backend, model: str, body: Body) -> int | None:
        call = Call(endpoint=body.asked.endpoint, body=body.for_backend(model, scored=False), stream=False)
        try:
            async with asyncio.timeout(_SERVER_LIMIT_S):
                return await backend.count_tokens(call)
        except (BackendFault, TimeoutError):
            return None

    async def close(self) -> None:
        """Give up what is being counted, and end the child process."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._tally.close()


def _counted_here(model: str, unknown: AbstractSet[str]) -> bool:
    """Whether tiktoken may know the model. Only names such as OpenAI's are worth a child that finds out."""
    return model not in unknown and _LIKE_OPENAIS.match(model.rpartition("/")[2]) is not None


def _text_tokens(learned: _Learned, asked: Asked) -> float:
    return asked.text_bytes * _usual(learned.ratios, _FIRST_RATIO) + asked.messages * _MESSAGE_TOKENS


def _usual(seen: RecentQuantile, first: float) -> float:
    usual = seen.quantile(0.5)
    return first if usual is None else usual


def _most(seen: RecentQuantile, first: float) -> float:
    most = seen.quantile(1.0)
    if most is None:
        return first
    return most * _MARGIN if len(seen) >= _ENOUGH else max(first, most * _MARGIN)


async def _digest(rest: bytes) -> bytes:
    if len(rest) <= _DIGESTED_HERE_BYTES:
        return hashlib.sha256(rest).digest()
    # It lets go of the interpreter.
    return await asyncio.to_thread(lambda: hashlib.sha256(rest).digest())
