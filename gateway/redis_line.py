"""How is one connection to Redis made, and what is said on it? One question at a time, one answer to each.

redis-py connects, speaks TLS, logs in and names the errors. Once that is done the connection is taken over by a
protocol of forty lines, which needs half of the CPU of redis-py's streams for one answer, a quarter for sixty-four.

A connection knows the run id of its server: a restarted server or another one has another.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec
from redis._parsers import BaseParser
from redis.asyncio.connection import Connection
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as LostError

Address = tuple[str, int]
Reply = bytes | int | list["Reply"] | None
T = TypeVar("T")


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """`ca` is a file of certificates to trust (None: the system's); `server_name` what the certificate must be for."""

    ca: str | None = None
    server_name: str | None = None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the store is: the server, or the sentinels of `master`, or some nodes of a cluster."""

    addresses: tuple[Address, ...]
    mode: Literal["standalone", "sentinel", "cluster"] = "standalone"
    master: str | None = None
    database: int = 0
    user: str | None = None
    password: str | None = None
    tls: Tls | None = None
    timeout_s: float = 0.05

    def __repr__(self) -> str:
        return f"Place({self.mode} {self.addresses})"


class _Wire(Connection):
    """redis-py's connection, without time limits (the call as a whole has one), told how TLS is spoken here."""

    def __init__(
        self, address: Address, place: Place, tls: ssl.SSLContext | None, *, known: bool, database: int
    ) -> None:
        self._ssl = tls
        self._server_name = (place.tls and place.tls.server_name) or address[0]
        super().__init__(
            host=address[0],
            port=address[1],
            db=database,
            username=place.user if known else None,
            password=place.password if known else None,
            socket_timeout=None,
            socket_connect_timeout=None,
            driver_info=None,
            protocol=2,
        )

    def _connection_arguments(self) -> Mapping[str, object]:
        plain: Mapping[str, object] = super()._connection_arguments()
        return plain if self._ssl is None else {**plain, "ssl": self._ssl, "server_hostname": self._server_name}

    def take_over(self, protocol: asyncio.Protocol) -> asyncio.WriteTransport:
        """Let `protocol` have what comes from now on. Nothing may be outstanding."""
        if self._writer is None:
            raise LostError("the connection was closed")
        transport = self._writer.transport
        transport.set_protocol(protocol)
        return transport

    def hang_up(self) -> None:
        """Close at once; redis-py's own `disconnect` waits for the other side."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._reader = None


class Line(asyncio.Protocol):
    """One connection that is open and logged in, for one call at a time. `server` is the run id of who answers."""

    def __init__(self, wire: _Wire) -> None:
        self.server = "unknown"
        self._wire = wire
        self._came = b""
        self._answer: asyncio.Future[Reply | ResponseError] | None = None
        self._lost = False
        self._transport = wire.take_over(self)

    @property
    def usable(self) -> bool:
        """Whether it is open, as far as this side has heard, and no answer is outstanding."""
        return not self._lost and self._answer is None

    async def ask(self, *calls: bytes) -> Reply:
        """Send packed commands and return the last answer. Raises redis-py's errors.

        A call that is cancelled leaves an answer outstanding, and the line is not usable any more.
        """
        for call in calls[:-1]:
            await self.ask(call)
        if not self.usable:
            raise LostError("the connection was closed")
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(calls[-1])
        reply: Reply | ResponseError = await answer
        self._answer = None
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    def data_received(self, data: bytes) -> None:
        self._came += data
        try:
            reply, end = _parsed(self._came, 0)
        except IndexError:
            return  # there is more to come
        except ValueError as fault:
            self._end(LostError(f"not an answer of Redis: {fault}"))
            return
        except LostError as fault:
            self._end(fault)
            return
        if self._answer is None or self._answer.done() or end < len(self._came):
            self._end(LostError("an answer that nobody waits for"))
            return
        self._came = b""
        self._answer.set_result(reply)

    def eof_received(self) -> bool:
        self._end(LostError("the server closed the connection"))
        return False

    def connection_lost(self, fault: Exception | None) -> None:
        self._end(LostError(str(fault or "the connection was closed")))

    def _end(self, fault: Exception) -> None:
        self._lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(fault)
        self._wire.hang_up()

    def close(self) -> None:
        """Close at once; a call under way fails."""
        self._end(LostError("the connection was closed"))


class Dial:
    """How a connection is made, and how it is found out to whom."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._context: ssl.SSLContext | None = None

    async def connect(self, address: Address | None) -> Line:
        """Connect to a node, or to the one server there is. Raises redis-py's errors and OSError."""
        place = self._place
        if address is None:
            address = place.addresses[0] if place.mode == "standalone" else await self._master()
        wire = self._wire(address, known=True, database=place.database)
        try:
            await wire.connect()  # type: ignore[no-untyped-call]
            line = Line(wire)
            line.server = _run_id(await line.ask(packed((b"INFO", b"server"))))
            role = await line.ask(packed((b"ROLE",))) if place.mode == "sentinel" else [b"master"]
        except BaseException:
            wire.hang_up()
            raise
        if not isinstance(role, list) or role[0] != b"master":
            wire.hang_up()
            raise ReadOnlyError("the sentinels name a server that is no master")
        return line

    async def slots(self) -> list[Address | None]:
        """Who has which slot of the cluster, from the first of its nodes to answer."""

        async def ask(address: Address) -> list[Address | None]:
            reply = await self._ask_once(address, (b"CLUSTER", b"SLOTS"), known=True)
            slots: list[Address | None] = [None] * 16384
            for row in reply if isinstance(reply, list) else []:
                match row:
                    case [int() as first, int() as last, [bytes() | None as host, int() as port, *_], *_]:
                        owner = (host.decode() if host else address[0], port)
                        slots[first : last + 1] = [owner] * (last + 1 - first)
            if not any(slots):
                raise ClusterDownError("the node knows of no slots")
            return slots

        return await _first([ask(address) for address in self._place.addresses])

    async def _master(self) -> Address:
        """Where the master is, from the first sentinel that knows."""
        name = (self._place.master or "").encode()

        async def ask(address: Address) -> Address:
            parts = (b"SENTINEL", b"get-master-addr-by-name", name)
            try:
                reply = await self._ask_once(address, parts, known=False)
            except AuthenticationError:
                # Sentinels have a password of their own or none; where they want one, it is taken to be the same.
                reply = await self._ask_once(address, parts, known=True)
            match reply:
                case [bytes() as host, bytes() as port]:
                    return host.decode(), int(port)
            raise LostError(f"the sentinel at {address[0]}:{address[1]} knows no {self._place.master}")

        return await _first([ask(address) for address in self._place.addresses])

    async def _ask_once(self, address: Address, parts: tuple[bytes, ...], *, known: bool) -> Reply:
        wire = self._wire(address, known=known, database=0)
        try:
            await wire.connect()  # type: ignore[no-untyped-call]
            return await Line(wire).ask(packed(parts))
        finally:
            wire.hang_up()

    def _wire(self, address: Address, *, known: bool, database: int) -> _Wire:
        """Make a connection that is not connected yet, and says who we are if `known`."""
        return _Wire(address, self._place, self._tls(), known=known, database=database)

    def _tls(self) -> ssl.SSLContext | None:
        tls = self._place.tls
        if tls is not None and self._context is None:
            self._context = ssl.create_default_context(cafile=tls.ca)
        return self._context


async def _first(asks: Sequence[Awaitable[T]]) -> T:
    """Take the first answer of several; raise the last fault where there is none. One that hangs delays nobody."""
    tasks = {asyncio.ensure_future(one) for one in asks}
    fault: BaseException = LostError("there is nobody to ask")
    try:
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (failed := task.exception()) is None:
                    return task.result()
                fault = failed
        raise fault
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_heard)


