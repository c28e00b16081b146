"""How is the event loop kept free while the ledger is asked? Questions block, so each is asked in a thread of a few."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class Desk:
    """Answers some questions at a time; others wait.

    A question that takes too long is given up, but a thread cannot be stopped: its place is free once it is done, so
    questions that hang never become more than there are places.
    """

    def __init__(self, at_once: int, *, longest_s: float) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="ledger-desk")
        self._longest_s = longest_s

    async def ask(self, question: Callable[[], _T]) -> _T:
        """Return the answer. Raises what `question` does, and TimeoutError."""
        async with asyncio.timeout(self._longest_s):
            return await asyncio.get_running_loop().run_in_executor(self._threads, question)
