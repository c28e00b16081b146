"""Which running gateway do most tests share? One for the session, cleaned before every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.running import Stack, running_stack

__all__ = ["session_stack", "stack"]


@pytest.fixture(scope="session")
def session_stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stack(session_stack: Stack) -> Iterator[Stack]:
    """The shared gateway, its upstreams as at the start. No test may end it or leave a request open behind it."""
    session_stack.reset()
    pid = session_stack.gateway.pid
    yield session_stack
    assert session_stack.gateway.process.running, session_stack.gateway.process.said()[-3000:]
    assert session_stack.gateway.pid == pid
    assert all(upstream.idle(2.0) for upstream in session_stack.upstreams), "a request is still open at an upstream"
