"""Does the official client get real answers of a real model, and does the model go when the gateway goes?"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.local_models import small_model_path
from tests.running import ALICE, KEYS, Gateway, Process, alive, descendants, folder_for_a_test, wait_until

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France? One word."}]
Starter = Callable[..., Gateway]


def config() -> dict[str, Any]:
    return {
        "backends": {
            "one": {
                "kind": "local",
                "weights": str(small_model_path()),
                "model": "real-135m",
                "context_tokens": 512,
                "parallel": 2,
            }
        },
        "tiers": [{"name": "small", "backends": ["one"], "price": {"input": 0.02, "output": 0.04}}],
        "routes": {"auto": {"steps": [{"tier": "small", "doubt_below": 0.1}]}},
        "keys": KEYS,
    }


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with folder_for_a_test() as folder:
        yield folder


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    with Gateway(config(), folder) as gateway:
        yield gateway


def models(gateway: Gateway) -> list[int]:
    """Return the process ids of the model servers."""
    found = []
    for pid in descendants(gateway.pid):
        try:
            if b"backends.model_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("model", ["auto", "small", "real-135m"])
def test_whole_and_streamed_say_the_same(gateway: Gateway, model: str) -> None:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=ALICE) as client:
        given: Any = {"model": model, "messages": ASK, "max_tokens": 8, "temperature": 0}
        raw = client.chat.completions.with_raw_response.create(**given)
        whole = raw.parse()
        assert whole.model == "real-135m"
        assert whole.usage is not None
        assert whole.usage.completion_tokens > 0
        assert whole.choices[0].logprobs is None
        assert "Paris" in (whole.choices[0].message.content or "")
        assert raw.headers["x-tierway-tier"] == "small"
        assert float(raw.headers["x-tierway-cost-usd"]) > 0
        if model == "auto":
            assert 0.1 <= float(raw.headers["x-tierway-confidence"]) <= 1
        chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
        assert (
            "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
            == whole.choices[0].message.content
        )
        assert len({chunk.id for chunk in chunks}) == 1
        assert all(choice.logprobs is None for chunk in chunks for choice in chunk.choices)
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert not chunks[-1].choices


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_that_were_asked_for_come(gateway: Gateway, top: int) -> None:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=ALICE) as client:
        answer = client.chat.completions.create(
            model="auto", messages=ASK, max_tokens=4, logprobs=True, top_logprobs=top
        )
        scores = answer.choices[0].logprobs
        assert scores is not None
        assert scores.content
        assert {len(one.top_logprobs) for one in scores.content} == {top}


def test_text_completions(gateway: Gateway) -> None:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=ALICE) as client:
        given: Any = {"model": "auto", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        whole = client.completions.create(**given)
        assert whole.choices[0].text
        chunks = list(client.completions.create(**given, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_async_and_several_at_once(gateway: Gateway) -> None:
    async def play() -> list[str]:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=ALICE) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="auto", messages=ASK, max_tokens=6, stream=True, temperature=0
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(one(), one(), one()))

    assert all("Paris" in said for said in asyncio.run(play()))


def test_a_client_that_leaves_frees_the_model(gateway: Gateway) -> None:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=ALICE) as client:
        for _ in range(2):  # as many as the model takes at once
            stream = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": "Count to one hundred."}],
                max_tokens=400,
                stream=True,
            )
            next(iter(stream))
            stream.close()
        answer = client.with_options(timeout=5, max_retries=0).chat.completions.create(
            model="auto", messages=ASK, max_tokens=2
        )
        assert answer.choices[0].message.content


def test_a_killed_model_comes_back(gateway: Gateway) -> None:
    (before,) = models(gateway)
    os.kill(before, signal.SIGKILL)
    reply = gateway.chat(max_tokens=2)
    assert reply.status in (200, 502), "it is the only tier"
    assert wait_until(lambda: gateway.get("/readyz").status == 200 and models(gateway) not in ([], [before]), 15, 0.05)
    reply = gateway.chat(max_tokens=2)
    assert reply.status == 200, reply


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill -9", "Ctrl-C", "SIGTERM"]
)
def test_the_model_goes_with_the_gateway(folder: Path, number: signal.Signals) -> None:
    gateway = Gateway(config(), folder)
    family = descendants(gateway.pid)
    assert len(models(gateway)) == 1
    gateway.process.signal(number)
    status = gateway.process.wait(10)
    assert wait_until(lambda: not any(map(alive, family)), 5), [pid for pid in family if alive(pid)]
    said = gateway.process.said()
    assert "Traceback" not in said
    assert "before it was ready" not in said
    assert status == (-number if number == signal.SIGKILL else 0)


def test_the_model_goes_with_the_parent_of_workers(folder: Path) -> None:
    gateway = Gateway(config(), folder, "--workers", "2")
    assert wait_until(lambda: len(descendants(gateway.pid)) >= 3)
    assert len(models(gateway)) == 1, "one model, however many workers"
    assert gateway.chat(max_tokens=2).status == 200
    family = descendants(gateway.pid)
    gateway.process.kill()
    assert wait_until(lambda: not any(map(alive, family)), 5), [pid for pid in family if alive(pid)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_the_model_goes_though_it_was_still_loading(folder: Path, number: signal.Signals) -> None:
    path = folder / "loading.yaml"
    path.write_text(json.dumps(config()))
    gateway = Process(
        ["-m", "gateway.cli", "serve", "--config", str(path), "--port", "0"], folder / f"loading-{number}.log"
    )
    assert wait_until(lambda: len(descendants(gateway.pid)) == 1)
    family = descendants(gateway.pid)
    gateway.signal(number)
    assert gateway.wait(10) == (-number if number == signal.SIGKILL else 0)
    assert wait_until(lambda: not any(map(alive, family)), 5), [pid for pid in family if alive(pid)]
    assert "Traceback" not in gateway.said()
