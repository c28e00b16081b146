"""What if no ledger is wanted? Then nothing is kept, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable

from gateway.ledger.rows import Bill, DeliveryRow


class NoLedger:
    """A `Ledger` that forgets."""

    accepting = True

    def begin(self, exchange_id: str, so_far: Callable[[], Bill]) -> None:
        """Forget it."""

    async def write(self, bill: Bill) -> None:
        """Forget it."""

    def write_later(self, bill: Bill) -> None:
        """Forget it."""

    def forget(self, exchange_id: str) -> None:
        """Forget it."""

    def deliver(self, delivery: DeliveryRow) -> None:
        """Forget it."""

    def refuse(self, key: str, code: str) -> None:
        """Forget it."""
