"""What is a backend? One call in, a stream of chunks out, or one of five faults.

Everything that talks to a model server implements `Backend`. A backend knows nothing of tiers, tenants,
thresholds or money. Rules a reader must not break:

* `open()` is an async context manager. Leaving its block, for whatever reason, aborts the upstream request at once:
  a GPU must never work for a client that has gone.
* Nothing but a `BackendFault` is raised for what a server or a network does.
* A whole answer is a stream of one chunk. A streamed answer yields complete server-sent events, never parts of one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol, runtime_checkable

import msgspec

Endpoint = Literal["chat/completions", "completions"]
Phase = Literal["first_token", "between_tokens", "total"]
"""The phases of a call that can time out; a connection that takes too long leaves its server `Unreachable`."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long each phase of a call may take, in seconds. None of them is infinite."""

    connect_s: float = 2.0
    first_token_s: float = 60.0
    between_tokens_s: float = 30.0
    total_s: float = 600.0


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call to one backend.

    `body` is the complete JSON for the server, in pieces that are never joined when they are large. `stream` says
    whether it asks for server-sent events, and `headers` are the few that travel along (`traceparent`, `tracestate`).
    """

    endpoint: Endpoint
    body: tuple[bytes, ...]
    stream: bool
    headers: tuple[tuple[str, str], ...] = ()


class Window(msgspec.Struct, frozen=True):
    """How many tokens a model reads and writes in one request, together."""

    model: str
    tokens: int


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself; nothing of it is certain.

    `software` is what serves, as its list of models tells; `windows` are the context windows of its models.
    """

    software: Literal["vllm", "llamacpp"] | None = None
    windows: tuple[Window, ...] = ()

    def context_tokens(self, model: str) -> int | None:
        """Return the context window of `model`; of a server with one window alone that, whatever it calls its model."""
        for one in self.windows:
            if one.model == model:
                return one.tokens
        return self.windows[0].tokens if len(self.windows) == 1 else None


class AnswerStream(Protocol):
    """An answer on its way: whole, one chunk of JSON; streamed, complete server-sent events, as they came together."""

    def __aiter__(self) -> AsyncIterator[list[bytes]]: ...


class Backend(Protocol):
    """One server that answers calls."""

    def open(self, call: Call) -> AbstractAsyncContextManager[AnswerStream]:
        """Send `call`; entering waits for the response head.

        Raises `BackendFault` on entering or while iterating.
        """
        ...

    async def probe(self) -> ServerFacts:
        """Return what the server says of itself if it can answer now; raise `BackendFault` if it cannot.

        Costs no tokens.
        """
        ...

    async def count_tokens(self, call: Call) -> int | None:
        """Return how many tokens the prompt of `call` has, as its server counts them; None where it does not say.

        Nothing is generated. Raises `BackendFault`.
        """
        ...


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a server has counted since it started, for whoever asked it.

    `prompt_tokens` are those that it read and did not find in its cache, `running` how many requests it works on now.
    `started_s` is when its process began, in seconds since the epoch, None where it does not say.
    """

    prompt_tokens: int
    completion_tokens: int
    running: int
    started_s: float | None = None


@runtime_checkable
class Counting(Protocol):
    """A backend whose server can be asked for its own counters. Not every one can."""

    async def counters(self) -> Counters | None:
        """Return what the server counted; None where it does not count. Raises `BackendFault`."""
        ...


class BackendFault(Exception):  # noqa: N818 - "fault" is this design's word for it
    """How a call can fail. The message is for the operator's log, never for a client.

    BackendFault
    ├── Unreachable    no connection, or it broke before the head of an answer
    ├── TimedOut       a phase took longer than its limit
    ├── Overloaded     the server has no room now (429, 503)
    ├── Broken         it answered, but not with an answer (5xx, HTML, a cut stream, bad credentials of ours)
    └── Rejected       it refused the request itself (4xx); the client may see why
    """


class Unreachable(BackendFault):
    """No connection to the server, or it broke before any byte of an answer."""


class TimedOut(BackendFault):
    """A phase of the call took longer than its limit."""

    def __init__(self, phase: Phase, limit_s: float) -> None:
        super().__init__(f"{phase} took longer than {limit_s:g} s")
        self.phase: Phase = phase


class Overloaded(BackendFault):
    """The server has no room now; `retry_after_s` is what it advised, None if nothing."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Broken(BackendFault):
    """The server answered with something that is not an answer, or broke off in the middle of one."""


class Rejected(BackendFault):
    """The server refused the request itself.

    `status` is 4xx; `message`, `code` and `param` are the server's own and may be shown to the client.
    `too_long` is true when the prompt does not fit the model's context window: a larger model may still take it.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, too_long: bool = False
    ) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.too_long = too_long
