"""Which bad requests must a gateway survive? A table of them, as bytes, so that nothing mends them on the way."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from tests.running import ALICE, HELLO, NARROW, Reply

LIMIT_BYTES = 16 * 1024 * 1024  # `server.max_body` by default


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One bad request: the bytes, and what is expected of the answer."""

    name: str
    raw: bytes
    status: int
    code: str | None
    param: str | None = None
    headless: bool = False
    """An answer without a body: to HEAD."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a case; `took_s` is from the first byte sent to the last one received."""

    reply: Reply
    took_s: float


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
OK = {"model": "auto", "messages": HELLO}
OK_BYTES = json.dumps(OK).encode()
_HOST = b"Host: gateway\r\n"
_AUTH = b"Authorization: Bearer " + ALICE.encode() + b"\r\n"
_JSON = b"Content-Type: application/json\r\n"


def head(line: str, *headers: bytes, auth: bytes = _AUTH, kind: bytes = _JSON) -> bytes:
    return line.encode("latin-1") + b" HTTP/1.1\r\n" + _HOST + auth + kind + b"".join(headers) + b"\r\n"


def post(body: bytes, *headers: bytes, path: str = CHAT, auth: bytes = _AUTH, kind: bytes = _JSON) -> bytes:
    return head(f"POST {path}", b"Content-Length: %d\r\n" % len(body), *headers, auth=auth, kind=kind) + body


def chunked(parts: list[bytes], path: str = CHAT) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head(f"POST {path}", b"Transfer-Encoding: chunked\r\n") + body + b"0\r\n\r\n"


def with_fields(**fields: Any) -> bytes:
    return json.dumps({**OK, **fields}).encode()


def text_fields(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "prompt": "Once", **fields}).encode()


def message(**fields: Any) -> bytes:
    return with_fields(messages=[{"role": "user", "content": "Hi", **fields}])


def raw_field(name: str, value: bytes) -> bytes:
    return OK_BYTES[:-1] + b', "%b": %b}' % (name.encode(), value)


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return raw_field("vendor", opening * depth + closing * depth)


def cases() -> list[Case]:
    """Return the table."""
    return [*_bodies(), *_fields(), *_texts(), *_sizes(), *_heads(), *_paths(), *_protocol()]


