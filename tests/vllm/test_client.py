"""Does our client get from a real vLLM what it promises?"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import pytest

from backends.backend import Broken, Call, Endpoint, Rejected, TimedOut, Timeouts, Unreachable
from backends.vllm import HttpPool, VllmBackend
from tests.servers.redis import free_port
from tests.vllm import MODEL

T = TypeVar("T")

PATIENCE_S = 2.0  # the longest of these answers would take ten times as long


def call(endpoint: Endpoint = "chat/completions", **fields: object) -> Call:
    asked: dict[str, object] = {"model": MODEL, "temperature": 0, **fields}
    if endpoint == "chat/completions" and "messages" not in asked:
        asked["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    return Call(endpoint=endpoint, body=(msgspec.json.encode(asked),), stream=bool(fields.get("stream")))


def endless(*, stream: bool) -> Call:
    return call(stream=stream, max_tokens=1500, ignore_eos=True)


async def answer(backend: VllmBackend, asked: Call) -> bytes:
    async with backend.open(asked) as chunks:
        return b"".join([piece async for pieces in chunks for piece in pieces])


def with_backend(address: str, use: Callable[[VllmBackend], Awaitable[T]], timeouts: Timeouts | None = None) -> T:
    async def run() -> T:
        pool = HttpPool()
        try:
            return await use(VllmBackend(pool, url=address, timeouts=timeouts))
        finally:
            await pool.close()

    return asyncio.run(run())


def running_requests(address: str) -> int:
    with urllib.request.urlopen(f"{address}/metrics", timeout=5) as response:
        found = re.search(r"^vllm:num_requests_running\{[^}]*\} ([\d.]+)$", response.read().decode(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def until_running(address: str, count: int) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while (now := await asyncio.to_thread(running_requests, address)) != count:
        assert time.monotonic() < give_up_at, f"{now} requests run at the server, not {count}"
        await asyncio.sleep(0.02)


def test_a_whole_answer(vllm_address: str) -> None:
    body = with_backend(vllm_address, lambda backend: answer(backend, call(max_tokens=16)))
    told = msgspec.json.decode(body)
    assert "Paris" in told["choices"][0]["message"]["content"]
    assert told["usage"]["completion_tokens"] <= 16


def test_a_stream_says_the_same_as_the_whole(vllm_address: str) -> None:
    whole = with_backend(vllm_address, lambda backend: answer(backend, call(max_tokens=16)))
    streamed = with_backend(vllm_address, lambda backend: answer(backend, call(max_tokens=16, stream=True)))
    events = [line.removeprefix(b"data: ") for line in streamed.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    parts = [msgspec.json.decode(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(parts) == msgspec.json.decode(whole)["choices"][0]["message"]["content"]


def test_token_ids_are_a_prompt(vllm_address: str) -> None:
    asked = call("completions", prompt=[504, 3575, 282, 4649, 314], max_tokens=4)
    body = with_backend(vllm_address, lambda backend: answer(backend, asked))
    assert msgspec.json.decode(body)["usage"]["prompt_tokens"] == 5


def test_a_prompt_that_is_too_long_is_told_apart(vllm_address: str) -> None:
    asked = call(messages=[{"role": "user", "content": "hello " * 5000}])
    with pytest.raises(Rejected) as refused:
        with_backend(vllm_address, lambda backend: answer(backend, asked))
    assert refused.value.status == 400
    assert refused.value.too_long


def test_a_refusal_keeps_its_words(vllm_address: str) -> None:
    with pytest.raises(Rejected, match="temperature must be non-negative") as refused:
        with_backend(vllm_address, lambda backend: answer(backend, call(temperature=-1)))
    assert refused.value.status == 400
    assert not refused.value.too_long


def test_a_model_that_is_not_there_is_the_operators_mistake(vllm_address: str) -> None:
    with pytest.raises(Broken, match="does not serve the model"):
        with_backend(vllm_address, lambda backend: answer(backend, call(model="nope")))


def test_leaving_a_stream_frees_the_server(vllm_address: str) -> None:
    async def leave(backend: VllmBackend) -> None:
        async with backend.open(endless(stream=True)) as chunks:
            async for _ in chunks:
                break
            await until_running(vllm_address, 1)
        await until_running(vllm_address, 0)

    with_backend(vllm_address, leave)


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_call_frees_the_server(vllm_address: str, *, stream: bool) -> None:
    async def cancel(backend: VllmBackend) -> None:
        task = asyncio.create_task(answer(backend, endless(stream=stream)))
        await until_running(vllm_address, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_running(vllm_address, 0)

    with_backend(vllm_address, cancel)


def test_a_call_that_takes_too_long_frees_the_server(vllm_address: str) -> None:
    async def run_out(backend: VllmBackend) -> None:
        with pytest.raises(TimedOut) as late:
            await answer(backend, endless(stream=True))
        assert late.value.phase == "total"
        await until_running(vllm_address, 0)

    with_backend(vllm_address, run_out, Timeouts(total_s=0.5))


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("chat/completions", {}),
        ("chat/completions", {"stream": True, "stream_options": {"include_usage": True}, "n": 2}),
        (
            "chat/completions",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "Grüße!"}]},
                ],
            },
        ),
        ("completions", {"prompt": "Hello world"}),
    ],
)
def test_tokens_are_counted_beforehand_as_they_are_billed(
    vllm_address: str, endpoint: Endpoint, fields: dict[str, object]
) -> None:
    asked = call(endpoint, **fields)
    billed = call(endpoint, **{**fields, "stream": False, "stream_options": None, "n": 1, "max_tokens": 1})

    async def ask(backend: VllmBackend) -> tuple[int | None, bytes]:
        return await backend.count_tokens(asked), await answer(backend, billed)

    counted, body = with_backend(vllm_address, ask)
    assert counted == msgspec.json.decode(body)["usage"]["prompt_tokens"]


def test_a_prompt_that_is_too_long_is_counted_all_the_same(vllm_address: str) -> None:
    counted = with_backend(
        vllm_address,
        lambda backend: backend.count_tokens(call(messages=[{"role": "user", "content": "hello " * 5000}])),
    )
    assert counted is not None
    assert counted > 5000


def test_a_probe_says_what_serves_and_how_much_it_reads(vllm_address: str) -> None:
    facts = with_backend(vllm_address, lambda backend: backend.probe())
    assert facts.software == "vllm"
    assert (facts.context_tokens(MODEL) or 0) >= 1024


def test_a_probe_tells_a_server_from_none(vllm_address: str) -> None:
    with_backend(vllm_address, lambda backend: backend.probe())
    with pytest.raises(Unreachable):
        with_backend(f"http://127.0.0.1:{free_port()}", lambda backend: backend.probe())
