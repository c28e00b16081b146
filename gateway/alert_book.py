"""Who tells of an alert, and who has been told? Kept in the ledger, so that one process tells and none forgets.

Whoever finds something writes a row under the id of what happened; the first one that is written counts, and its
process tells. Whoever has been told is noted beside it. What a dead process has not told is taken over the same way.
Everything here blocks, and belongs in one thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

import msgspec

from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.rows import AlertEndingRow, AlertRow

Kind = Literal["budget.threshold", "spend.anomaly", "ledger.unwritable"]

KINDS: tuple[Kind, ...] = ("budget.threshold", "spend.anomaly", "ledger.unwritable")

_MOST = 1000
_MINE = "SELECT instance FROM alerts WHERE id = ? AND claim = ?"
_LATEST = """
    SELECT id, claim, at_ms, claimed_ms, kind, payload, instance FROM alerts
    WHERE at_ms >= ? AND claim = (SELECT MAX(later.claim) FROM alerts later WHERE later.id = alerts.id)
    ORDER BY at_ms DESC LIMIT ?
"""
_ENDED = "SELECT id, webhook FROM alert_endings WHERE at_ms >= ?"
_HEARD = "SELECT instance FROM instances WHERE heard_ms >= ?"


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """Something somebody should hear of. `id` says what happened: whoever finds the same finds the same id."""

    id: str
    at_ms: int
    kind: Kind
    payload: str


class Open(msgspec.Struct, frozen=True):
    """An alert that this process has to tell, and the webhooks that know it already."""

    alert: Alert
    told: frozenset[str]


class AlertBook:
    """The alerts of a ledger, as process `instance` sees them. Another one is dead after `lease_s` of silence."""

    def __init__(self, store: Store, *, instance: str, lease_s: float) -> None:
        self._store = store
        self._instance = instance
        self._lease_ms = round(lease_s * 1000)

    def claim(self, alert: Alert, now_ms: int) -> bool:
        """Return whether nobody knew of it, and it is this process that tells. Raises `LedgerDown`."""
        if self._owner(alert.id, 1) is not None:
            return False
        return self._take(alert, 1, now_ms)

    def end(self, id_: str, webhook: str, ending: str, now_ms: int) -> None:
        """Note what became of it at a webhook. Raises `LedgerDown`."""
        self._store.write([AlertEndingRow(id=id_, webhook=webhook, at_ms=now_ms, ending=ending)])

    def unfinished(self, webhooks: Collection[str], since_ms: int, now_ms: int) -> list[Open]:
        """Return what this process has to tell of what was found since; what dead ones had to is taken over.

        Raises `LedgerDown`.
        """
        with self._store.reading() as reading:
            rows = list(reading.rows(_LATEST, (since_ms, _MOST)))
            told: dict[str, set[str]] = {}
            for id_, webhook in reading.rows(_ENDED, (since_ms,)):
                told.setdefault(str(id_), set()).add(str(webhook))
            alive = {str(name) for (name,) in reading.rows(_HEARD, (now_ms - self._lease_ms,))}
        latest = (msgspec.convert(dict(zip(AlertRow.__struct_fields__, row, strict=True)), AlertRow) for row in rows)
        return list(self._mine(latest, told, alive, webhooks, now_ms))

    def _mine(
        self,
        latest: Iterator[AlertRow],
        told: dict[str, set[str]],
        alive: set[str],
        webhooks: Collection[str],
        now_ms: int,
    ) -> Iterator[Open]:
        for row in latest:
            known = frozenset(told.get(row.id, ()))
            if known.issuperset(webhooks):
                continue
            alert = msgspec.convert(row, Alert, from_attributes=True)
            if row.instance != self._instance:
                # A process that has only begun may not have been heard of yet.
                if row.instance in alive or row.claimed_ms > now_ms - self._lease_ms:
                    continue
                if not self._take(alert, row.claim + 1, now_ms):
                    continue
            yield Open(alert, known)

    def _take(self, alert: Alert, claim: int, now_ms: int) -> bool:
        self._store.write(
            [
                AlertRow(
                    id=alert.id,
                    claim=claim,
                    at_ms=alert.at_ms,
                    claimed_ms=now_ms,
                    kind=alert.kind,
                    payload=alert.payload,
                    instance=self._instance,
                )
            ]
        )
        owner = self._owner(alert.id, claim)
        if owner is None:
            raise LedgerDown("an alert that was written cannot be read")
        return owner == self._instance

    def _owner(self, id_: str, claim: int) -> str | None:
        with self._store.reading() as reading:
            return next((str(name) for (name,) in reading.rows(_MINE, (id_, claim))), None)

    def close(self) -> None:
        """Close the store."""
        self._store.close()
