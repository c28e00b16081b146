"""What does a request's head say? The few facts that tierway reads from raw ASGI, without an object for them."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from time import time
from typing import Any

from gateway.errors import Refusal
from gateway.keys import LiveKeys
from policies.access import Caller

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_JOINED_HERE_BYTES = 1024 * 1024
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@,-]{1,128}")
_SANE_TRACE = re.compile(rb"[\x21-\x7e]{1,512}")


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of that name, which must be in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess: 80 random bits behind the time, so that what comes together lies together."""
    return f"{prefix}{int(time() * 1000):012x}{os.urandom(10).hex()}"


def request_id(scope: Scope) -> bytes | None:
    """Return the client's own request id where it is sane."""
    given = header(scope, b"x-request-id")
    return given if given is not None and _SANE_ID.fullmatch(given) else None


def trace_headers(scope: Scope) -> tuple[tuple[str, str], ...]:
    """Return the trace context, the only headers of the client that go to a backend."""
    return tuple(
        (key.decode(), value.decode())
        for key, value in scope["headers"]
        if key in (b"traceparent", b"tracestate") and _SANE_TRACE.fullmatch(value)
    )


async def recognise(keys: LiveKeys, scope: Scope) -> Caller:
    """Return who asks. Raises `Refusal`: 401, or 503 where the key cannot be looked up. Never looks at the body.

    Waits only for a key that has to be looked up in the store.
    """
    key = given_key(scope)
    return keys.known(key) or await keys.find(key)


def given_key(scope: Scope) -> bytes:
    """Return the key that a request carries. Raises `Refusal` (401) where there is none."""
    key = b""
    given = header(scope, b"authorization")
    if given is not None:
        scheme, _, rest = given.partition(b" ")
        if scheme.lower() == b"bearer":
            key = rest.strip()
    if not key:
        key = (header(scope, b"x-api-key") or b"").strip()
    if not key:
        raise Refusal("invalid_api_key", "No API key was given. Send it as 'Authorization: Bearer KEY'.")
    return key


async def read_raw_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """Read the whole body. Raises `Refusal`, before reading where the head already says enough."""
    kind = header(scope, b"content-type")
    if kind is not None and kind.split(b";")[0].strip().lower() != b"application/json":
        raise Refusal("invalid_content_type", "The body must be sent with 'Content-Type: application/json'.")
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        raise Refusal("invalid_content_type", "The body must be sent without 'Content-Encoding'.")
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared[:20]) > limit_bytes:
        raise _too_large(limit_bytes)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body"):
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        return body
    parts = [body]
    size_bytes = len(body)
    while message["type"] == "http.request" and message.get("more_body"):
        message = await receive()
        part: bytes = message.get("body", b"")
        parts.append(part)
        size_bytes += len(part)
        if size_bytes > limit_bytes:
            raise _too_large(limit_bytes)
    if message["type"] != "http.request":
        raise Refusal("incomplete_body", "The connection closed before the whole body had come.")
    return await joined(parts)


async def joined(parts: list[bytes]) -> bytes:
    """Join parts of a body. Megabytes are joined in a thread: `join` lets go of the interpreter while it copies."""
    if sum(map(len, parts)) <= _JOINED_HERE_BYTES:
        return b"".join(parts)
    return await asyncio.to_thread(b"".join, parts)


def _too_large(limit_bytes: int) -> Refusal:
    return Refusal("body_too_large", f"The body is larger than the limit of {limit_bytes} bytes.")
