"""Does a bound hold, does an estimate learn, and is an exact count had once, in time, or not at all?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import BackendFault, Call, ServerFacts, Unreachable
from backends.scripted import ScriptedBackend
from gateway import counting
from gateway.body import Asked, Body, read_body
from gateway.counting import Count, TokenCounter
from tests.gateway.tiny_tokenizer import write_tokenizer

T = TypeVar("T")
MODEL = "m"


def asked(text_bytes: int, *, messages: int = 1, **facts: Any) -> Asked:
    facts = {"prompt_bytes": text_bytes + 60 * messages, **facts}
    return Asked(endpoint="chat/completions", model="auto", text_bytes=text_bytes, messages=messages, **facts)


def body(content: Any = "hello", **fields: Any) -> Body:
    raw = json.dumps({"model": "auto", "messages": [{"role": "user", "content": content}], **fields}).encode()
    return read_body("chat/completions", raw)


def text(prompt: Any, **fields: Any) -> Body:
    return read_body("completions", json.dumps({"model": "auto", "prompt": prompt, **fields}).encode())


# -- bounds and estimates ---------------------------------------------------------------------------------------------


def test_a_prompt_of_token_ids_needs_no_guess() -> None:
    counter = TokenCounter({})
    ids = text([[1, 2], [3]]).asked
    assert counter.bound(MODEL, ids) == counter.bound(MODEL, ids, hard=True) == counter.estimate(MODEL, ids) == 3


@pytest.mark.parametrize("text_bytes", [0, 30, 1000, 1_000_000])
def test_before_anything_is_learned_the_guesses_stand_in_order(text_bytes: int) -> None:
    counter, given_ = TokenCounter({}), asked(text_bytes)
    assert counter.estimate(MODEL, given_) <= counter.bound(MODEL, given_) <= counter.bound(MODEL, given_, hard=True)
    assert counter.estimate(MODEL, given_) == pytest.approx(text_bytes / 3.5 + 20, abs=1)
    assert counter.bound(MODEL, given_, hard=True) >= given_.prompt_bytes + 512


def test_the_recorded_chat_is_within_its_bound() -> None:
    # SmolLM2's template begins with a system prompt of its own: 37 tokens for 30 bytes.
    recorded = body("What is the capital of France?").asked
    assert TokenCounter({}).bound(MODEL, recorded) >= 37


@given(
    ratio=st.floats(0.05, 0.9),
    overhead=st.integers(0, 200),
    sizes=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 6)), min_size=20, max_size=60),
)
def test_what_servers_report_is_learned(ratio: float, overhead: int, sizes: list[tuple[int, int]]) -> None:
    def tokens(one: Asked) -> int:
        return round(one.text_bytes * ratio) + overhead + 4 * one.messages

    counter = TokenCounter({})
    # Enough of both kinds, so that either can be told from the other.
    for size in (10, 4000) * 40:
        counter.learn(MODEL, asked(size), tokens(asked(size)))
    for size, messages in sizes:
        one = asked(size, messages=messages)
        if tokens(one) > counter.bound(MODEL, one, hard=True):
            continue
        counter.learn(MODEL, one, tokens(one))
        assert counter.bound(MODEL, one) >= tokens(one)
        assert abs(counter.estimate(MODEL, one) - tokens(one)) <= 0.1 * tokens(one) + overhead + 20
        assert counter.bound(MODEL, one) <= 1.5 * tokens(one) + 2 * overhead + 40


def test_one_model_learns_nothing_of_another() -> None:
    counter, one = TokenCounter({}), asked(10_000)
    before = counter.bound("other", one), counter.estimate("other", one)
    for _ in range(20):
        counter.learn(MODEL, one, 900)
    assert counter.bound(MODEL, one) < 1300
    assert (counter.bound("other", one), counter.estimate("other", one)) == before


@pytest.mark.parametrize("reported", [0, -5, 10**9])
def test_what_cannot_be_true_teaches_nothing(reported: int) -> None:
    counter, one = TokenCounter({}), asked(10_000)
    before = counter.bound(MODEL, one)
    for _ in range(20):
        counter.learn(MODEL, one, reported)
    assert counter.bound(MODEL, one) == before


def test_pictures_are_learned_apart() -> None:
    counter, seen, plain = TokenCounter({}), asked(1000, images=2, plain=False), asked(1000)
    before = counter.estimate(MODEL, plain)
    for _ in range(20):
        counter.learn(MODEL, seen, before + 2 * 300)
    assert counter.estimate(MODEL, plain) == before
    assert counter.estimate(MODEL, seen) == pytest.approx(before + 600, abs=2)
    assert counter.bound(MODEL, seen) - counter.bound(MODEL, plain) == pytest.approx(660, abs=3)


# -- exact counts -----------------------------------------------------------------------------------------------------


class CountingBackend(ScriptedBackend):
    """Says of every prompt that it has as many tokens, or fails, or never answers."""

    def __init__(self, tokens: int | BackendFault | None, *, answers: bool = True) -> None:
        super().__init__(lambda _: [])
        self.tokens = tokens
        self.asked: list[Call] = []
        self.may_answer = asyncio.Event()
        if answers:
            self.may_answer.set()

    async def count_tokens(self, call: Call) -> int | None:
        self.asked.append(call)
        await self.may_answer.wait()
        if isinstance(self.tokens, BackendFault):
            raise self.tokens
        return self.tokens


def using(backend: CountingBackend, act: Callable[[TokenCounter], Awaitable[T]], tokenizer: str | None = None) -> T:
    async def run() -> T:
        counter = TokenCounter({"b": backend}, {} if tokenizer is None else {"b": tokenizer})
        try:
            async with asyncio.timeout(20):
                return await act(counter)
        finally:
            await counter.close()

    return asyncio.run(run())


def test_the_server_is_asked_once_for_the_same_prompt_whatever_else_a_request_wants() -> None:
    async def act(counter: TokenCounter) -> list[Count | None]:
        bodies = [body(), body(max_tokens=7), body(stream=True), body(priority=3)]
        first = await asyncio.gather(*(counter.exact("b", MODEL, one) for one in bodies))
        return [*first, await counter.exact("b", MODEL, body())]

    backend = CountingBackend(37)
    assert using(backend, act) == [Count(37, exact=True)] * 5
    (call,) = backend.asked
    assert json.loads(b"".join(call.body)) == {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


def test_other_prompts_and_other_models_are_asked_for_apart() -> None:
    async def act(counter: TokenCounter) -> None:
        for model, one in ((MODEL, body()), (MODEL, body("bye")), ("n", body())):
            await counter.exact("b", model, one)

    backend = CountingBackend(1)
    using(backend, act)
    assert len(backend.asked) == 3


def test_only_so_many_counts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_MOST_REMEMBERED", 2)

    async def act(counter: TokenCounter) -> None:
        for content in ("a", "b", "a", "c", "a", "b"):
            await counter.exact("b", MODEL, body(content))

    backend = CountingBackend(1)
    using(backend, act)
    # a, b and c; a was used last when c came, so b was forgotten.
    assert len(backend.asked) == 4


def test_what_the_servers_template_alone_knows_is_not_exact() -> None:
    async def act(counter: TokenCounter) -> Count | None:
        return await counter.exact("b", MODEL, body(documents=[{"text": "x"}]))

    assert using(CountingBackend(5), act) == Count(5, exact=False)


def test_token_ids_are_counted_without_asking() -> None:
    async def act(counter: TokenCounter) -> Count | None:
        return await counter.exact("b", MODEL, text([1, 2, 3]))

    backend = CountingBackend(99)
    assert using(backend, act) == Count(3, exact=True)
    assert backend.asked == []


@pytest.mark.parametrize("tokens", [None, Unreachable("gone")])
def test_where_nobody_can_tell_there_is_no_count(tokens: BackendFault | None) -> None:
    async def act(counter: TokenCounter) -> Count | None:
        return await counter.exact("b", MODEL, body())

    assert using(CountingBackend(tokens), act) is None


def test_who_waited_in_vain_leaves_the_count_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_PATIENCE_S", 0.01)

    async def act(counter: TokenCounter) -> list[Count | None]:
        first = await counter.exact("b", MODEL, body())
        backend.may_answer.set()
        while counter._under_way:
            await asyncio.sleep(0)
        return [first, await counter.exact("b", MODEL, body())]

    backend = CountingBackend(37, answers=False)
    assert using(backend, act) == [None, Count(37, exact=True)]
    assert len(backend.asked) == 1


def test_a_caller_that_leaves_takes_the_count_from_nobody() -> None:
    async def act(counter: TokenCounter) -> Count | None:
        leaving = asyncio.create_task(counter.exact("b", MODEL, body()))
        while not backend.asked:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(counter.exact("b", MODEL, body()))
        await asyncio.sleep(0)
        leaving.cancel()
        backend.may_answer.set()
        return await waiting

    backend = CountingBackend(37, answers=False)
    assert using(backend, act) == Count(37, exact=True)
    assert len(backend.asked) == 1


def test_a_flood_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_PATIENCE_S", 0.05)

    async def act(counter: TokenCounter) -> None:
        await asyncio.gather(*(counter.exact("b", MODEL, body(str(number))) for number in range(200)))

    backend = CountingBackend(37, answers=False)
    using(backend, act)
    assert len(backend.asked) == counting._MOST_AT_ONCE


def test_a_tokenizer_of_the_operators_goes_before_the_server_where_it_is_exact(tmp_path: Path) -> None:
    async def act(counter: TokenCounter) -> list[Count | None]:
        # The first one may have to wait for the child.
        while (count := await counter.exact("b", MODEL, text("hello hello"))) is None:
            pass
        return [count, await counter.exact("b", MODEL, body())]

    backend = CountingBackend(37)
    assert using(backend, act, write_tokenizer(tmp_path)) == [Count(3, exact=True), Count(37, exact=True)]
    assert [call.endpoint for call in backend.asked] == ["chat/completions"]


def test_a_scripted_backend_counts_nothing_and_says_nothing_of_itself() -> None:
    async def ask() -> tuple[int | None, ServerFacts]:
        backend = ScriptedBackend(lambda _: [])
        return await backend.count_tokens(
            Call(endpoint="completions", body=(b"{}",), stream=False)
        ), await backend.probe()

    assert asyncio.run(ask()) == (None, ServerFacts())
