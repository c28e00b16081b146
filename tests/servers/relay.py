"""How is a server made slow, or spoken to over TLS, that is neither? Through a relay of our own on loopback.

It runs in a thread with an event loop of its own, so that a test may block, and it can be told to hold answers back.
The certificate in `tls/` is for `redis.test`, signed by itself, good until 2126 and of no use anywhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

CERTIFICATE = Path(__file__).parent / "tls" / "certificate.pem"
KEY = Path(__file__).parent / "tls" / "key.pem"
SERVER_NAME = "redis.test"
_CHUNK = 65536


class Relay:
    """A relay to a port on 127.0.0.1. `port` is its own; `delay_s` is how long it keeps what the server says.

    While it is `deaf` it takes what it is sent and passes nothing on, either way: a firewall that drops packets.
    """

    def __init__(self, target: int, *, tls: bool = False) -> None:
        self.delay_s = 0.0
        self.deaf = False
        self.port = 0
        self._target = target
        self._context = _context() if tls else None
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        self._ready.wait(10)

    def stop(self) -> None:
        """End, with every connection."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                there = asyncio.create_task(self._pass_on(reader, to_server, delayed=False))
                await self._pass_on(from_server, writer, delayed=True)
                there.cancel()
            finally:
                to_server.close()
        writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.deaf:
                    continue
                if delayed and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def relay_to(port: int, *, tls: bool = False) -> Iterator[Relay]:
    """A relay to `port` for as long as the block runs."""
    relay = Relay(port, tls=tls)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)
    return context