def _bodies() -> Iterator[Case]:
    """Yield what is no JSON object."""
    bad_json = {
        "empty body": b"",
        "blank body": b" \r\n\t ",
        "no JSON at all": b"hello",
        "a form": b"model=auto&messages=hi",
        "XML": b"<request/>",
        "cut in a string": OK_BYTES[:20],
        "cut before the last brace": OK_BYTES[:-1],
        "something behind": OK_BYTES + b"}",
        "two documents": OK_BYTES + b"\n" + OK_BYTES,
        "single quotes": OK_BYTES.replace(b'"', b"'"),
        "trailing comma": OK_BYTES[:-1] + b",}",
        "comment": b"/* hi */" + OK_BYTES,
        "bare key": b'{model: "auto"}',
        "NaN": raw_field("temperature", b"NaN"),
        "Infinity": raw_field("temperature", b"-Infinity"),
        "a float beyond floats": raw_field("temperature", b"1e999"),
        "a number with a leading zero": raw_field("n", b"01"),
        "hexadecimal": raw_field("n", b"0x1"),
        "half a literal": raw_field("stream", b"tru"),
        "invalid escape": raw_field("user", b'"\\x41"'),
        "half an escape": raw_field("user", b'"\\u12'),
        "a control character in a string": raw_field("user", b'"a\x01b"'),
        "NUL in a string": raw_field("user", b'"a\x00b"'),
        "NUL behind": OK_BYTES + b"\x00",
        "NULs only": b"\x00" * 64,
        "invalid UTF-8": raw_field("user", b'"\xff\xfe"'),
        "overlong UTF-8": raw_field("user", b'"\xc0\xaf"'),
        "a surrogate in UTF-8": raw_field("user", b'"\xed\xa0\x80"'),
        "lone high surrogate": raw_field("user", b'"\\ud800"'),
        "lone low surrogate": raw_field("user", b'"\\udc00 x"'),
        "surrogates the wrong way round": message(content="X").replace(b'"X"', b'"\\udc00\\ud800"'),
        "byte order mark": b"\xef\xbb\xbf" + OK_BYTES,
        "UTF-16": json.dumps(OK).encode("utf-16"),
    }
    for name, body in bad_json.items():
        yield Case(name=name, raw=post(body), status=400, code="invalid_json")
    for name, body in {
        "array": b"[]",
        "array of requests": b"[%b]" % OK_BYTES,
        "text": b'"auto"',
        "number": b"12",
        "null": b"null",
        "true": b"true",
    }.items():
        yield Case(name=f"body is {name}", raw=post(body), status=400, code="invalid_type")
    yield Case(name="no body and no length", raw=head(f"POST {CHAT}"), status=400, code="invalid_json")
    yield Case(name="empty chunked body", raw=chunked([]), status=400, code="invalid_json")
    for depth in (100, 1000, 100_000):
        yield Case(name=f"{depth} arrays deep", raw=post(nested(depth)), status=400, code="invalid_value")
        yield Case(
            name=f"{depth} objects deep",
            raw=post(nested(depth, b'{"a":', b"}").replace(b":}", b":0}", 1)),
            status=400,
            code="invalid_value",
        )
    yield Case(name="100000 arrays that never close", raw=post(b"[" * 100_000), status=400, code=None)
    for name, number in {
        "huge integer": b"9" * 40,
        "enormous integer": b"1" + b"0" * 5000,
        "negative huge integer": b"-" + b"9" * 30,
    }.items():
        yield Case(name=name, raw=post(raw_field("vendor", number)), status=400, code=None)
        yield Case(name=f"{name} for max_tokens", raw=post(raw_field("max_tokens", number)), status=400, code=None)
    yield Case(name="escaped NUL", raw=post(message(content="a\x00b")), status=400, code="invalid_value")
    yield Case(
        name="a key given twice, the last one wrong",
        raw=post(raw_field("model", b"7")),
        status=400,
        code="invalid_type",
        param="model",
    )
    yield Case(
        name="messages given twice, the last empty",
        raw=post(raw_field("messages", b"[]")),
        status=400,
        code="invalid_value",
        param="messages",
    )


