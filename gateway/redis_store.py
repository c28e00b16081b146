"""How is Redis asked? Scripts and single commands, each within a time, and never a server that was not meant.

This module and `gateway/redis_line.py` alone know redis-py, and take of it what is hard: the handshake, the errors, the
slots. Its pool and its cluster client are passed over: their waits add up (a timeout for the pool, the connect, each
write and each read), they try again what may have been done already, and they do not say which server answered.

Rules a reader must not break:

* A call is over within its time, connecting included, whatever the server does.
* A connection whose call did not come to its end is closed: no answer can meet the next question.
* Nothing is sent twice unless the server said that it did not do it (NOSCRIPT, MOVED, ASK).
* A connection knows the run id of its server. A restarted server or another one has another run id, so what must only
  be done by the server that was asked before says so (`server`), and is not sent anywhere else.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha1
from typing import TypeVar

import msgspec
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as LostError

from gateway.deadline import Deadline
from gateway.redis_line import Address, Dial, Line, Place, Reply, Tls, packed

__all__ = (
    "Address",
    "ConnectionDropped",
    "Place",
    "RedisStore",
    "Reply",
    "Script",
    "ServerChanged",
    "StoreDown",
    "StoreMisused",
    "Tls",
)

_LINES = 8
_NOT_NOW = (ClusterDownError, MasterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
# A script passes on what its commands were told: "ERR Error running script (...): -READONLY ...".
_NOT_NOW_CODE = re.compile(r"(?:^|: -|@)(?:MISCONF|NOREPLICAS|BUSY|LOADING|READONLY|OOM|MASTERDOWN|CLUSTERDOWN)\b")

T = TypeVar("T")
_Perform = Callable[[Line, tuple[bytes, ...]], Awaitable[T]]
_ASKING = (packed((b"ASKING",)),)


class StoreDown(Exception):  # noqa: N818 - it names a state, as the faults of backends do
    """The store did not do it, or nobody knows whether it did: unreachable, late, loading, full, read-only."""


class ConnectionDropped(StoreDown):
    """The connection broke, which need not be the server's fault; nobody knows whether it was done."""


class ServerChanged(StoreDown):
    """The key is now with another server than was meant; nothing was sent. `server` is its run id."""

    def __init__(self, server: str) -> None:
        super().__init__(f"another server answers: {server}")
        self.server = server


class StoreMisused(Exception):  # noqa: N818
    """The server understood and said no: a mistake in a command or script of ours."""


