"""Where does one server-sent event end? Bytes in any cut, complete events out.

An event is a block of lines closed by an empty line (HTML standard, section 9.2). Blocks come out with LF line ends
and their closing empty line, so that joining them gives a valid stream again.
"""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"
"""How an OpenAI stream ends."""


class EventSplitter:
    """Cuts a byte stream into complete events, whatever the cuts of the network."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False

    @property
    def pending_bytes(self) -> int:
        """How much of an unfinished event is held."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, return the events they complete."""
        if self._after_cr and data:
            # The other half of a CRLF that was cut: its first half has ended the line already.
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._rest:
            data = self._rest + data
        parts = data.split(b"\n\n")
        self._rest = parts.pop()
        # A surplus empty line before an event is no part of it.
        return [part.lstrip(b"\n") + b"\n\n" for part in parts if part not in (b"", b"\n")]

    def flush(self) -> bytes:
        """Return what never became a complete event."""
        rest, self._rest = self._rest, b""
        return rest


def data_of(event: bytes) -> bytes | None:
    """Return the payload of an event, None for a comment or an event without data."""
    if event.startswith(b"data: ") and event.find(b"\n", 0, -2) < 0:
        return event[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
