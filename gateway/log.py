"""What does the operator read? One line an exchange, and the messages of everything else, on standard error."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import msgspec

from gateway.decision import Decision
from policies.cost import usd

# A write a line costs a busy gateway more than making the line; an operator does not notice this much.
_GATHER_S = 0.02
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Lines(Protocol):
    """Where lines go: an unbuffered file."""

    def write(self, line: bytes, /) -> object: ...


class ExchangeLog:
    """Writes one line for every exchange and for every refused request."""

    def __init__(self, stream: Lines, *, format: Literal["json", "text"], level: str) -> None:  # noqa: A002
        self._stream = stream
        self._text = format == "text"
        self._on = _LEVELS[level] <= logging.INFO
        self._lines: list[bytes] = []

    def decided(self, decision: Decision) -> None:
        """Write the line of an exchange."""
        if not self._on:
            return
        usage = decision.usage
        fields: dict[str, Any] = {
            "level": "info",
            "event": "exchange",
            "exchange_id": decision.exchange_id,
            "request_id": decision.request_id,
            "key": decision.key,
            "endpoint": decision.endpoint,
            "asked": decision.asked,
            "streamed": decision.streamed,
            "ending": decision.ending,
            "error": decision.error,
            "degraded": decision.degraded,
            "tier": decision.tier,
            "model": decision.model,
            "confidence": decision.confidence,
            "climb": [
                f"{one.tier}:{one.outcome}" + (f"({one.fault}: {one.fault_detail})" if one.fault else "")
                for one in decision.attempts
            ],
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost_usd": usd(decision.cost_nusd),
            "first_byte_s": decision.first_byte_s,
            "total_s": decision.total_s,
        }
        self._write(fields)

    def refused(self, *, request_id: str, key: str | None, path: str, code: str, status: int) -> None:
        """Write the line of a request that no backend saw."""
        if self._on:
            self._write(
                {
                    "level": "info",
                    "event": "refused",
                    "request_id": request_id,
                    "key": key,
                    "path": path,
                    "error": code,
                    "status": status,
                }
            )

    def _write(self, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._text:
            shown = " ".join(
                f"{name}={_short(value)}"
                for name, value in fields.items()
                if value not in (None, False, "info") and name not in ("event", "exchange_id", "request_id")
            )
            line = f"{now[11:23]} {fields['event']:<8} {shown}".encode("utf-8", "replace")
        else:
            line = msgspec.json.encode({"time": now, **fields})
        self._lines.append(line + b"\n")
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(_GATHER_S, self.flush)

    def flush(self) -> None:
        """Write what has gathered, in one unbuffered write: lines of several workers do not run into each other."""
        lines, self._lines = self._lines, []
        if lines:
            self._stream.write(b"".join(lines))


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = ">".join(str(one) for one in value) if isinstance(value, list) else str(value)
    # A path can hold a line break, and a line break another line of the log.
    return text if text.isprintable() else ascii(text)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def set_up_logging(*, format: Literal["json", "text"], level: str) -> None:  # noqa: A002
    """Send the messages of all modules to standard error, in the operator's format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)-8s %(message)s", "%H:%M:%S")
        if format == "text"
        else _JsonFormatter()
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(_LEVELS[level], logging.INFO) if level != "debug" else logging.DEBUG)
    for noisy in ("asyncio", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, _LEVELS[level]))
