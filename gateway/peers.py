"""What do the other workers know? Each answers the others over a socket of its own in a folder that only they can read.

An exchange id begins with the number of the worker that made it, so a Decision is asked of that one alone; numbers
that add up, metrics, are asked of all. One line in, one frame out, the connection closes.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import msgspec

from gateway.decision import Decision, DecisionStore
from gateway.metrics import Metrics, Snapshot

_WAIT_S = 1.0
_LONGEST_LINE_BYTES = 256
_ID = re.compile(r"tw([0-9a-f]{2})-[0-9a-f]{32}")

_encode = msgspec.msgpack.Encoder().encode
_decode_decision = msgspec.msgpack.Decoder(Decision | None).decode
_decode_snapshot = msgspec.msgpack.Decoder(Snapshot).decode


def id_prefix(worker: int) -> str:
    """Return how the exchange ids of a worker begin."""
    return f"tw{worker:02x}-"


class Peers:
    """The workers of one gateway; `count` of them, this one being number `worker`."""

    def __init__(self, *, worker: int = 0, count: int = 1, folder: Path | None = None) -> None:
        self.count = count
        self._worker = worker
        self._folder = folder
        self._server: asyncio.Server | None = None

    async def open(self, store: DecisionStore, metrics: Metrics) -> None:
        """Begin to answer the others."""
        if self._folder is None:
            return

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with asyncio.timeout(_WAIT_S):
                    line = (await reader.readline()).strip().decode("ascii", "replace")
                    known: object = metrics.snapshot() if line == "metrics" else store.get(line)
                    writer.write(_encode(known))
                    await writer.drain()
            except (TimeoutError, ValueError, ConnectionError):
                pass  # it asks again if it still wants to know
            finally:
                writer.close()

        path = self._path(self._worker)
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(answer, path, limit=_LONGEST_LINE_BYTES)

    async def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def decision(self, exchange_id: str) -> Decision | None:
        """Ask the worker that made this id, if it was another one."""
        found = _ID.fullmatch(exchange_id)
        if found is None:
            return None
        worker = int(found[1], 16)
        if worker == self._worker or worker >= self.count:
            return None
        reply = await self._ask(worker, exchange_id)
        return None if reply is None else _decode_decision(reply)

    async def snapshots(self) -> list[Snapshot]:
        """Ask every other worker for its numbers."""
        others = [worker for worker in range(self.count) if worker != self._worker]
        replies = await asyncio.gather(*(self._ask(worker, "metrics") for worker in others))
        return [_decode_snapshot(reply) for reply in replies if reply]

    async def _ask(self, worker: int, line: str) -> bytes | None:
        try:
            async with asyncio.timeout(_WAIT_S):
                reader, writer = await asyncio.open_unix_connection(self._path(worker))
                try:
                    writer.write(line.encode() + b"\n")
                    return await reader.read() or None
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            # It is starting or has died: what it knew is gone or comes later.
            return None

    def _path(self, worker: int) -> Path:
        if self._folder is None:
            raise FileNotFoundError("this gateway has one worker")
        return self._folder / f"worker-{worker}.sock"
