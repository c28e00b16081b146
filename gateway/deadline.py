"""How long may this take? A time limit for one block of a coroutine, fair to what has come in already."""

from __future__ import annotations

import asyncio
from types import TracebackType

_KEPT_BACK = 0.05
_LOOK_S = 0.0005


class Deadline:
    """As `asyncio.timeout`, but a loop that was held up itself reads what has come in before it gives up.

    Raises TimeoutError.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline is of a task")
        self._task = task
        self._loop = asyncio.get_running_loop()
        # Something is kept back, so that the caller hears of it within the time.
        self._end_s = self._loop.time() + self._seconds * (1 - _KEPT_BACK)
        self._timer = self._loop.call_at(self._end_s - self._seconds * _KEPT_BACK, self._look_again)

    def _look_again(self) -> None:
        self._timer = self._loop.call_at(max(self._end_s, self._loop.time() + _LOOK_S), self._give_up)

    def _give_up(self) -> None:
        self._over = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._over and self._task.uncancel() <= 0 and kind is asyncio.CancelledError:
            raise TimeoutError(f"not within {1000 * self._seconds:.3g} ms") from None
