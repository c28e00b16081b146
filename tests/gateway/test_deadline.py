"""Does a deadline end what takes too long, and nothing else?"""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.deadline import Deadline


def test_what_is_done_in_time_is_left_alone() -> None:
    async def play() -> None:
        async with Deadline(5):
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(play())


def test_what_takes_too_long_is_ended_within_the_time() -> None:
    async def play() -> float:
        began_s = time.monotonic()
        with pytest.raises(TimeoutError, match="not within 20 ms"):
            async with Deadline(0.02):
                await asyncio.Event().wait()
        return time.monotonic() - began_s

    assert asyncio.run(play()) < 1


def test_no_time_is_no_time() -> None:
    async def play() -> None:
        with pytest.raises(TimeoutError):
            async with Deadline(-1):
                await asyncio.Event().wait()

    asyncio.run(play())


def test_who_is_cancelled_by_somebody_else_is_cancelled() -> None:
    async def wait() -> None:
        async with Deadline(5):
            await asyncio.Event().wait()

    async def play() -> None:
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())


def test_a_fault_inside_is_passed_on() -> None:
    async def play() -> None:
        async with Deadline(5):
            raise ValueError

    with pytest.raises(ValueError):
        asyncio.run(play())
