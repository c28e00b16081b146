"""Do budgets stand where the ledger says they should? The accounts of the state store, compared with the rows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Protocol

import msgspec

from gateway.admission import Admission
from gateway.ledger.contract import Store
from gateway.ledger.spent import Spending, entry_of
from gateway.ledger.verify import Finding, found
from gateway.limiter import Item
from policies.accounts import Entry, Standing

_EVER_MS = 1 << 52
_TRIES = 4


class Books(Protocol):
    """Where budgets are counted."""

    async def look(self, partition: str, items: tuple[Item, ...]) -> tuple[Standing, ...]:
        """Tell how accounts stand."""
        ...


class _Due(msgspec.Struct):
    partition: str
    entry: Entry
    nusd: int = 0


async def compare(
    books: Books,
    admission: Admission,
    store: Store,
    *,
    now_ms: Callable[[], int],
    pause: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0.5),
) -> Finding:
    """Compare every budget that has spent anything. Raises `LedgerDown`.

    Gateways may go on meanwhile: what is settled while it is looked at lies between what the ledger had before and what
    it has after, and is looked at again. What stays apart is a difference.
    """
    spending = Spending(admission)
    apart: dict[str, str | None] = {}
    before = await asyncio.to_thread(_due, spending, store, now_ms())
    for attempt in range(_TRIES):
        standings = {
            name: (await books.look(one.partition, (Item(one.entry, "open"),)))[0] for name, one in before.items()
        }
        after = await asyncio.to_thread(_due, spending, store, now_ms())
        apart = dict(_apart(before, standings, after))
        if not any(apart.values()) or attempt == _TRIES - 1:
            break
        await pause()
        before = after
    return found("every budget stands where the ledger says", iter(apart.values()))


def _due(spending: Spending, store: Store, now_ms: int) -> dict[str, _Due]:
    due: dict[str, _Due] = {}
    with store.reading() as reading:
        for amount in spending.totals(reading, now_ms=now_ms, before_ms=_EVER_MS):
            one = due.setdefault(amount.account.name, _Due(amount.partition, entry_of(amount.account, 0, now_ms)))
            one.nusd += amount.nusd
    return due


def _apart(
    before: Mapping[str, _Due], standings: Mapping[str, Standing], after: Mapping[str, _Due]
) -> Iterator[tuple[str, str | None]]:
    for name, standing in standings.items():
        first, last = before[name].nusd, after[name].nusd if name in after else 0
        if min(first, last) <= standing.used <= max(first, last):
            yield name, None
        else:
            over = f"{standing.used - last:+} nano-dollars, {standing.reserved} reserved"
            yield name, f"{name}: used {standing.used}, the ledger has {last} ({over})"
