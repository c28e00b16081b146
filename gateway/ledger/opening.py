"""Where does the configuration keep its ledger? For those who read it beside a gateway, or without one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.secrets import SecretError, resolve
from gateway.ledger.contract import LedgerDown
from gateway.ledger.sqlite import SqliteStore

if TYPE_CHECKING:
    from gateway.ledger.postgres import PostgresStore


def open_store(loaded: Loaded, environ: Mapping[str, str] = os.environ) -> SqliteStore | PostgresStore:
    """Return the store that a configuration names. Connects to nothing yet; only its own secret is resolved.

    Raises `LedgerDown` where nothing is kept, or the address cannot be had.
    """
    store = loaded.config.ledger.store
    if isinstance(store, noun.NoLedger):
        raise LedgerDown(
            "This configuration keeps no ledger (`ledger.store` is of kind `none`): there is nothing to read."
        )
    if isinstance(store, noun.SqliteLedger):
        return SqliteStore(loaded.beside(str(Path(store.path).expanduser())))
    try:
        from gateway.ledger.postgres import PostgresStore  # noqa: PLC0415 - its driver is an extra
    except ImportError as fault:
        raise LedgerDown("A ledger in PostgreSQL needs `pip install 'tierway[postgres]'`.") from fault
    try:
        dsn = resolve(store.dsn, folder=loaded.beside("."), environ=environ).reveal()
        return PostgresStore(dsn, schema=store.schema, timeout_s=store.timeout)
    except SecretError as fault:
        raise LedgerDown(f"The ledger's address (`ledger.store.dsn`) cannot be had: {fault}.") from fault
    except ValueError:
        # The address itself has a password in it.
        raise LedgerDown("The ledger's address (`ledger.store.dsn`) cannot be read as one of PostgreSQL.") from None
