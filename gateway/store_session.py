"""Is it still the same server with the same data? What a process knows of the store, for one partition of it."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.limits_script import Answer, Command, Open, Opened, decode, encode
from gateway.redis_store import RedisStore, Script, ServerChanged, StoreMisused
from policies.operations import Stale


class Session:
    """Whatever is run here is run by the server and under the epoch that were opened, or not at all."""

    def __init__(self, store: RedisStore, script: Script, key: str, *, ledger: bool = False) -> None:
        self.epoch = ""
        self._ledger = ledger
        self.timeout_s = store.timeout_s
        self._store = store
        self._script = script
        self._key = key
        self._server = ""
        self._heard_ms = 0

    @property
    def place(self) -> str:
        """What fails together with this partition."""
        return self._store.place_of(self._key)

    async def open(self, *, within_s: float) -> Opened:
        """Find out who answers, and tell it what was known before. Raises StoreDown and StoreMisused."""
        server = await self._store.server_of(self._key, within_s=within_s)
        arguments = encode(self.epoch, [Open(server, self.epoch, self._heard_ms, self._ledger)])
        (opened,) = decode(await self._store.run(self._script, self._key, arguments, server=server, within_s=within_s))
        if not isinstance(opened, Opened):
            raise StoreMisused(f"opening was answered with {type(opened).__name__}")
        self._server, self.epoch, self._heard_ms = server, opened.epoch, opened.now_ms
        return opened

    def heard(self, now_ms: int) -> None:
        """Remember the time of the last sign of life that the store has confirmed: what it may forget is younger."""
        self._heard_ms = now_ms

    async def run(self, commands: Sequence[Command], *, within_s: float) -> list[Answer]:
        """Run all of them at one moment. Raises StoreDown and StoreMisused; ServerChanged: nothing was done."""
        arguments = encode(self.epoch, commands)
        replies = await self._store.run(self._script, self._key, arguments, server=self._server, within_s=within_s)
        answers = decode(replies)
        for answer in answers:
            if isinstance(answer, Stale):
                raise ServerChanged(self._server)
        return answers
