"""What does a server's error answer mean? One of the faults of `backends.backend`, from a status and a body."""

from __future__ import annotations

from contextlib import suppress
from http import HTTPStatus
from math import isfinite

import msgspec

from backends.backend import BackendFault, Broken, Overloaded, Rejected

_LONGEST_MESSAGE_CHARS = 1000
_LONGEST_ADVICE_S = 86_400.0


class _ErrorBody(msgspec.Struct):
    message: str = ""
    type: str | None = None
    param: str | int | None = None
    code: str | int | None = None


class _ErrorEnvelope(msgspec.Struct):
    error: _ErrorBody


_decode_error = msgspec.json.Decoder(_ErrorEnvelope).decode


def fault_of(status: int, body: bytes, retry_after: str | None = None) -> BackendFault:
    """Say what an error answer means. Only a refusal in OpenAI's shape is the client's business."""
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED):
        return Broken(f"it refuses our credentials ({status})")
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return Overloaded(f"it has no room ({status})", _seconds_of(retry_after))
    if status == HTTPStatus.INTERNAL_SERVER_ERROR and b"image input is not supported" in body:
        # llama.cpp's answer to a picture that its model cannot see is a refusal, whatever its status.
        return Rejected(HTTPStatus.BAD_REQUEST, "This model takes no images.", param="messages")
    if status in range(400, 500) and status != HTTPStatus.REQUEST_TIMEOUT:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            error = _decode_error(body).error
            if status == HTTPStatus.NOT_FOUND and (error.param == "model" or error.code == "model_not_found"):
                # The model id is the operator's choice, not the client's.
                return Broken("it does not serve the model id that is configured")
            if status == HTTPStatus.NOT_FOUND and error.type == "not_found_error":
                # llama.cpp's answer at an address where nothing is; that, too, is the operator's choice.
                return Broken("there is nothing at its address")
            return _rejection(status, error)
    return Broken(f"it answers {status}")


def _seconds_of(retry_after: str | None) -> float | None:
    # A date is as good as no advice; what is not finite, or more than a day, is nobody's.
    with suppress(ValueError):
        advice_s = float(retry_after or "")
        return min(max(0.0, advice_s), _LONGEST_ADVICE_S) if isfinite(advice_s) else None
    return None


def _rejection(status: int, error: _ErrorBody) -> Rejected:
    # vLLM and llama.cpp send the status again as an integer code; OpenAI's code is a word or null.
    code = error.code if isinstance(error.code, str) else None
    lowered = error.message.lower()
    too_long = (
        code == "context_length_exceeded"
        or error.type == "exceed_context_size_error"
        or "maximum context length" in lowered
        or "available context size" in lowered
    )
    return Rejected(
        status,
        error.message[:_LONGEST_MESSAGE_CHARS],
        code="context_length_exceeded" if too_long else code,
        param=error.param if isinstance(error.param, str) else None,
        too_long=too_long,
    )
