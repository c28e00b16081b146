"""Which errors can a client see? One table; `docs/errors.md` and the metric labels are made from it.

A code never changes its status. Messages say what the caller can do, and nothing of what is behind the gateway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Retry = Literal["no", "later", "fixed request"]
"""`no`: all that could be tried was, the SDK must not repeat it. `later`: after `Retry-After`."""


class ErrorKind(msgspec.Struct, frozen=True):
    """A row of the table. `meaning` is for the documentation."""

    code: str
    status: int
    type: str
    retry: Retry
    meaning: str


_INVALID = "invalid_request_error"

TABLE: tuple[ErrorKind, ...] = (
    ErrorKind("invalid_json", 400, _INVALID, "fixed request", "The body is not valid JSON, or not UTF-8."),
    ErrorKind("invalid_type", 400, _INVALID, "fixed request", "A field has the wrong type; `param` names it."),
    ErrorKind("invalid_value", 400, _INVALID, "fixed request", "A field has a value that cannot be; `param` names it."),
    ErrorKind("missing_required_parameter", 400, _INVALID, "fixed request", "A required field is missing."),
    ErrorKind(
        "invalid_content_type", 400, _INVALID, "fixed request", "The body is not declared as JSON, or is compressed."
    ),
    ErrorKind(
        "incomplete_body", 400, _INVALID, "fixed request", "The connection broke before the whole body had come."
    ),
    ErrorKind("invalid_http", 400, _INVALID, "fixed request", "The bytes are not a request of HTTP/1.1."),
    ErrorKind("context_length_exceeded", 400, _INVALID, "fixed request", "The prompt fits no model that may answer."),
    ErrorKind(
        "upstream_rejected",
        400,
        _INVALID,
        "fixed request",
        "The model's server refused the request; its own message, code and 4xx status are kept.",
    ),
    ErrorKind(
        "request_exceeds_limit", 400, _INVALID, "fixed request", "The request is larger than a limit ever lets through."
    ),
    ErrorKind("invalid_api_key", 401, "authentication_error", "no", "No API key, or none that is known."),
    ErrorKind(
        "insufficient_quota",
        402,
        "insufficient_quota",
        "no",
        "A budget is used up, or has not enough left for this request. The message names the limit.",
    ),
    ErrorKind("admin_only", 403, "permission_error", "no", "The key may not read what is the operator's."),
    ErrorKind("model_not_found", 404, _INVALID, "no", "No such model, or not one that this key may ask for."),
    ErrorKind(
        "exchange_not_found", 404, _INVALID, "no", "No Decision under this id, not one of this key, or no longer kept."
    ),
    ErrorKind("key_not_found", 404, _INVALID, "no", "The admin API knows no key of this name."),
    ErrorKind("unknown_url", 404, _INVALID, "no", "There is nothing at this path."),
    ErrorKind("method_not_allowed", 405, _INVALID, "no", "The path exists, but not for this method."),
    ErrorKind("already_exists", 409, _INVALID, "no", "The admin API has a key of this name already."),
    ErrorKind("body_too_large", 413, _INVALID, "fixed request", "The body is larger than `server.max_body`."),
    ErrorKind(
        "rate_limit_exceeded",
        429,
        "rate_limit_error",
        "later",
        "A limit has no room for this request now. The message names the limit, whom it counts and how it stands.",
    ),
    ErrorKind("head_too_large", 431, _INVALID, "fixed request", "The headers are larger than 64 KiB."),
    ErrorKind(
        "client_closed_request", 499, _INVALID, "no", "The client left while it waited for a turn. Only in logs."
    ),
    ErrorKind(
        "internal_error", 500, "server_error", "no", "A fault of tierway itself. The log has it under the request id."
    ),
    ErrorKind(
        "upstream_unavailable", 502, "server_error", "no", "No server of any tier that may answer could be reached."
    ),
    ErrorKind("upstream_error", 502, "server_error", "no", "Every server that was asked failed."),
    ErrorKind(
        "stream_broken",
        502,
        "server_error",
        "no",
        "The answer broke off after its beginning was sent. Comes as an event of the stream.",
    ),
    ErrorKind("upstream_overloaded", 503, "server_error", "later", "Every server that could answer is full."),
    ErrorKind(
        "overloaded", 503, "server_error", "later", "Every tier that may answer is full, and so is the queue for it."
    ),
    ErrorKind(
        "limits_unavailable",
        503,
        "server_error",
        "later",
        "A limit cannot be counted now, and its `when_down` lets nothing through uncounted.",
    ),
    ErrorKind(
        "ledger_unavailable",
        503,
        "server_error",
        "later",
        "The bill of a request cannot be written, and the operator wants nothing answered without one. Comes as an "
        "event where a stream had begun.",
    ),
    ErrorKind("keys_unavailable", 503, "server_error", "later", "Whether the key is valid cannot be looked up now."),
    ErrorKind("shutting_down", 503, "server_error", "later", "tierway is stopping; another replica will answer."),
    ErrorKind(
        "upstream_timeout", 504, "server_error", "no", "The servers that were asked took longer than their limits."
    ),
)

_BY_CODE = {kind.code: kind for kind in TABLE}


class Refusal(Exception):  # noqa: N818 - it is an answer, not an accident
    """An error answer. Raised where a request cannot go on, turned into HTTP at the edge.

    `code` is a code of the table; `headers` go with the answer. `shown_code` and `status` replace the row's for a
    backend's own refusal.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        status: int | None = None,
        shown_code: str | None = None,
        keep_code: bool = True,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.kind = _BY_CODE[code]
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.status = status or self.kind.status
        self.shown_code = code if keep_code else shown_code
        self._headers = tuple(headers)

    @property
    def code(self) -> str:
        """The code of the table: the one for logs and metrics."""
        return self.kind.code

    def body(self) -> bytes:
        """OpenAI's error JSON."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind.type,
                    "param": self.param,
                    "code": self.shown_code,
                }
            }
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to this error, beside content type and length."""
        headers = [*self._headers]
        if self.status == 401:
            headers.append((b"www-authenticate", b'Bearer realm="tierway"'))
        if self.kind.retry == "later":
            headers.append((b"retry-after", b"%d" % (self.retry_after_s or 1)))
        elif self.status >= 500 or self.status in (402, 408, 409, 429):
            headers.append((b"x-should-retry", b"false"))
        return headers


def reference() -> str:
    """Return the page `docs/errors.md`."""
    lines = [
        "# Errors",
        "",
        "Every error is OpenAI's JSON, on every path and method:",
        '`{"error": {"message": "…", "type": "…", "param": null, "code": "…"}}`.',
        "Generated from `gateway/errors.py` by `make docs`.",
        "",
        "| code | status | type | retry | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    advice = {
        "no": "no (`x-should-retry: false` where an SDK would)",
        "later": "after `Retry-After`",
        "fixed request": "with a mended request",
    }
    lines += [
        f"| `{kind.code}` | {kind.status} | `{kind.type}` | {advice[kind.retry]} | {kind.meaning} |" for kind in TABLE
    ]
    return "\n".join(lines) + "\n"
