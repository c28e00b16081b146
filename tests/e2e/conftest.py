"""Which fixtures do the end-to-end tests find? The shared gateway."""

from __future__ import annotations

from tests.gateway.fixtures import session_stack, stack

__all__ = ["session_stack", "stack"]
