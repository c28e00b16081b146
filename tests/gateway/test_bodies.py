"""Are large bodies read in another process just as small ones are in this one, whatever becomes of that process?"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from backends.backend import Endpoint
from gateway import bodies
from gateway.bodies import BodyReader
from gateway.body import Body, read_body
from gateway.child import FRAME
from gateway.errors import Refusal

T = TypeVar("T")
LIMIT = bodies._INLINE_BYTES
PADDING = "x" * LIMIT


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "messages": [{"role": "user", "content": PADDING}], **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "prompt": PADDING, **fields}).encode()


GOOD: dict[str, tuple[Endpoint, bytes]] = {
    "a chat": ("chat/completions", chat(vendor=[0, None, 2**64 - 1, "é🙂"], n=2, stream=True)),
    "a chat that wants usage": (
        "chat/completions",
        chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    ),
    "a chat that wants scores": ("chat/completions", chat(logprobs=True, top_logprobs=3, tools=[{"type": "f"}])),
    "a completion": ("completions", text(n=2, echo=True, logprobs=0)),
    "token ids": ("completions", text(prompt=[[1] * 30_000, [2]], echo=True)),
    "just too large for here": ("completions", text(prompt="x" * (LIMIT + 1 - len(text(prompt=""))))),
    "a megabyte": ("completions", text(prompt="é" * 500_000)),
}
BAD: dict[str, tuple[Endpoint, bytes]] = {
    "no JSON": ("chat/completions", b"x" * 100_000),
    "no UTF-8": ("chat/completions", b'{"model":"' + b"\xff" * 100_000 + b'"}'),
    "blanks": ("chat/completions", b" " * 100_000),
    "deep nesting": ("chat/completions", b"[" * 200_000),
    "a missing field": ("chat/completions", text()),
    "a wrong type": ("completions", text(max_tokens="many")),
    "a wrong value": ("completions", text(n=0)),
    "a huge integer": ("completions", text(vendor=[10**30])),
    "a message that is none": ("chat/completions", chat(messages=[{"role": "user", "content": PADDING}, 7])),
}


def using(act: Callable[[BodyReader], Awaitable[T]]) -> T:
    async def run() -> T:
        reader = BodyReader()
        try:
            async with asyncio.timeout(20):
                return await act(reader)
        finally:
            await reader.close()

    return asyncio.run(run())


def child_of(reader: BodyReader) -> asyncio.subprocess.Process:
    assert reader._child.process is not None
    return reader._child.process


async def refused(reader: BodyReader, endpoint: Endpoint, raw: bytes) -> tuple[str, str, str | None]:
    with pytest.raises(Refusal) as raised:
        await reader.read(endpoint, raw)
    return raised.value.code, raised.value.message, raised.value.param


def refused_here(endpoint: Endpoint, raw: bytes) -> tuple[str, str, str | None]:
    with pytest.raises(Refusal) as raised:
        read_body(endpoint, raw)
    return raised.value.code, raised.value.message, raised.value.param


def test_every_large_body_is_read_as_a_small_one_would_be_by_one_child() -> None:
    async def act(reader: BodyReader) -> None:
        pids = set()
        for name, (endpoint, raw) in GOOD.items():
            assert len(raw) > LIMIT
            found, expected = await reader.read(endpoint, raw), read_body(endpoint, raw)
            assert found == expected, name
            assert found.for_backend("m", scored=True) == expected.for_backend("m", scored=True)
            pids.add(child_of(reader).pid)
        for name, (endpoint, raw) in BAD.items():
            assert len(raw) > LIMIT
            assert await refused(reader, endpoint, raw) == refused_here(endpoint, raw), name
            pids.add(child_of(reader).pid)
        assert len(pids) == 1

    using(act)


def test_small_bodies_start_no_child() -> None:
    async def act(reader: BodyReader) -> None:
        small = text(prompt="x" * (LIMIT - len(text(prompt=""))))
        assert len(small) == LIMIT
        assert await reader.read("completions", small) == read_body("completions", small)
        assert (await refused(reader, "completions", b"{}"))[0] == "missing_required_parameter"
        assert reader._child.process is None

    using(act)


def test_a_child_can_be_started_beforehand() -> None:
    async def act(reader: BodyReader) -> None:
        await reader.open()
        first = child_of(reader).pid
        await reader.read("completions", text())
        assert child_of(reader).pid == first

    using(act)


def test_bodies_that_come_together_are_not_mixed_up() -> None:
    async def act(reader: BodyReader) -> list[Body]:
        return await asyncio.gather(*(reader.read("completions", text(user=str(number))) for number in range(20)))

    for number, body in enumerate(using(act)):
        assert json.loads(b"{" + body.rest)["user"] == str(number)


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_child_was_killed_another_reads_the_next_body(killed: signal.Signals) -> None:
    async def act(reader: BodyReader) -> None:
        await reader.read("completions", text())
        first = child_of(reader)
        os.kill(first.pid, killed)
        # At once, before anybody can have noticed, and again.
        assert await reader.read("completions", text()) == read_body("completions", text())
        assert child_of(reader).pid != first.pid
        assert await reader.read("completions", text()) == read_body("completions", text())
        await first.wait()

    using(act)


def test_a_child_that_is_killed_while_it_reads_costs_nobody_an_answer() -> None:
    async def act(reader: BodyReader) -> None:
        await reader.read("completions", text())
        first = child_of(reader)
        os.kill(first.pid, signal.SIGSTOP)
        reading = [asyncio.create_task(reader.read("completions", text(user=str(number)))) for number in range(3)]
        await asyncio.wait(reading, timeout=0.05)
        os.kill(first.pid, signal.SIGKILL)
        for number, body in enumerate(await asyncio.gather(*reading)):
            assert json.loads(b"{" + body.rest)["user"] == str(number)
        await first.wait()

    using(act)


def test_a_request_that_is_cancelled_in_the_middle_leaves_no_half_reply_behind() -> None:
    async def act(reader: BodyReader) -> None:
        await reader.open()
        large = text(prompt="y" * 3_000_000)
        for _ in range(5):
            reading = asyncio.create_task(reader.read("completions", large))
            await asyncio.wait([reading], timeout=0.002)
            reading.cancel()
            await asyncio.wait([reading])
        assert await reader.read("completions", text()) == read_body("completions", text())

    using(act)


def test_closing_ends_the_child_and_a_reader_can_be_closed_twice() -> None:
    async def act(reader: BodyReader) -> int | None:
        await reader.read("completions", text())
        child = child_of(reader)
        await reader.close()
        await reader.close()
        return child.returncode

    assert using(act) == 0


def test_a_reader_that_never_read_can_be_closed() -> None:
    using(lambda reader: reader.close())


@pytest.mark.parametrize("sent", [b"", b"\x00", FRAME.pack(1, 10) + b"\x0012345"], ids=["idle", "head", "body"])
def test_the_child_ends_when_its_input_does(sent: bytes) -> None:
    async def run() -> tuple[int | None, bytes]:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.bodies", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(20):
            said, _ = await child.communicate(sent)
        return child.returncode, said

    assert asyncio.run(run()) == (0, b"")


def test_the_loop_is_free_while_a_large_body_is_read() -> None:
    async def act(reader: BodyReader) -> float:
        await reader.open()
        loop = asyncio.get_running_loop()
        raw = b'{"model":"m","prompt":"x","vendor":[' + b"[]," * 300_000 + b"0]}"
        reading = asyncio.create_task(reader.read("completions", raw))
        longest_s, last_s = 0.0, loop.time()
        while not reading.done():
            await asyncio.sleep(0)
            longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()
        await reading
        return longest_s

    # Read here it would be hundreds of milliseconds.
    assert min(using(act) for _ in range(3)) < 0.05
