"""Who deletes what need not be kept any longer? A task of one process, once an hour, a few rows at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import sleep, time

from gateway.ledger.contract import LedgerDown
from gateway.ledger.retention import Keeper, prune

_EVERY_S = 3600.0
_PAUSE_S = 0.02

_log = logging.getLogger("tierway.ledger")


class Pruner:
    """Keeps rows for `keep_s` (None: for ever) and inputs of decisions for `inputs_s`.

    `keeper` is its own, and used by nobody else. `pause` is made after each few rows, so that bills go first.
    """

    def __init__(
        self,
        keeper: Keeper,
        *,
        keep_s: float | None,
        inputs_s: float,
        now_ms: Callable[[], int] = lambda: int(time() * 1000),
        pause: Callable[[], None] = lambda: sleep(_PAUSE_S),
    ) -> None:
        self._keeper = keeper
        self._keep_s = keep_s
        self._inputs_s = inputs_s
        self._now_ms = now_ms
        self._pause = pause
        self._stopping = False

    async def keep_pruning(self) -> None:
        """Delete for ever."""
        while True:
            try:
                await self.look()
            except LedgerDown as down:
                _log.warning("old rows cannot be deleted now: %s", down)
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> dict[str, int]:
        """Delete what is old now; return how many exchanges and inputs of decisions that was. Raises `LedgerDown`."""
        self._stopping = False
        work = asyncio.get_running_loop().run_in_executor(None, self._prune)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # A thread cannot be stopped: it is told to, and waited for.
            self._stopping = True
            await asyncio.wait([work])
            raise

    def _prune(self) -> dict[str, int]:
        def go_on() -> bool:
            self._pause()
            return not self._stopping

        now_ms = self._now_ms()
        return prune(
            self._keeper,
            before_ms=None if self._keep_s is None else now_ms - round(self._keep_s * 1000),
            inputs_before_ms=now_ms - round(self._inputs_s * 1000),
            now_ms=now_ms,
            pause=go_on,
        )
