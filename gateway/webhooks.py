"""How does an alert reach a webhook? A signed POST of JSON, repeated for a day until it is taken.

Signed as the Standard Webhooks specification says (https://www.standardwebhooks.com): `webhook-id` is the same of every
attempt, so that a receiver can drop what it has; `webhook-timestamp` is the attempt's; `webhook-signature` is `v1,` and
the Base64 of the HMAC-SHA256 of `id.timestamp.body`. Only a 2xx says that it was taken; a redirect is no answer and is
not followed; 410 says that nobody wants any more, until the next start. What is answered is not read.

The one module that sends alerts, and knows aiohttp for it.
"""

from __future__ import annotations

import asyncio
import binascii
import heapq
import hmac
import logging
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from hashlib import sha256
from http import HTTPStatus
from itertools import accumulate, count
from random import Random
from typing import Literal

import aiohttp
import msgspec
from yarl import URL

Ending = Literal["taken", "given_up"]
Ended = Callable[[str, Ending], None]
"""Is told which message ended how."""

AFTER_S: tuple[float, ...] = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18_000.0, 28_800.0, 28_800.0)
"""How long after each failed attempt the next one follows; after the last nobody tries again: 24 hours in all."""

_SPREAD = 0.2
"""By so much a wait is longer or shorter, so that receivers that were away are not met by everybody at once."""

_PREFIX = "whsec_"
_CONNECT_S = 5.0
_TOTAL_S = 10.0
_MOST = 1000
_log = logging.getLogger("tierway.alerts")


def signing_key(secret: str) -> bytes:
    """Return the key of a secret: of `whsec_…` what its Base64 stands for, of any other its own bytes.

    Raises ValueError where what follows `whsec_` is no Base64.
    """
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        # Without the cause: its message could show a part.
        raise ValueError("a secret that begins with `whsec_` goes on with Base64") from None


def signature(key: bytes, id_: str, timestamp_s: int, body: bytes) -> str:
    """Return the value of `webhook-signature`."""
    signed = b".".join((id_.encode(), str(timestamp_s).encode(), body))
    return "v1," + b64encode(hmac.digest(key, signed, sha256)).decode()


class Message(msgspec.Struct, frozen=True):
    """What is sent. `age_s`: how old it was when it was handed over, so that it is not tried for longer than a day."""

    id: str
    body: bytes
    age_s: float = 0.0


class Webhook:
    """One address, and what is still to be sent there, one message after the other. `key` signs (`signing_key`)."""

    def __init__(
        self,
        url: str,
        key: bytes,
        *,
        after_s: tuple[float, ...] = AFTER_S,
        timeout_s: float = _TOTAL_S,
        most: int = _MOST,
        random: Random | None = None,
    ) -> None:
        self.digest = sha256(url.encode()).hexdigest()[:16]
        self.attempts: dict[str, int] = {"taken": 0, "failed": 0, "given_up": 0}
        self._url = URL(url)
        self._key = key
        self._after_s = after_s
        self._most = most
        self._random = random or Random()  # noqa: S311 - a pause, no secret
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, _CONNECT_S))
        self._due: list[tuple[float, int, int, Message]] = []
        self._ids: set[str] = set()
        self._numbers = count()
        self._woken = asyncio.Event()
        self._gone = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Webhook({self._url.host})"

    @property
    def waiting(self) -> int:
        """How many messages are not taken yet."""
        return len(self._ids)

    def open(self, ended: Ended) -> None:
        """Begin to send."""
        self._task = asyncio.create_task(self._keep_sending(ended))

    async def close(self) -> None:
        """Stop. What was not taken is forgotten here."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def send(self, message: Message) -> bool:
        """Send a message when its turn comes; whether it has one. Never waits. One under way is not sent twice."""
        if message.id in self._ids:
            return True
        if self._gone or len(self._ids) >= self._most:
            return False
        self._ids.add(message.id)
        # Of one that was tried before, by another process, the next wait is as long as if this one had.
        begun = sum(1 for after_s in accumulate(self._after_s) if after_s <= message.age_s)
        self._push(time.monotonic(), begun, message)
        return True

    def _push(self, at_s: float, failed: int, message: Message) -> None:
        heapq.heappush(self._due, (at_s, next(self._numbers), failed, message))
        self._woken.set()

    async def _keep_sending(self, ended: Ended) -> None:
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), timeout=self._timeout, headers={"User-Agent": "tierway"}
        ) as session:
            while not self._gone:
                self._woken.clear()
                wait_s = self._due[0][0] - time.monotonic() if self._due else None
                if wait_s is None or wait_s > 0:
                    await self._sleep(wait_s)
                    continue
                _, _, failed, message = heapq.heappop(self._due)
                why = await self._post(session, message)
                if why is None:
                    self._end(message, "taken", ended)
                elif not self._gone:
                    self._failed(message, failed, why, ended)
        self._ids.clear()
        self._due.clear()

    async def _sleep(self, wait_s: float | None) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _post(self, session: aiohttp.ClientSession, message: Message) -> str | None:
        """Send once; return why it was not taken."""
        now_s = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message.id,
            "webhook-timestamp": str(now_s),
            "webhook-signature": signature(self._key, message.id, now_s, message.body),
        }
        try:
            async with session.post(self._url, data=message.body, headers=headers, allow_redirects=False) as answer:
                status = answer.status
        except (aiohttp.ClientError, OSError, ValueError) as fault:
            # Not its text, which can hold the address, and an address can hold a secret.
            return type(fault).__name__
        if status == HTTPStatus.GONE:
            self._gone = True
            _log.warning("webhook %s answered 410: it gets no more alerts until the next start", self._url.host)
        return None if 200 <= status < 300 else f"HTTP {status}"

    def _failed(self, message: Message, failed: int, why: str, ended: Ended) -> None:
        self.attempts["failed"] += 1
        if failed >= len(self._after_s):
            _log.error("webhook %s did not take alert %s in a day: %s", self._url.host, message.id, why)
            self._end(message, "given_up", ended)
            return
        wait_s = self._after_s[failed] * self._random.uniform(1 - _SPREAD, 1 + _SPREAD)
        _log.warning("webhook %s did not take alert %s: %s; again in %.0f s", self._url.host, message.id, why, wait_s)
        self._push(time.monotonic() + wait_s, failed + 1, message)

    def _end(self, message: Message, ending: Ending, ended: Ended) -> None:
        self.attempts[ending] += 1
        self._ids.discard(message.id)
        ended(message.id, ending)
