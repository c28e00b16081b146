"""How is a vLLM server asked? OpenAI's protocol over HTTP, by the one module that knows aiohttp.

Serves any server that speaks the protocol: vLLM, SGLang, llama.cpp, hosted ones. Leaving an open call closes its
connection, which is how such a server learns to stop.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from backends.backend import (
    AnswerStream,
    BackendFault,
    Broken,
    Call,
    Counters,
    Phase,
    ServerFacts,
    TimedOut,
    Timeouts,
    Unreachable,
)
from backends.error_answers import fault_of
from backends.server_counters import counters_in
from backends.server_facts import count_in, facts_of, text_question
from backends.sse import DONE, EventSplitter

# vLLM's server drops an idle connection after 5 s: letting go first saves a request that would land on a closed one.
_KEEP_ALIVE_S = 4.0
_LARGEST_ERROR_BYTES = 64 * 1024
_LARGEST_EVENT_BYTES = 16 * 1024 * 1024
_LARGEST_ANSWER_BYTES = 256 * 1024 * 1024
_LARGEST_LIST_BYTES = 1024 * 1024
_LARGEST_METRICS_BYTES = 8 * 1024 * 1024
_LARGEST_COUNT_BYTES = 64 * 1024 * 1024
_LONGEST_COUNT_S = 2.0
_LAST_READ_S = 1.0
_WRITE_BYTES = 64 * 1024
_NO_HEALTH_CHECK = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)
_NO_STREAM = frozenset({"text/html", "application/json"})
_NO_WHOLE_ANSWER = frozenset({"text/html", "text/event-stream"})
_QUIET_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class HttpPool:
    """The connections to all servers, kept alive between calls. One for a process."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The session all calls go through, made by the first of them: it belongs to the running event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=_QUIET_HEADERS,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    async def close(self) -> None:
        """Close every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class VllmBackend:
    """One server at `url` (with or without `/v1`). `api_key` is sent as a bearer token and shown nowhere."""

    def __init__(
        self, pool: HttpPool, *, url: str, api_key: str | None = None, timeouts: Timeouts | None = None
    ) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self._pool = pool
        self._urls = {path: URL(f"{root}/v1/{path}") for path in ("chat/completions", "completions", "models")}
        self._health = URL(f"{root}/health")
        self._metrics = URL(f"{root}/metrics")
        self._tokenize = URL(f"{root}/tokenize")
        self._count_chat = URL(f"{root}/v1/chat/completions/input_tokens")
        self._facts: ServerFacts | None = None
        self._counts = True
        self._timeouts = timeouts or Timeouts()
        self._connect_timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect_s)
        self._auth = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **self._auth}

    def open(self, call: Call) -> AbstractAsyncContextManager[AnswerStream]:
        """Send `call`; entering waits for the response head."""
        return _OpenCall(self, call)

    async def probe(self) -> ServerFacts:
        """Ask for `/health`, and for the list of models where there is no such thing or nothing is known yet."""
        try:
            async with _Clock(
                Timeouts(connect_s=self._timeouts.connect_s, total_s=self._timeouts.connect_s + 3.0)
            ) as clock:
                with _as_faults(clock):
                    return await self._probe()
        except BackendFault:
            # Whatever comes back at its address may be another server.
            self._facts, self._counts = None, True
            raise

    async def _probe(self) -> ServerFacts:
        status, _ = await self._get(self._health)
        facts = self._facts
        if facts is None or status in _NO_HEALTH_CHECK:
            models_status, models = await self._get(self._urls["models"])
            if facts is None:
                facts = self._facts = facts_of(models) if models_status == HTTPStatus.OK else ServerFacts()
            if status in _NO_HEALTH_CHECK:
                status = models_status
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise Broken(f"its health check answers {status}")
        return facts

    async def counters(self) -> Counters | None:
        """Ask for `/metrics`, where vLLM has its counters, and llama.cpp if it was started with them."""
        async with _Clock(
            Timeouts(connect_s=self._timeouts.connect_s, total_s=self._timeouts.connect_s + 3.0)
        ) as clock:
            with _as_faults(clock):
                status, text = await self._get(self._metrics, _LARGEST_METRICS_BYTES)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _NO_HEALTH_CHECK:
            raise Broken(f"it answers {status} for its metrics")
        return counters_in(text) if status == HTTPStatus.OK else None

    async def _get(self, url: URL, limit_bytes: int = _LARGEST_LIST_BYTES) -> tuple[int, bytes]:
        async with self._pool.session.get(
            url, headers=self._auth, timeout=self._connect_timeout, allow_redirects=False
        ) as response:
            return response.status, await _read_up_to(response, limit_bytes) or b""

    async def count_tokens(self, call: Call) -> int | None:
        """Ask vLLM's `/tokenize`, which takes the body of a call as it is, or llama.cpp, which takes a chat's."""
        if not self._counts:
            return None
        url, body = self._tokenize, call.body
        if self._facts is not None and self._facts.software == "llamacpp":
            if call.endpoint == "chat/completions":
                url = self._count_chat
            else:
                question = text_question(b"".join(body))
                if question is None:
                    return None
                body = question
        async with _Clock(Timeouts(connect_s=self._timeouts.connect_s, total_s=_LONGEST_COUNT_S)) as clock:
            with _as_faults(clock):
                async with await self._post(url, body, self._headers) as response:
                    if response.status in _NO_HEALTH_CHECK:
                        # Asked again when it has been away.
                        self._counts = False
                    if response.status != HTTPStatus.OK:
                        return None
                    return count_in(await _read_up_to(response, _LARGEST_COUNT_BYTES) or b"")

    async def send(self, call: Call, clock: _Clock) -> aiohttp.ClientResponse:
        """Send `call` and wait for the head of the answer.

        A kept-alive connection that the server closed at the very moment it was used again is tried once more on
        another one: no byte of an answer has come, so nothing can be answered twice.
        """
        headers = {**self._headers, **dict(call.headers)} if call.headers else self._headers
        for last_try in (False, True):
            try:
                return await self._post(self._urls[call.endpoint], call.body, headers)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError) as error:
                if last_try or clock.expired is not None or isinstance(error, aiohttp.ClientConnectorError):
                    raise
        raise AssertionError  # the loop returns or raises

    async def _post(self, url: URL, body: tuple[bytes, ...], headers: dict[str, str]) -> aiohttp.ClientResponse:
        size_bytes = sum(map(len, body))
        if size_bytes > _WRITE_BYTES:
            headers = {**headers, "Content-Length": str(size_bytes)}
        return await self._pool.session.post(
            url,
            data=b"".join(body) if size_bytes <= _WRITE_BYTES else _in_slices(body),
            headers=headers,
            timeout=self._connect_timeout,
            allow_redirects=False,
        )

    @property
    def timeouts(self) -> Timeouts:
        """The limits of each phase."""
        return self._timeouts


async def _in_slices(body: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    # One write of many megabytes would hold the event loop; an async generator that owns nothing is safe.
    for piece in body:
        for start in range(0, len(piece), _WRITE_BYTES):
            yield piece[start : start + _WRITE_BYTES]


class _OpenCall:
    """One call from its sending to its end; also the stream of its answer."""

    def __init__(self, backend: VllmBackend, call: Call) -> None:
        self._backend = backend
        self._call = call
        self._clock = _Clock(backend.timeouts)
        self._faults = _as_faults(self._clock)
        self._response: aiohttp.ClientResponse | None = None
        self._splitter = EventSplitter()
        self._over = self._done = False

    async def __aenter__(self) -> Self:
        await self._clock.__aenter__()
        try:
            with self._faults:
                # The server says nothing at all before a whole answer is complete.
                self._clock.start("first_token" if self._call.stream else "total")
                self._response = await self._backend.send(self._call, self._clock)
                await self._check(self._response)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        task = asyncio.current_task()
        if kind is asyncio.CancelledError and self._clock.expired is not None and task and task.uncancel() == 0:
            # The clock ran out while whoever reads was busy with something else.
            raise self._clock.expired

    def _close(self) -> None:
        self._clock.stop()
        response = self._response
        if response is None:
            return
        if self._over:
            response.release()
        else:
            response.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[bytes]:
        if self._over or self._response is None:
            raise StopAsyncIteration
        with self._faults:
            if not self._call.stream:
                return [await self._whole(self._response)]
            content = self._response.content
            self._clock.waits()
            while True:
                data = await (content.readany() if not self._done else self._last_read(content))
                if not data:
                    self._over = content.at_eof()
                    if self._splitter.flush().strip():
                        raise Broken("the stream broke off in the middle of an event")
                    raise StopAsyncIteration
                events = self._splitter.feed(data)
                if not events:
                    if self._splitter.pending_bytes > _LARGEST_EVENT_BYTES:
                        raise Broken("an event of its stream has no end")
                    continue
                self._clock.heard_from(events)
                self._done = events[-1] == DONE
                return events

    @staticmethod
    async def _last_read(content: aiohttp.StreamReader) -> bytes:
        """Read the end of a body whose stream has said that it is done, so that its connection can be used again."""
        if content.at_eof():
            return b""
        try:
            async with asyncio.timeout(_LAST_READ_S):
                return await content.readany()
        except TimeoutError:
            return b""

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        body = await _read_up_to(response, _LARGEST_ANSWER_BYTES)
        if body is None:
            raise Broken("its answer has no end")
        self._over = True
        return body

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status == HTTPStatus.OK:
            # What is not declared, or oddly, is judged by what it is; what is declared as something else is no answer.
            if response.content_type in (_NO_STREAM if self._call.stream else _NO_WHOLE_ANSWER):
                raise Broken(f"it answers with {response.content_type}")
            return
        body = await _read_up_to(response, _LARGEST_ERROR_BYTES) or b""
        raise fault_of(response.status, body, response.headers.get("Retry-After"))


async def _read_up_to(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes | None:
    parts: list[bytes] = []
    size_bytes = 0
    while data := await response.content.readany():
        parts.append(data)
        size_bytes += len(data)
        if size_bytes > limit_bytes:
            return None
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Clock:
    """Watches the phases of one call with one timer, whatever the number of tokens.

    Only the time spent waiting for the server counts, not that for a slow reader. A read only notes when it began;
    the timer looks at the note when it fires and goes on waiting if it was premature. On expiry the waiting task is
    cancelled, as `asyncio.timeout` does it, and `expired` says why.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._end_s = self._loop.time() + timeouts.total_s
        self._phase: Phase = "total"
        self._waiting = True
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.expired: TimedOut | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self.start("total")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, phase: Phase) -> None:
        """Enter a phase now."""
        self._phase = phase
        self._since_s = self._loop.time()
        self._arm()

    def waits(self) -> None:
        """Note that the server is waited for from now on, unless it was already."""
        if not self._waiting:
            self._waiting = True
            self._since_s = self._loop.time()

    def heard_from(self, events: list[bytes]) -> None:
        """Note that tokens came. Comments that only keep a connection alive are none."""
        if events[-1].startswith(b":") and all(event.startswith(b":") for event in events):
            return
        self._waiting = False
        if self._phase == "first_token":
            self._phase = "between_tokens"
            self._since_s = self._loop.time()
            self._arm()

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _limit_s(self) -> float:
        return self._timeouts.first_token_s if self._phase == "first_token" else self._timeouts.between_tokens_s

    def _deadline_s(self) -> float:
        if self._phase == "total":
            return self._end_s
        since_s = self._since_s if self._waiting else self._loop.time()
        return min(since_s + self._limit_s(), self._end_s)

    def _arm(self) -> None:
        self.stop()
        self._timer = self._loop.call_at(self._deadline_s(), self._look)

    def _look(self) -> None:
        now_s = self._loop.time()
        if now_s < self._deadline_s():
            self._arm()
            return
        phase: Phase = "total" if now_s >= self._end_s else self._phase
        self.expired = TimedOut(phase, self._timeouts.total_s if phase == "total" else self._limit_s())
        if self._task is not None:
            self._task.cancel()


class _as_faults:  # noqa: N801 - reads as a statement
    """Turns what aiohttp, the network and the clock raise into `BackendFault`s."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (BackendFault, StopAsyncIteration)):
            return
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            # Only the cancellation that the clock itself asked for becomes a fault.
            if self._clock.expired is not None and task is not None and task.uncancel() == 0:
                raise self._clock.expired from None
            return
        fault = _fault_of_exception(error)
        if fault is not None:
            raise fault from error


def _fault_of_exception(error: BaseException) -> BackendFault | None:
    if isinstance(error, (aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError)):
        return Unreachable("no connection within the limit")
    if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientResponseError)):
        return Broken(f"its answer broke off: {type(error).__name__}")
    if isinstance(error, (aiohttp.ClientError, OSError, ssl.SSLError)):
        return Unreachable(f"{type(error).__name__}: {error}")
    if isinstance(error, ValueError):
        return Broken(f"its answer is not HTTP: {error}")
    return None
