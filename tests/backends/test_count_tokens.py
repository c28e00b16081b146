"""Does a real llama.cpp count a prompt beforehand as it bills it afterwards?"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from backends.backend import Call, Endpoint, ServerFacts, Window
from backends.local import LocalServer, LocalSettings, Patience
from backends.vllm import HttpPool, VllmBackend
from tests.local_models import small_model_path

SAID = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BODIES: list[dict[str, Any]] = [
    {"messages": SAID},
    {"messages": [{"role": "system", "content": "Be brief."}, *SAID], "tools": [TOOL], "n": 2},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Grüße 🙂 <|im_end|>"}]}]},
    {"prompt": "Hello world"},
    {"prompt": '"quoted"\n\ttabs and 你好 <|im_start|>'},
]


async def billed(backend: VllmBackend, endpoint: Endpoint, body: dict[str, Any]) -> int:
    call = Call(endpoint=endpoint, body=(json.dumps({**body, "n": 1, "max_tokens": 1}).encode(),), stream=False)
    async with backend.open(call) as chunks:
        answer = b"".join([piece async for pieces in chunks for piece in pieces])
    tokens: int = json.loads(answer)["usage"]["prompt_tokens"]
    return tokens


def test_tokens_are_counted_beforehand_as_they_are_billed() -> None:
    settings = LocalSettings(name="small", weights=small_model_path(), model_id="tiny", context_tokens=512, parallel=2)

    async def play() -> None:
        server, pool = LocalServer(settings, Patience(start_s=60, first_pause_s=0.01)), HttpPool()
        await server.start()
        try:
            assert server.base_url is not None
            backend = VllmBackend(pool, url=server.base_url)
            assert await backend.probe() == ServerFacts(software="llamacpp", windows=(Window("tiny", 512),))
            for body in BODIES:
                endpoint: Endpoint = "chat/completions" if "messages" in body else "completions"
                asked = Call(endpoint=endpoint, body=(json.dumps({**body, "stream": True}).encode(),), stream=True)
                assert await backend.count_tokens(asked) == await billed(backend, endpoint, body), body
            batch = Call(endpoint="completions", body=(b'{"prompt":["a","b"]}',), stream=False)
            assert await backend.count_tokens(batch) is None
        finally:
            await pool.close()
            await server.stop()

    asyncio.run(play())
