"""Does the scripted upstream answer like the recorded vLLM, and does it count truly?"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "contract" / "vllm"
MODEL = "smollm2-135m"
CHAT = "/v1/chat/completions"
FRANCE = ["The", " capital", " of", " France", " is", " Paris", "."]
FRANCE_LOGPROBS = [
    -1.8095355033874512,
    -0.021278195083141327,
    -0.011796713806688786,
    -0.010608352720737457,
    -0.03851456940174103,
    -0.04880419746041298,
    -0.5870575904846191,
    -0.23227134346961975,
]
PARIS = [" Paris", ".", "\n", "\n", "The", " answer", " is", ":"]
PARIS_LOGPROBS = [
    -0.2692539393901825,
    -0.3885854184627533,
    -0.9825373888015747,
    -0.8482307195663452,
    -1.9182751178741455,
    -3.314284086227417,
    -0.3793146312236786,
    -0.4614576995372772,
]


class Upstream:
    """A running upstream and ways to talk to it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def script(self, **fields: Any) -> None:
        assert self.ask("POST", "/__script", {"script": fields})[0] == 200

    def state(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.ask("GET", "/__state")[2])
        return found

    @contextmanager
    def answer(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Iterator[HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with self.answer(method, path, body, headers) as response:
            return response.status, dict(response.getheaders()), response.read()

    def chat(self, **fields: Any) -> tuple[int, dict[str, str], bytes]:
        return self.ask("POST", CHAT, {"model": MODEL, "messages": []} | fields)

    def sent(self, body: dict[str, Any]) -> socket.socket:
        """Send a request over a bare connection and leave the answer to the caller."""
        data = json.dumps({"model": MODEL, "messages": []} | body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data
        )
        return connection

    def wait_for(self, **counts: int) -> None:
        """Wait a second at most for counts to be what they should."""
        end = time.monotonic() + 1
        while True:
            state = self.state()
            if all(state[name] == count for name, count in counts.items()):
                return
            assert time.monotonic() < end, f"{counts} expected, {state} found"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def process() -> Iterator[Upstream]:
    argv = [sys.executable, "loadtests/upstream.py", "--until-eof", "--keep", "4", "--model", MODEL]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        yield Upstream(json.loads(child.stdout.readline())["port"])
        child.stdin.close()
        assert child.wait(5) == 0


@pytest.fixture
def upstream(process: Upstream) -> Upstream:
    assert process.ask("POST", "/__reset")[0] == 200
    return process


def recording(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return found


def recorded_body(name: str) -> bytes:
    """The body as it went over the wire: the recordings hold whole answers decoded."""
    response = recording(name)["response"]
    if "body_file" in response:
        return (RECORDED / str(response["body_file"])).read_bytes()
    body = json.dumps(response["body"], separators=(",", ":"), ensure_ascii=False).encode()
    assert len(body) == int(response["headers"]["content-length"])
    return body


def documents(body: bytes) -> list[Any]:
    if not body.startswith(b"data: "):
        return [json.loads(body)]
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")]
    return [json.loads(event) for event in events if event not in (b"", b"[DONE]")]


def replay(
    upstream: Upstream, name: str, pieces: list[str], logprobs: list[float]
) -> tuple[int, dict[str, str], bytes]:
    """Send a recorded request to an upstream that is scripted to give the recorded answer."""
    recorded, first = recording(name), documents(recorded_body(name))[0]
    request = recorded["request"]
    is_chat = request["path"] == CHAT
    prompt_tokens = 37 if is_chat else 5
    upstream.script(pieces=pieces, logprobs=logprobs, created=first["created"], prompt_tokens=prompt_tokens)
    answer_id = first["id"].removeprefix("chatcmpl-" if is_chat else "cmpl-")
    return upstream.ask(request["method"], request["path"], request["json"], {"x-request-id": answer_id})


def shape(value: Any, key: str = "") -> Any:
    """Names in their order and kinds of values: all of an answer but its words and numbers."""
    if isinstance(value, dict):
        if key == "top_logprobs":  # of /v1/completions: the names are tokens
            return len(value)
        return [(name, shape(member, name)) for name, member in value.items()]
    if isinstance(value, list):
        return "bytes" if key == "bytes" else [shape(member, key) for member in value]
    return value if value is None or isinstance(value, bool) else type(value).__name__


@pytest.mark.parametrize(
    ("name", "pieces", "logprobs"),
    [
        ("chat_basic", FRANCE, FRANCE_LOGPROBS),
        ("chat_length", FRANCE, FRANCE_LOGPROBS),
        ("chat_logprobs_no_top", FRANCE, FRANCE_LOGPROBS),
        ("chat_request_id_header", FRANCE, FRANCE_LOGPROBS),
        ("chat_stream", FRANCE, FRANCE_LOGPROBS),
        ("chat_stream_usage", FRANCE, FRANCE_LOGPROBS),
        ("completions_basic", PARIS, PARIS_LOGPROBS),
        ("completions_stream", PARIS, PARIS_LOGPROBS),
    ],
)
def test_answers_byte_for_byte(upstream: Upstream, name: str, pieces: list[str], logprobs: list[float]) -> None:
    status, headers, body = replay(upstream, name, pieces, logprobs)
    assert status == 200
    assert body == recorded_body(name)
    variable = {"date", "x-request-id"}
    assert [n for n in headers if n not in variable] == [
        n for n in recording(name)["response"]["headers"] if n not in variable
    ]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("chat_logprobs", FRANCE),
        ("chat_stream_logprobs", FRANCE),
        ("chat_stream_n2", FRANCE),
        ("completions_logprobs", PARIS),
        ("completions_stream_logprobs", PARIS),
        ("completions_batch", PARIS),
    ],
)
def test_answers_in_the_recorded_shape(upstream: Upstream, name: str, pieces: list[str]) -> None:
    status, _, body = replay(upstream, name, pieces, FRANCE_LOGPROBS)
    assert status == 200
    assert [shape(found) for found in documents(body)] == [shape(found) for found in documents(recorded_body(name))]


def test_models_and_unknown_model_answer_as_recorded(upstream: Upstream) -> None:
    assert shape(json.loads(upstream.ask("GET", "/v1/models")[2])) == shape(
        recording("get_v1_models")["response"]["body"]
    )
    recorded = recording("err_unknown_model")
    status, _, body = upstream.ask("POST", CHAT, recorded["request"]["json"])
    assert (status, json.loads(body)) == (404, recorded["response"]["body"])


def test_tokens_come_one_by_one(upstream: Upstream) -> None:
    upstream.script(tokens=5, interval_ms=20)
    with upstream.answer("POST", CHAT, {"model": MODEL, "messages": [], "stream": True}) as response:
        arrivals = [time.monotonic() for line in response if line.startswith(b"data: {")]
    assert len(arrivals) == 7  # role, five tokens, the end
    assert arrivals[-1] - arrivals[1] >= 0.08


def test_bursts_gather_events_and_change_no_byte(upstream: Upstream) -> None:
    upstream.script(tokens=10, created=1)
    single = upstream.chat(stream=True)[2]
    upstream.script(tokens=10, created=1, burst=4)
    gathered = upstream.chat(stream=True)[2]
    assert [event[40:] for event in single.split(b"\n\n")] == [event[40:] for event in gathered.split(b"\n\n")]


def test_pipelined_requests_are_answered_in_their_order(upstream: Upstream) -> None:
    def request(tokens: int) -> bytes:
        body = json.dumps({"model": MODEL, "messages": [], "max_tokens": tokens}).encode()
        return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body

    upstream.script(interval_ms=5)
    with socket.create_connection(("127.0.0.1", upstream.port), timeout=5) as connection:
        connection.sendall(request(3) + request(1) + request(2))
        received = b""
        while received.count(b'"metrics":null}') < 3:
            received += connection.recv(65536)
    found = [
        json.loads(part.split(b"\r\n\r\n")[1])["usage"]["completion_tokens"]
        for part in received.split(b"HTTP/1.1 200")[1:]
    ]
    assert found == [3, 1, 2]
    assert upstream.state()["finished"] == 3


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["at once", "later"])
def test_departure_of_the_peer_is_counted(upstream: Upstream, stream: bool, moment: str) -> None:
    upstream.script(interval_ms=20, tokens=1000)
    connections = [upstream.sent({"stream": stream}) for _ in range(20)]
    if moment == "later":
        upstream.wait_for(started=20, open=20)
    for at, connection in enumerate(connections):
        if at % 2:  # every other one breaks off with RST
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    upstream.wait_for(open=0, uploading=0, finished=0, connections=1)
    state = upstream.state()
    # A connection that is broken at once may be gone before its request was read.
    assert state["aborted"] == state["started"]
    assert state["started"] == 20 if moment == "later" else state["started"] >= 10


