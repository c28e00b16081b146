"""How is work done that nobody could interrupt? One piece after the other, in a process of its own behind two pipes.

The event loop only copies bytes. Rules a reader must not break:

* The child does one thing at a time and answers in the order it was asked.
* It ends with us, because its standard input does, and is started again when it has died.
* A caller that is cancelled leaves no half reply in the pipe: what was begun is read to its end.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Callable
from contextlib import suppress

_SLICE_BYTES = 256 * 1024
_GRACE_S = 0.5
FRAME = struct.Struct("!IQ")
"""Before each message either way: the sizes of its head and of its load, in bytes."""


class Child:
    """A child process that runs `module`, which calls `serve`. Started by the first question, or by `open`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._turn = asyncio.Lock()
        self._closed = False
        self.process: asyncio.subprocess.Process | None = None

    async def open(self) -> None:
        """Start it, so that the first question does not wait for that."""
        async with self._turn:
            await self._started()

    async def ask(self, head: bytes, load: bytes, *, limit_s: float | None = None) -> tuple[bytes, list[bytes]]:
        """Return the head of the answer, and its load in the pieces in which it came.

        Raises ConnectionError or IncompleteReadError when the child dies of it twice or is closed, and TimeoutError,
        having killed the child, when it works on it for more than `limit_s`.
        """
        return await asyncio.shield(asyncio.ensure_future(self._ask(head, load, limit_s)))

    async def _ask(self, head: bytes, load: bytes, limit_s: float | None) -> tuple[bytes, list[bytes]]:
        async with self._turn:
            try:
                async with asyncio.timeout(limit_s):
                    try:
                        return await self._ask_once(head, load)
                    except (asyncio.IncompleteReadError, ConnectionError):
                        # It was killed, by the memory guard for example: a new one may do better.
                        self.process = None
                        return await self._ask_once(head, load)
            except BaseException:
                # Whatever it still says belongs to a question that nobody asks any more.
                self._kill()
                raise

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()

    async def _ask_once(self, head: bytes, load: bytes) -> tuple[bytes, list[bytes]]:
        process = await self._started()
        if process.stdin is None or process.stdout is None:
            raise ConnectionError("the child has no pipes")
        process.stdin.write(FRAME.pack(len(head), len(load)) + head)
        view = memoryview(load)
        for start in range(0, len(load), _SLICE_BYTES):
            process.stdin.write(view[start : start + _SLICE_BYTES])
            await process.stdin.drain()
        head_bytes, load_bytes = FRAME.unpack(await process.stdout.readexactly(FRAME.size))
        told = await process.stdout.readexactly(head_bytes)
        parts: list[bytes] = []
        while load_bytes:
            part = await process.stdout.read(min(load_bytes, _SLICE_BYTES))
            if not part:
                raise ConnectionError("the child has gone")
            parts.append(part)
            load_bytes -= len(part)
        return told, parts

    async def _started(self) -> asyncio.subprocess.Process:
        process = self.process
        if self._closed:
            raise ConnectionError("the child was closed")
        if process is None or process.returncode is not None:
            process = self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=_SLICE_BYTES,
            )
        return process

    async def close(self) -> None:
        """End it, in the middle of its work if that takes long. There is no other after it."""
        self._closed = True
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                async with asyncio.timeout(_GRACE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def serve(answer: Callable[[bytes, bytes], tuple[bytes, bytes]]) -> None:
    """Be the child: answer what comes on standard input until it ends. `answer` takes and returns a head and a load."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(frame := source.read(FRAME.size)) == FRAME.size:
        head_bytes, load_bytes = FRAME.unpack(frame)
        head, load = source.read(head_bytes), source.read(load_bytes)
        if len(head) < head_bytes or len(load) < load_bytes:
            return
        told, rest = answer(head, load)
        target.write(FRAME.pack(len(told), len(rest)))
        target.write(told)
        target.write(rest)
        target.flush()
