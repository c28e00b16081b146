"""How long does counting a prompt hold the event loop, and how far off are the guesses that cost nothing?"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from backends.scripted import ScriptedBackend
from gateway import counting
from gateway.bodies import BodyReader
from gateway.body import Asked, read_body
from gateway.counting import Count, TokenCounter
from gateway.ranks import Encoding
from tests.gateway.tiny_tokenizer import write_tokenizer
from tests.prove.proof import Figures, Size

_ROOT = Path(__file__).parents[2]
_MB = 1_000_000
_MODEL = "gpt-4o"
_LONGEST_HOLD_MS = 5.0
_ENCODING = "o200k_base"


def run(seed: int, size: Size) -> Figures:
    """Count prompts of a megabyte beside a loop that watches itself, and guess at texts of many kinds."""
    figures: Figures = {}
    chance = random.Random(seed)
    large = {"prose": _prose() * (1 + _MB // len(_prose())), "blanks": " " * _MB, "emoji": "🙂" * (_MB // 4)}
    with tempfile.TemporaryDirectory() as folder:
        path = write_tokenizer(Path(folder), [_prose()], size=2000)
        for name, tokenizer in (("tiktoken", None), ("tokenizers", path)):
            for kind in ("prose",) if size == "test" else large:
                count, hold_ms, gap_ms = asyncio.run(_counted(large[kind][:_MB], tokenizer))
                assert count is not None, f"{kind} by {name}"
                assert hold_ms < _LONGEST_HOLD_MS, f"{kind} by {name}: {hold_ms} ms"
                figures[f"{name}, 1 MB of {kind}: tokens"] = count.tokens
                figures[f"{name}, 1 MB of {kind}: longest hold of the loop, ms of CPU"] = hold_ms
                figures[f"{name}, 1 MB of {kind}: longest gap, ms of time"] = gap_ms
    figures |= _guesses(chance, 40 if size == "test" else 400)
    figures |= _costs()
    return figures


# -- the loop ---------------------------------------------------------------------------------------------------------


async def _counted(text: str, tokenizer: str | None) -> tuple[Count | None, float, float]:
    """Read and count a completion of `text`; return the count and the longest hold and gap of the loop meanwhile."""
    raw = json.dumps({"model": _MODEL, "prompt": text}, ensure_ascii=False).encode()
    bodies = BodyReader()
    counter = TokenCounter({"b": ScriptedBackend(lambda _: [])}, {} if tokenizer is None else {"b": tokenizer})

    async def count() -> Count | None:
        body = await bodies.read("completions", raw)
        found = await counter.exact("b", _MODEL, body)
        until_s = time.monotonic() + 10
        while found is None and time.monotonic() < until_s:
            # Who asks again finds what the first one could not wait for.
            await asyncio.sleep(counting._PATIENCE_S / 10)
            found = await counter.exact("b", _MODEL, body)
        return found

    try:
        await bodies.open()
        await counter.exact("b", _MODEL, read_body("completions", b'{"model":"m","prompt":"warm"}'))
        task = asyncio.create_task(count())
        hold_ms = gap_ms = 0.0
        cpu_s, at_s = time.thread_time(), time.perf_counter()
        while not task.done():
            await asyncio.sleep(0)
            now_cpu_s, now_s = time.thread_time(), time.perf_counter()
            hold_ms, gap_ms = max(hold_ms, 1000 * (now_cpu_s - cpu_s)), max(gap_ms, 1000 * (now_s - at_s))
            cpu_s, at_s = now_cpu_s, now_s
        return await task, round(hold_ms, 2), round(gap_ms, 1)
    finally:
        await bodies.close()
        await counter.close()


# -- guesses ----------------------------------------------------------------------------------------------------------


def _guesses(chance: random.Random, requests: int) -> Figures:
    """Learn from half of the requests of each kind, guess the other half; then of all kinds mixed."""
    encoding = Encoding(_ENCODING)
    kinds = {name: [_request(encoding, text(chance)) for _ in range(requests)] for name, text in _kinds().items()}
    figures: Figures = {}
    mixed = [one for many in kinds.values() for one in many]
    chance.shuffle(mixed)
    for name, many in {**kinds, "all mixed": mixed}.items():
        counter = TokenCounter({})
        first = [counter.bound(_MODEL, asked) / tokens for asked, tokens in many]
        for asked, tokens in many[: len(many) // 2]:
            counter.learn(_MODEL, asked, tokens)
        unseen = many[len(many) // 2 :]
        bounds = [counter.bound(_MODEL, asked) / tokens for asked, tokens in unseen]
        estimates = [counter.estimate(_MODEL, asked) / tokens for asked, tokens in unseen]
        assert all(counter.bound(_MODEL, asked, hard=True) >= tokens for asked, tokens in many), name
        held = sum(one >= 1 for one in bounds) / len(bounds)
        assert held >= (0.9 if requests < 100 else 0.95), f"{name}: the bound held of {held:.1%} only"
        # Of traffic of all kinds at once there is no usual request.
        assert name == "all mixed" or 0.8 < median(estimates) < 1.25, f"{name}: off by {median(estimates):.2f}"
        figures[f"{name}: bound / tokens, untaught, least to most"] = _range(first)
        figures[f"{name}: bound / tokens, least to most"] = _range(bounds)
        figures[f"{name}: bound held, %"] = round(100 * held, 1)
        figures[f"{name}: estimate / tokens, least to most"] = _range(estimates)
    return figures


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}, median {median(values):.2f}"


def _request(encoding: Encoding, text: str) -> tuple[Asked, int]:
    """Return the facts of a chat of `text`, and its true length in OpenAI's template."""
    raw = json.dumps({"model": "auto", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    return read_body("chat/completions", raw.encode()).asked, encoding.count(text)[0] + 7


def _kinds() -> dict[str, Callable[[random.Random], str]]:
    code = "\n".join(path.read_text() for path in sorted((_ROOT / "gateway").glob("*.py")))
    prose = _prose()
    chinese = (
        "我们今天讨论网关的设计原则。每个请求都由最便宜的模型回答,只要它足够自信。上海的天气很好,孩子们在公园里玩耍。"
    )

    def cut(text: str) -> Callable[[random.Random], str]:
        def take(chance: random.Random) -> str:
            start = chance.randrange(len(text) - 10)
            return text[start : start + int(20 * 2 ** chance.uniform(0, 9))]

        return take

    def rows(chance: random.Random) -> str:
        return json.dumps([{"id": chance.randrange(10**6), "ok": chance.random() < 0.5, "x": chance.random()}] * 20)

    def random_bytes(chance: random.Random) -> str:
        return base64.b64encode(chance.randbytes(chance.randrange(100, 5000))).decode()

    return {
        "prose": cut(prose),
        "code": cut(code),
        "Chinese": lambda chance: "".join(chance.choices(chinese, k=chance.randrange(10, 2000))),
        "JSON": rows,
        "base64": random_bytes,
    }


def _prose() -> str:
    return "\n".join((_ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"))


# -- costs ------------------------------------------------------------------------------------------------------------


def _costs() -> Figures:
    counter = TokenCounter({})
    asked = read_body("chat/completions", b'{"model":"m","messages":[{"role":"user","content":"hello"}]}').asked
    for number in range(300):
        counter.learn(_MODEL, asked, 10 + number % 7)
    return {
        "bound, us of CPU": _cpu_us(lambda: counter.bound(_MODEL, asked)),
        "estimate, us of CPU": _cpu_us(lambda: counter.estimate(_MODEL, asked)),
        "learn, us of CPU": _cpu_us(lambda: counter.learn(_MODEL, asked, 12)),
    }


def _cpu_us(act: Callable[[], object], times: int = 5000) -> float:
    best_s = float("inf")
    for _ in range(5):
        began_s = time.process_time()
        for _ in range(times):
            act()
        best_s = min(best_s, time.process_time() - began_s)
    return round(1e6 * best_s / times, 2)