def _fields() -> Iterator[Case]:
    """Yield chats with a field that cannot be."""
    for name, body, code, param in (
        ("no model", json.dumps({"messages": HELLO}).encode(), "missing_required_parameter", "model"),
        ("no messages", b'{"model": "auto"}', "missing_required_parameter", "messages"),
        ("an empty object", b"{}", "missing_required_parameter", None),
        ("empty messages", with_fields(messages=[]), "invalid_value", "messages"),
        ("messages null", with_fields(messages=None), "invalid_type", "messages"),
        ("messages text", with_fields(messages="Hi"), "invalid_type", "messages"),
        ("messages an object", with_fields(messages={"role": "user"}), "invalid_type", "messages"),
        ("a message that is text", with_fields(messages=["Hi"]), "invalid_type", "messages[0]"),
        ("a message that is null", with_fields(messages=[None]), "invalid_type", "messages[0]"),
        ("a message without a role", with_fields(messages=[{"content": "Hi"}]), "missing_required_parameter", "messages[0].role"),
        ("a message without content", with_fields(messages=[{"role": "user"}]), "invalid_value", "messages[0].content"),
        ("content null", message(content=None), "invalid_value", "messages[0].content"),
        ("content a number", message(content=7), "invalid_type", "messages[0].content"),
        ("content an object", message(content={"text": "Hi"}), "invalid_type", "messages[0].content"),
        ("content parts that are text", message(content=["Hi"]), "invalid_type", None),
        ("a content part without a type", message(content=[{"text": "Hi"}]), "missing_required_parameter", None),
        ("an image without an address", message(content=[{"type": "image_url", "image_url": {}}]), "missing_required_parameter", None),
        ("an unknown role", message(role="robot"), "invalid_value", "messages[0].role"),
        ("a role in capitals", message(role="USER"), "invalid_value", "messages[0].role"),
        ("a role that is a number", message(role=1), "invalid_type", "messages[0].role"),
        ("tool calls that are text", message(role="assistant", tool_calls="x"), "invalid_type", None),
        ("a tool call with arguments as object", message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": {}}}]), "invalid_type", None),
        ("model null", with_fields(model=None), "invalid_type", "model"),
        ("model a number", with_fields(model=7), "invalid_type", "model"),
        ("model a list", with_fields(model=["auto"]), "invalid_type", "model"),
        ("model empty", with_fields(model=""), "invalid_value", "model"),
        ("model of 100000 letters", with_fields(model="x" * 100_000), "invalid_value", "model"),
        ("stream text", with_fields(stream="true"), "invalid_type", "stream"),
        ("stream a number", with_fields(stream=1), "invalid_type", "stream"),
        ("stream_options text", with_fields(stream=True, stream_options="usage"), "invalid_type", "stream_options"),
        ("stream_options a list", with_fields(stream=True, stream_options=[]), "invalid_type", "stream_options"),
        ("stream_options without a stream", with_fields(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
        ("include_usage text", with_fields(stream=True, stream_options={"include_usage": "yes"}), "invalid_type", "stream_options.include_usage"),
        ("n zero", with_fields(n=0), "invalid_value", "n"),
        ("n negative", with_fields(n=-1), "invalid_value", "n"),
        ("n a fraction", with_fields(n=1.5), "invalid_type", "n"),
        ("n a million", with_fields(n=1_000_000), "invalid_value", "n"),
        ("n text", with_fields(n="2"), "invalid_type", "n"),
        ("max_tokens zero", with_fields(max_tokens=0), "invalid_value", "max_tokens"),
        ("max_tokens negative", with_fields(max_completion_tokens=-5), "invalid_value", "max_completion_tokens"),
        ("max_tokens text", with_fields(max_tokens="many"), "invalid_type", "max_tokens"),
        ("temperature text", with_fields(temperature="hot"), "invalid_type", "temperature"),
        ("temperature too high", with_fields(temperature=2.1), "invalid_value", "temperature"),
        ("temperature a list", with_fields(temperature=[1]), "invalid_type", "temperature"),
        ("top_p above one", with_fields(top_p=1.1), "invalid_value", "top_p"),
        ("penalty too low", with_fields(presence_penalty=-3), "invalid_value", "presence_penalty"),
        ("seed text", with_fields(seed="1"), "invalid_type", "seed"),
        ("stop a number", with_fields(stop=7), "invalid_type", "stop"),
        ("stop of numbers", with_fields(stop=[7]), "invalid_type", None),
        ("logprobs a number", with_fields(logprobs=5), "invalid_type", "logprobs"),
        ("top_logprobs without logprobs", with_fields(top_logprobs=2), "invalid_value", "top_logprobs"),
        ("top_logprobs 21", with_fields(logprobs=True, top_logprobs=21), "invalid_value", "top_logprobs"),
        ("top_logprobs negative", with_fields(logprobs=True, top_logprobs=-1), "invalid_value", "top_logprobs"),
        ("logit_bias a list", with_fields(logit_bias=[1]), "invalid_type", "logit_bias"),
        ("tools an object", with_fields(tools={}), "invalid_type", "tools"),
        ("a tool without a type", with_fields(tools=[{"function": {"name": "f"}}]), "missing_required_parameter", None),
        ("a function without a name", with_fields(tools=[{"type": "function", "function": {}}]), "missing_required_parameter", None),
        ("tool_choice a number", with_fields(tool_choice=1), "invalid_type", "tool_choice"),
        ("response_format text", with_fields(response_format="json"), "invalid_type", "response_format"),
        ("response_format without a type", with_fields(response_format={}), "missing_required_parameter", None),
        ("user a number", with_fields(user=7), "invalid_type", "user"),
        ("metadata text", with_fields(metadata="x"), "invalid_type", "metadata"),
    ):  # fmt: skip
        yield Case(name=name, raw=post(body), status=400, code=code, param=param)
    for name, model, auth in (
        ("an unknown model", "gpt-17", _AUTH),
        ("a model with a line end in its name", "a\r\nx-evil: 1", _AUTH),
        ("a model in another script", "模型" * 100, _AUTH),
        ("a model that this key may not use", "large", b"Authorization: Bearer " + NARROW.encode() + b"\r\n"),
    ):
        yield Case(
            name=name, raw=post(with_fields(model=model), auth=auth), status=404, code="model_not_found", param="model"
        )


def _texts() -> Iterator[Case]:
    """Yield text completions with a field that cannot be."""
    for name, body, code, param in (
        ("no prompt", b'{"model": "auto"}', "missing_required_parameter", "prompt"),
        ("prompt null", text_fields(prompt=None), "invalid_type", "prompt"),
        ("prompt a number", text_fields(prompt=7), "invalid_type", "prompt"),
        ("prompt an object", text_fields(prompt={}), "invalid_type", "prompt"),
        ("no prompts", text_fields(prompt=[]), "invalid_value", "prompt"),
        ("empty token ids", text_fields(prompt=[[]]), "invalid_value", "prompt"),
        ("text and ids mixed", text_fields(prompt=["a", 1]), "invalid_type", "prompt"),
        ("token ids that are fractions", text_fields(prompt=[1.5]), "invalid_type", None),
        ("token ids three lists deep", text_fields(prompt=[[[1]]]), "invalid_type", None),
        ("logprobs true", text_fields(logprobs=True), "invalid_type", "logprobs"),
        ("logprobs 100", text_fields(logprobs=100), "invalid_value", "logprobs"),
        ("echo text", text_fields(echo="yes"), "invalid_type", "echo"),
        ("best_of zero", text_fields(best_of=0), "invalid_value", "best_of"),
    ):
        yield Case(name=f"text: {name}", raw=post(body, path=TEXT), status=400, code=code, param=param)


def _sizes() -> Iterator[Case]:
    """Yield bodies that are too large."""
    too_large = b"Content-Length: %d\r\n"
    yield Case(
        name="a length over the limit",
        raw=head(f"POST {CHAT}", too_large % (LIMIT_BYTES + 1)),
        status=413,
        code="body_too_large",
    )
    yield Case(
        name="a length of 19 digits", raw=head(f"POST {CHAT}", too_large % (10**18)), status=413, code="body_too_large"
    )
    yield Case(
        name="a length over the limit, waiting for 100",
        raw=head(f"POST {CHAT}", too_large % (LIMIT_BYTES + 1), b"Expect: 100-continue\r\n"),
        status=413,
        code="body_too_large",
    )
    yield Case(
        name="over the limit in chunks", raw=chunked([b" " * 1024 * 1024] * 17), status=413, code="body_too_large"
    )


def _heads() -> Iterator[Case]:
    """Yield heads that say what cannot be."""
    for name, kind in {
        "text/plain": b"text/plain",
        "a form": b"application/x-www-form-urlencoded",
        "multipart": b"multipart/form-data; boundary=x",
        "nearly JSON": b"application/jsonp",
        "nonsense": b";;;",
        "binary": b"application/octet-stream",
    }.items():
        yield Case(
            name=f"content type {name}",
            raw=post(OK_BYTES, kind=b"Content-Type: %b\r\n" % kind),
            status=400,
            code="invalid_content_type",
        )
    yield Case(
        name="gzip",
        raw=post(gzip.compress(OK_BYTES), b"Content-Encoding: gzip\r\n"),
        status=400,
        code="invalid_content_type",
    )
    yield Case(name="gzip that does not say so", raw=post(gzip.compress(OK_BYTES)), status=400, code="invalid_json")
    yield Case(
        name="an unknown encoding",
        raw=post(OK_BYTES, b"Content-Encoding: rot13\r\n"),
        status=400,
        code="invalid_content_type",
    )
    for name, auth in {
        "no key": b"",
        "an empty key": b"Authorization: \r\n",
        "a scheme alone": b"Authorization: Bearer\r\n",
        "a scheme and blanks": b"Authorization: Bearer     \r\n",
        "a key without a scheme": b"Authorization: " + ALICE.encode() + b"\r\n",
        "another scheme": b"Authorization: Basic dTpw\r\n",
        "an unknown key": b"Authorization: Bearer tw-nobody\r\n",
        "a key in quotes": b'Authorization: Bearer "' + ALICE.encode() + b'"\r\n',
        "a key in capitals": b"Authorization: Bearer " + ALICE.upper().encode() + b"\r\n",
        "a key of 30000 letters": b"Authorization: Bearer " + b"x" * 30_000 + b"\r\n",
        "a key of odd bytes": b"Authorization: Bearer \xff\xfe\x80\r\n",
        "an unknown x-api-key": b"x-api-key: tw-nobody\r\n",
    }.items():
        yield Case(name=name, raw=post(OK_BYTES, auth=auth), status=401, code="invalid_api_key")
        if name in ("no key", "an unknown key"):
            yield Case(name=f"{name}, bad body", raw=post(b"{", auth=auth), status=401, code="invalid_api_key")
    yield Case(
        name="no key, a length over the limit",
        raw=head(f"POST {CHAT}", b"Content-Length: 99999999\r\n", auth=b""),
        status=401,
        code="invalid_api_key",
    )
    yield Case(name="the status without its key", raw=head("GET /status"), status=403, code="admin_only")
    for name, line in {
        "a folded line in x-request-id": b"x-request-id: a\r\n evil: 1\r\n",
        "a bare line feed in x-request-id": b"x-request-id: a\nx-evil 1\r\n",
        "NUL in a header": b"x-request-id: a\x00b\r\n",
        "a header without a colon": b"nonsense\r\n",
        "a header without a name": b": x\r\n",
        "a blank before the colon": b"x-a : 1\r\n",
    }.items():
        yield Case(name=name, raw=post(OK_BYTES, line), status=400, code="invalid_http")
    yield Case(
        name="an insane x-request-id",
        raw=post(b"{", b"x-request-id: <script>%0d%0aSet-Cookie: a=b</script>\r\n"),
        status=400,
        code="invalid_json",
    )
    many = b"".join(b"x-filler-%d: %b\r\n" % (number, b"y" * 100) for number in range(5000))
    yield Case(name="5000 headers", raw=post(OK_BYTES, many), status=431, code="head_too_large")
    yield Case(
        name="a header of 1 MB",
        raw=post(OK_BYTES, b"x-filler: " + b"y" * 1_000_000 + b"\r\n"),
        status=431,
        code="head_too_large",
    )
    yield Case(
        name="a head that never ends",
        raw=head("GET /healthz")[:-2] + b"x-filler: 1\r\n" * 50_000,
        status=431,
        code="head_too_large",
    )


def _paths() -> Iterator[Case]:
    """Yield paths and methods that are not there."""
    for path in (
        "/",
        "/v1",
        "/v1/",
        "/v1/chat/completions/",
        "/v1/chat",
        "/V1/CHAT/COMPLETIONS",
        "//v1/chat/completions",
        "/v1/chat/completions/../models",
        "/v1/embeddings",
        "/v1/%2e%2e/%2e%2e/etc/passwd",
        "/%00",
        "/%",
        "/%zz%",
        "/v1/%ff%fe",
        "/" + "a" * 8000,
        "/v1/chat/completions%0d%0ax-evil:1",
        "/<script>alert(1)</script>",
        "*",
    ):
        shown = path if len(path) < 40 else path[:40] + "…"
        yield Case(name=f"POST {shown}", raw=post(OK_BYTES, path=path), status=404, code="unknown_url")
    for line, code in (
        ("GET /v1/models/", "model_not_found"),
        ("GET /v1/models/none", "model_not_found"),
        ("GET /v1/models/%00%ff", "model_not_found"),
        ("GET /v1/models/..%2f..%2fetc%2fpasswd", "model_not_found"),
        ("GET /v1/models/" + "m" * 5000, "model_not_found"),
        ("GET /v1/requests/none", "exchange_not_found"),
        ("GET /v1/requests/tw00-" + "0" * 32, "exchange_not_found"),
        ("GET /v1/requests/twff-" + "0" * 32, "exchange_not_found"),
        ("GET /favicon.ico", "unknown_url"),
    ):
        yield Case(name=line[:60], raw=head(line), status=404, code=code)
    for method, path in (
        ("GET", CHAT),
        ("PUT", CHAT),
        ("DELETE", CHAT),
        ("PATCH", TEXT),
        ("OPTIONS", CHAT),
        ("TRACE", CHAT),
        ("PROPFIND", CHAT),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/auto"),
        ("POST", "/healthz"),
        ("DELETE", "/metrics"),
    ):
        yield Case(name=f"{method} {path}", raw=head(f"{method} {path}"), status=405, code="method_not_allowed")
    yield Case(name=f"HEAD {CHAT}", raw=head(f"HEAD {CHAT}"), status=405, code=None, headless=True)


def _protocol() -> Iterator[Case]:
    """Yield what is no HTTP, or HTTP of which nobody can say where a request ends."""
    line = f"POST {CHAT} HTTP/1.1\r\n".encode() + _HOST + _AUTH + _JSON
    for name, raw in {
        "two lengths": line + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\n" + OK_BYTES,
        "a length and chunks": line + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + OK_BYTES,
        "a negative length": line + b"Content-Length: -5\r\n\r\n" + OK_BYTES,
        "a length that is no number": line + b"Content-Length: many\r\n\r\n" + OK_BYTES,
        "a length beyond numbers": line + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
        "an unknown transfer encoding": line + b"Transfer-Encoding: gzip\r\n\r\n" + OK_BYTES,
        "a chunk size that is none": line + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + OK_BYTES,
        "a chunk longer than it says": line + b"Transfer-Encoding: chunked\r\n\r\n3\r\n" + OK_BYTES + b"\r\n0\r\n\r\n",
        "an unknown method": b"BREW /pot HTTP/1.1\r\n\r\n",
        "a method in small letters": b"post /v1/chat/completions HTTP/1.1\r\n\r\n",
        "HTTP/3.0": b"GET /healthz HTTP/3.0\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        "nothing but NULs": b"\x00" * 100,
        "an odd path": b"GET /v1/\xff\xfe HTTP/1.1\r\n\r\n",
        "a blank in the path": b"GET /v1/mo dels HTTP/1.1\r\n\r\n",
        "an address without a path": b"GET http://gateway HTTP/1.1\r\n\r\n",
    }.items():
        yield Case(name=name, raw=raw, status=400, code="invalid_http")
    yield Case(name="CONNECT", raw=b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", status=405, code="method_not_allowed")


def send(port: int, case: Case, limit_s: float = 10) -> Outcome:
    """Send a case on a connection of its own and read one answer; interim answers (100) are passed over."""
    with socket.create_connection(("127.0.0.1", port), limit_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started_s = time.monotonic()
        # It may be refused before its end: the answer is there to read all the same.
        with contextlib.suppress(OSError):
            connection.sendall(case.raw)
        reply = _read(connection, headless=case.headless)
        return Outcome(reply=reply, took_s=time.monotonic() - started_s)


def _read(connection: socket.socket, *, headless: bool) -> Reply:
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            data += _more(connection, data)
        top, _, data = data.partition(b"\r\n\r\n")
        lines = top.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        if status != 100:
            break
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    assert len(headers) == len(lines) - 1, f"a header twice: {lines}"
    length = 0 if headless else int(headers["content-length"])
    while len(data) < length:
        data += _more(connection, data)
    assert len(data) == length
    return Reply(status, headers, data)


def _more(connection: socket.socket, so_far: bytes) -> bytes:
    data = connection.recv(65536)
    assert data, f"the connection ended without a whole answer: {so_far!r}"
    return data


def check(case: Case, outcome: Outcome) -> None:
    """Raise AssertionError where the answer is not what a client can use."""
    reply = outcome.reply
    assert reply.status == case.status, (case.name, reply)
    assert 400 <= reply.status < 500
    assert reply.headers.get("x-request-id"), case.name
    assert reply.headers["x-request-id"].isascii()
    assert "x-evil" not in reply.headers
    assert "<" not in reply.headers["x-request-id"]
    assert ("www-authenticate" in reply.headers) == (reply.status == 401)
    assert "x-should-retry" not in reply.headers
    if case.headless:
        return
    error = reply.error
    assert ALICE not in reply.body.decode()
    if case.code is not None:
        assert error["code"] == case.code, (case.name, error)
    if case.param is not None:
        assert error["param"] == case.param, (case.name, error)
