"""Does a question to a child process always end, whatever becomes of the child?"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway import child as child_module
from gateway.child import Child

ECHO = """
from gateway.child import serve
import os
serve(lambda head, load: os._exit(3) if head == b"die" else (head[::-1], load + head))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that a child can run."""
    (tmp_path / "echoing.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    return "echoing"


def using(module: str, act: Callable[[Child], Awaitable[None]]) -> None:
    async def run() -> None:
        child = Child(module)
        try:
            async with asyncio.timeout(20):
                await act(child)
        finally:
            await child.close()

    assert sys.executable
    asyncio.run(run())


async def echo(child: Child, head: bytes, load: bytes) -> None:
    told, parts = await child.ask(head, load)
    assert (told, b"".join(parts)) == (head[::-1], load + head)


def test_questions_of_any_size_are_answered_in_order(module: str) -> None:
    async def act(child: Child) -> None:
        await asyncio.gather(*(echo(child, b"ab%d" % size, b"x" * size) for size in (0, 1, 70_000, 3_000_000, 0)))

    using(module, act)


def test_what_kills_the_child_twice_is_told_and_the_next_question_has_another_child(module: str) -> None:
    async def act(child: Child) -> None:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await child.ask(b"die", b"x" * 1_000_000)
        await echo(child, b"ab", b"y")

    using(module, act)


def test_a_child_that_works_for_too_long_is_killed_and_the_next_question_has_another(module: str) -> None:
    async def act(child: Child) -> None:
        await echo(child, b"ab", b"")
        first = child.process
        assert first is not None
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await child.ask(b"cd", b"x", limit_s=0.02)
        assert await first.wait() == -signal.SIGKILL
        await echo(child, b"ef", b"y")

    using(module, act)


def test_closing_waits_for_no_work_and_nothing_is_started_after_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_GRACE_S", 0.02)

    async def act(child: Child) -> None:
        await echo(child, b"ab", b"")
        process = child.process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        asking = asyncio.create_task(child.ask(b"cd", b"x"))
        await asyncio.sleep(0)
        await child.close()
        assert process.returncode == -signal.SIGKILL
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asking
        with pytest.raises(ConnectionError):
            await child.ask(b"cd", b"x")
        assert child.process is None

    using(module, act)