def _heard(task: asyncio.Future[T]) -> None:
    """Take note of how a task nobody waits for has ended, which asyncio wants."""
    if not task.cancelled():
        task.exception()


def _run_id(told: Reply) -> str:
    lines = told.split(b"\r\n") if isinstance(told, bytes) else []
    return next((line[7:].decode() for line in lines if line.startswith(b"run_id:")), "unknown")


def _parsed(came: bytes, at: int) -> tuple[Reply | ResponseError, int]:
    """Read one answer at `at`: it, and where it ends. Raises IndexError where it has not come whole, and LostError."""
    kind = came[at]
    end = came.find(b"\r\n", at)
    if end < 0:
        raise IndexError
    head = came[at + 1 : end]
    end += 2
    if kind == 36:  # "$": a string of so many bytes
        if head == b"-1":
            return None, end
        stop = end + int(head)
        if len(came) < stop + 2:
            raise IndexError
        return came[end:stop], stop + 2
    if kind == 42:  # "*": an array of so many answers
        if head == b"-1":
            return None, end
        array: list[Reply] = []
        for _ in range(int(head)):
            one, end = _parsed(came, end)
            if isinstance(one, ResponseError):
                return one, end  # no command of ours answers with errors inside
            array.append(one)
        return array, end
    if kind == 58:  # ":"
        return int(head), end
    if kind == 43:  # "+"
        return head, end
    if kind == 45:  # "-"
        return _error(head.decode(errors="replace")), end
    raise ValueError(came[at : at + 16])


def _error(text: str) -> ResponseError:
    """Find redis-py's class for an error. Raises those after which a connection is of no use."""
    fault: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]
    if isinstance(fault, ResponseError):
        return fault
    raise fault if isinstance(fault, LostError) else LostError(text)


def packed(parts: Sequence[bytes]) -> bytes:
    """Write a command in RESP: redis-py's own packing takes four times as long."""
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])
