"""Somebody who gets webhooks: a real HTTP server on loopback that answers as it is told, and keeps what came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

Answer = int | str
"""A status; or `hang`: nothing; `drop`: the connection is closed; `endless`: a body that never ends."""


class Receiver:
    """What came, and how the next ones are answered: by `answers` in order, then with 204."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.came: list[tuple[dict[str, str], bytes]] = []
        self.paths: list[str] = []
        self.url = ""
        self._news = asyncio.Condition()

    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, body in self.came]

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.came]

    async def until(self, fits: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(fits)

    async def until_came(self, number: int) -> None:
        await self.until(lambda: len(self.came) >= number)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).strip():
                _, path, _ = line.decode().split()
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                answer = self.answers.pop(0) if self.answers else 204
                async with self._news:
                    self.paths.append(path)
                    self.came.append((headers, body))
                    self._news.notify_all()
                if answer == "drop":
                    return
                if answer == "hang":
                    await reader.read()
                    return
                if answer == "endless":
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
                    await writer.drain()
                    await reader.read()
                    return
                where = f"Location: {self.url}/elsewhere\r\n" if str(answer).startswith("3") else ""
                length = "" if answer == 204 else "Content-Length: 0\r\n"
                writer.write(f"HTTP/1.1 {answer} Whatever\r\n{length}{where}\r\n".encode())
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving(*answers: Answer) -> AsyncIterator[Receiver]:
    receiver = Receiver(*answers)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield receiver
    finally:
        server.close()