def test_departure_in_the_middle_of_the_request(upstream: Upstream) -> None:
    with socket.create_connection(("127.0.0.1", upstream.port), timeout=5) as connection:
        connection.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{" % CHAT.encode())
        upstream.wait_for(uploading=1, started=0)
    upstream.wait_for(uploading=0, started=0)


def test_complete_answers_are_counted(upstream: Upstream) -> None:
    upstream.script(tokens=9)
    assert upstream.chat()[0] == upstream.chat(stream=True)[0] == 200
    state = upstream.state()
    assert (state["started"], state["finished"], state["open"], state["aborted"]) == (2, 2, 0, 0)
    assert state["tokens"] == 20
    assert state["events"] == 12


@pytest.mark.parametrize(("how", "fault"), [("close", IncompleteRead), ("reset", ConnectionResetError)])
def test_dies_after_some_tokens(upstream: Upstream, how: str, fault: type[Exception]) -> None:
    body = {"model": MODEL, "messages": [], "stream": True}
    upstream.script(fail=how, fail_after=2, interval_ms=5)
    with upstream.answer("POST", CHAT, body) as response, pytest.raises(fault):
        response.read()
    state = upstream.state()
    assert (state["failed"], state["tokens"], state["aborted"], state["open"]) == (1, 2, 0, 0)


def test_dies_before_the_head(upstream: Upstream) -> None:
    upstream.script(fail="close")
    with pytest.raises(RemoteDisconnected):
        upstream.chat(stream=True)


def test_dead_engine_speaks_of_it(upstream: Upstream) -> None:
    upstream.script(fail="error", fail_after=1)
    events = upstream.chat(stream=True)[2].split(b"\n\n")
    assert json.loads(events[2].removeprefix(b"data: "))["error"]["code"] == 500
    assert events[3] == b"data: [DONE]"
    assert upstream.chat()[0] == 500


def test_hangs_until_the_peer_leaves(upstream: Upstream) -> None:
    upstream.script(fail="hang", fail_after=1)
    with upstream.sent({"stream": True}) as connection:
        upstream.wait_for(tokens=1, open=1)
        connection.settimeout(0.05)
        received = b""
        while received.count(b"data: ") < 2:
            piece = connection.recv(65536)
            assert piece
            received += piece
        with pytest.raises(TimeoutError):
            connection.recv(65536)
    upstream.wait_for(open=0, aborted=1)


def test_a_script_plays_so_many_times(upstream: Upstream) -> None:
    upstream.script(status=503, times=2, headers={"retry-after": "1"})
    answers = [upstream.chat() for _ in range(3)]
    assert [status for status, _, _ in answers] == [503, 503, 200]
    assert answers[0][1]["retry-after"] == "1"
    assert json.loads(answers[0][2])["error"]["code"] == 503


def test_a_proxy_s_page(upstream: Upstream) -> None:
    upstream.script(html=True)
    status, headers, body = upstream.chat()
    assert (status, headers["content-type"]) == (502, "text/html")
    assert b"<html>" in body


def test_a_request_may_bring_its_own_script(upstream: Upstream) -> None:
    upstream.script(tokens=3)
    own = json.loads(upstream.chat(user='script:{"logprob": -3.0}', logprobs=True)[2])
    entries = own["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-3.0] * 4
    assert upstream.chat(user='script:{"fails": "nonsense"}')[0] == 400
    assert upstream.chat(user="somebody")[0] == 200


def test_requests_are_kept_as_they_came(upstream: Upstream) -> None:
    upstream.chat(seed=7)
    kept = json.loads(upstream.ask("GET", "/__requests")[2])
    assert [json.loads(request["body"])["seed"] for request in kept] == [7]
    assert kept[0]["headers"]["host"] == f"127.0.0.1:{upstream.port}"
