"""Does the child count what is in a request, by the file that was given or by tiktoken?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from backends.backend import Endpoint
from gateway.body import read_body
from gateway.tally import Count, Tally
from tests.gateway.tiny_tokenizer import write_tokenizer

T = TypeVar("T")


def using(act: Callable[[Tally], Awaitable[T]]) -> T:
    async def run() -> T:
        tally = Tally()
        try:
            async with asyncio.timeout(20):
                return await act(tally)
        finally:
            await tally.close()

    return asyncio.run(run())


def counts(tokenizer: str | None, model: str, *bodies: dict[str, Any]) -> list[Count | None]:
    """Count each body in one child."""

    async def act(tally: Tally) -> list[Count | None]:
        found = []
        for fields in bodies:
            endpoint: Endpoint = "chat/completions" if "messages" in fields else "completions"
            rest = read_body(endpoint, json.dumps({"model": "auto", **fields}).encode()).rest
            found.append(await tally.count(endpoint, model, rest, tokenizer))
        return found

    return using(act)


def test_of_a_completion_a_tokenizers_count_is_exact_with_what_stands_before_it(tmp_path: Path) -> None:
    found = counts(
        write_tokenizer(tmp_path),
        "m",
        {"prompt": "hello hello"},
        {"prompt": ["hello", "hello world"], "n": 3},
        {"prompt": "hello", "suffix": "world"},
        {"prompt": ""},
    )
    assert found == [Count(3, exact=True), Count(5, exact=True), Count(4, exact=False), Count(1, exact=True)]


def test_of_a_chat_it_is_not_because_the_template_is_the_servers(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    tools = [{"type": "function", "function": {"name": "hello", "parameters": {}}}]
    plain, with_tools = counts(
        write_tokenizer(tmp_path), "m", {"messages": messages}, {"messages": messages, "tools": tools}
    )
    assert plain == Count(2 + 2 * 4 + 3, exact=False)
    assert with_tools is not None
    assert with_tools.tokens > plain.tokens + 10


def test_a_model_of_openais_is_counted_by_tiktoken_and_another_by_nobody() -> None:
    assert counts(None, "gpt-4", {"prompt": "tiktoken is great!"}) == [Count(6, exact=True)]
    assert counts(None, "smollm2", {"prompt": "tiktoken is great!"}) == [None]
    # From OpenAI's cookbook: `num_tokens_from_messages`.
    example = [{"role": "user", "content": "tiktoken is great!"}]
    assert counts(None, "gpt-4", {"messages": example}) == [Count(13, exact=False)]


def test_a_tokenizer_that_has_gone_is_like_none(tmp_path: Path) -> None:
    assert counts(str(tmp_path / "gone.json"), "m", {"prompt": "hello"}) == [None]