class Script(msgspec.Struct, frozen=True):
    """A Lua script and its SHA-1, which is how Redis calls it."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        """Name a script."""
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class RedisStore:
    """The store at `place`. To be used in one event loop; connects when first asked."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.timeout_s = place.timeout_s
        self._dial = Dial(place)
        self._nodes: dict[Address | None, _Node] = {}
        self._slots: list[Address | None] = []

    async def run(
        self,
        script: Script,
        key: str,
        arguments: Sequence[bytes],
        *,
        server: str | None = None,
        within_s: float | None = None,
    ) -> list[bytes]:
        """Run `script` on `key`; its answer must be an array of strings.

        Raises StoreDown, ServerChanged where the server is not `server`, and StoreMisused.
        """
        name = key.encode()
        call = packed((b"EVALSHA", script.sha.encode(), b"1", name, *arguments))

        async def perform(line: Line, before: tuple[bytes, ...]) -> Reply:
            if server is not None and line.server != server:
                raise ServerChanged(line.server)
            try:
                return await line.ask(*before, call)
            except NoScriptError:
                # The whole script does what it does and is known from then on.
                whole = packed((b"EVAL", script.text.encode(), b"1", name, *arguments))
                return await line.ask(*before, whole)

        reply = await self._bounded(self._routed(name, perform), within_s)
        if not isinstance(reply, list):
            raise StoreMisused(f"the script answered {type(reply).__name__}, not an array")
        return [part for part in reply if isinstance(part, bytes)]

    async def command(self, *parts: bytes | str | int, within_s: float | None = None) -> Reply:
        """Perform one command whose first argument is its only key. Raises StoreDown and StoreMisused."""
        encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
        call = packed(encoded)

        async def perform(line: Line, before: tuple[bytes, ...]) -> Reply:
            return await line.ask(*before, call)

        return await self._bounded(self._routed(encoded[1] if len(encoded) > 1 else b"", perform), within_s)

    async def server_of(self, key: str, *, within_s: float | None = None) -> str:
        """Find the run id of the server that has `key`, asked now. Raises StoreDown."""
        ping = packed((b"EXISTS", key.encode()))

        async def perform(line: Line, before: tuple[bytes, ...]) -> str:
            # A connection that is open may be to a server that has gone; only an answer proves it.
            await line.ask(*before, ping)
            return line.server

        return await self._bounded(self._routed(key.encode(), perform), within_s)

    def place_of(self, key: str) -> str:
        """Say what fails together with `key`: a name for the server that has it, as far as that is known."""
        if self.place.mode != "cluster" or not self._slots:
            return ""
        address = self._slots[key_slot(key.encode())]
        return "" if address is None else f"{address[0]}:{address[1]}"

    async def close(self) -> None:
        """Close every connection. Calls under way fail."""
        for node in self._nodes.values():
            node.close()
        self._nodes.clear()
        await asyncio.sleep(0)

    async def _bounded(self, doing: Awaitable[T], within_s: float | None) -> T:
        """Await `doing` for so long, and say what became of it in our own words."""
        try:
            async with Deadline(self.timeout_s if within_s is None else within_s):
                return await doing
        except TimeoutError as late:
            raise StoreDown(str(late)) from None
        except (LostError, OSError) as fault:
            raise ConnectionDropped(str(fault) or type(fault).__name__) from None
        except _NOT_NOW as fault:
            self._forget()
            raise StoreDown(f"{type(fault).__name__}: {fault}") from None
        except ResponseError as fault:
            if _NOT_NOW_CODE.search(str(fault)):
                self._forget()
                raise StoreDown(str(fault)) from None
            raise StoreMisused(str(fault)) from None
        except RedisError as fault:
            self._forget()
            raise StoreDown(f"{type(fault).__name__}: {fault}") from None

    async def _routed(self, key: bytes, perform: _Perform[T]) -> T:
        """Perform on a connection to the server of `key`; follow it once where the cluster says that it has moved."""
        if self.place.mode != "cluster":
            return await self._on(None, perform)
        if not self._slots:
            self._slots = await self._dial.slots()
        slot = key_slot(key)
        try:
            try:
                return await self._on(self._slots[slot], perform)
            except MovedError as moved:
                address = self._slots[slot] = (moved.host or "", moved.port)
                return await self._on(address, perform)
            except AskError as ask:
                return await self._on((ask.host, ask.port), perform, _ASKING)
        except (LostError, OSError, asyncio.CancelledError):
            # The node may have gone for good; who took its slots is asked anew.
            self._slots = []
            raise

    async def _on(self, address: Address | None, perform: _Perform[T], before: tuple[bytes, ...] = ()) -> T:
        node = self._nodes.get(address)
        if node is None:
            if self.place.mode == "cluster" and address is None:
                raise ClusterDownError("nobody has the slot")
            node = self._nodes[address] = _Node(self._dial, address)
        line = await node.take()
        try:
            result = await perform(line, before)
        except BaseException as fault:
            node.give(line)
            if isinstance(fault, (LostError, OSError, ReadOnlyError)):
                # The others lead to the same server.
                node.close_idle()
            raise
        node.give(line)
        return result

    def _forget(self) -> None:
        """Look again for who is where: what a server answered says that another may have its place."""
        self._slots = []
        for node in self._nodes.values():
            node.close_idle()


class _Node:
    """The connections to one server: few, because what can be sent together is."""

    def __init__(self, dial: Dial, address: Address | None) -> None:
        self._dial = dial
        self._address = address
        self._idle: list[Line] = []
        self._taken: set[Line] = set()
        self._dialling = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> Line:
        while True:
            while self._idle:
                line = self._idle.pop()
                if line.usable:
                    self._taken.add(line)
                    return line
                line.close()
            if len(self._taken) + self._dialling < _LINES:
                break
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()
                raise
        self._dialling += 1
        try:
            line = await self._dial.connect(self._address)
        except BaseException:
            self._wake()
            raise
        finally:
            self._dialling -= 1
        self._taken.add(line)
        return line

    def give(self, line: Line) -> None:
        known = line in self._taken
        self._taken.discard(line)
        if known and line.usable:
            self._idle.append(line)
        else:
            line.close()
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def close_idle(self) -> None:
        for line in self._idle:
            line.close()
        self._idle.clear()

    def close(self) -> None:
        self.close_idle()
        for line in self._taken:
            line.close()
        self._taken.clear()
