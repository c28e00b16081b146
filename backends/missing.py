"""What if a backend that was configured is not there at all? It cannot be reached, and says why."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from backends.backend import AnswerStream, Call, ServerFacts, Unreachable


class MissingBackend:
    """Stands in for a server that could not be started."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def open(self, call: Call) -> AbstractAsyncContextManager[AnswerStream]:
        """Raise `Unreachable`."""
        raise Unreachable(self._reason)

    async def probe(self) -> ServerFacts:
        """Raise `Unreachable`."""
        raise Unreachable(self._reason)

    async def count_tokens(self, call: Call) -> int | None:
        """Raise `Unreachable`."""
        raise Unreachable(self._reason)
