"""How does a whole gateway stand for a test? Scripted upstreams and the gateway itself, each a process of its own.

Every process is ended by its id when its block is left, and by the kernel when the test run is killed: nothing stays
behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec

ROOT = Path(__file__).resolve().parents[1]
ALICE, BOB, NARROW, OPERATOR = "tw-alice-key", "tw-bob-key", "tw-narrow-key", "tw-operator-key"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "What is the capital of France?"}]

_START_LIMIT_S = 40.0
_PR_SET_PDEATHSIG = 1
# Looked up before any fork: the child between fork and exec must do as little as possible.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)


def _die_with_parent() -> None:
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(true: Callable[[], bool], limit_s: float = 5.0, pause_s: float = 0.01) -> bool:
    """Ask until it is true; False when it is not within the limit."""
    end_s = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end_s:
            return False
        time.sleep(pause_s)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Return every process that descends from `pid`."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread ended meanwhile
                found += map(int, children.read_text().split())
    return found[1:]


class Reply(msgspec.Struct, frozen=True):
    """What came back. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of OpenAI's envelope, its shape checked."""
        assert self.headers["content-type"].startswith("application/json"), self
        envelope = self.json()
        assert set(envelope) == {"error"}, envelope
        error: dict[str, Any] = envelope["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["code"] is None or isinstance(error["code"], str)
        assert len(self.body) < 4096, "errors echo nothing long"
        return error

    @property
    def events(self) -> list[Any]:
        """The decoded events of a stream; `[DONE]` is the text itself, a comment begins with a colon."""
        return [_event(block) for block in self.body.decode().split("\n\n") if block]


def _event(block: str) -> Any:
    if block.startswith(":"):
        return block
    assert block.startswith("data: "), block
    return block[6:] if block == "data: [DONE]" else json.loads(block[6:])


def ask(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    limit_s: float = 30,
) -> Reply:
    """Send one request on a connection of its own; `body` is bytes as they are, or anything else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit_s)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json"} | dict(headers or {}))
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


class Process:
    """A Python program whose standard error goes to a file."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        cwd: Path = ROOT,
        bound: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                preexec_fn=_die_with_parent if bound else None,  # noqa: PLW1509 - one call that takes no lock
            )
        self.pid = self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, limit_s: float = 15) -> int:
        return self.process.wait(limit_s)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self, limit_s: float = 15) -> None:
        """Ask it to end; make it end when it does not."""
        if self.running:
            self.process.terminate()
            try:
                self.process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def find(self, pattern: str, limit_s: float = _START_LIMIT_S) -> str:
        """Wait until it says what `pattern` finds, and return its first group."""
        found: list[str] = []

        def look() -> bool:
            found[:] = re.findall(pattern, self.said())
            return bool(found) or not self.running

        wait_until(look, limit_s)
        assert found, f"{self.process.args!r} never said {pattern!r}:\n{self.said()[-3000:]}"
        return found[0]


class Upstream:
    """A scripted look-alike of a vLLM server (`loadtests/upstream.py`)."""

    def __init__(self, models: Sequence[str], folder: Path, *options: str) -> None:
        self.models = models
        self._folder = folder
        self._options = options
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before."""
        log = self._folder / f"upstream-{re.sub('[^a-z0-9]', '-', self.models[0])}-{time.monotonic_ns()}.log"
        names = [part for model in self.models for part in ("--model", model)]
        argv = ["loadtests/upstream.py", "--port", str(self.port), "--tokens", "8", "--keep", "50", *names]
        self.process = Process([*argv, *self._options], log)
        self.port = int(self.process.find(r'"port": (\d+)'))

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def script(self, model: str | None = None, **fields: Any) -> None:
        """Change how one model answers, or all of them: the fields of `loadtests.transcript.Script`."""
        reply = ask(self.port, "POST", "/__script", {"model": model, "script": fields})
        assert reply.status == 200, reply

    def reset(self) -> None:
        """Forget scripts, counts and kept requests."""
        assert ask(self.port, "POST", "/__reset").status == 200

    def state(self) -> dict[str, int]:
        """What it counted: open, started, finished, aborted, failed, refused."""
        found: dict[str, int] = ask(self.port, "GET", "/__state").json()
        return found

    @property
    def seen(self) -> int:
        """How many requests for an answer have come, whatever became of them."""
        state = self.state()
        return state["started"] + state["refused"]

    def requests(self) -> list[dict[str, Any]]:
        """The last requests, each `{"path", "headers", "body"}` with the body decoded."""
        kept: list[dict[str, Any]] = ask(self.port, "GET", "/__requests").json()
        return [{**one, "body": json.loads(one["body"])} for one in kept]

    def idle(self, limit_s: float = 1.0) -> bool:
        """Wait until nothing is open; False when something still is."""
        return wait_until(lambda: self.state()["open"] == self.state()["uploading"] == 0, limit_s)


class Reciter:
    """A server that says exactly the bytes it was given: for answers that no script describes."""

    def __init__(self) -> None:
        self.bodies: deque[dict[str, Any]] = deque(maxlen=20)
        self.paths: deque[str] = deque(maxlen=20)
        self.whole: bytes = b"{}"
        self.stream: list[bytes] = []
        self.status = 200
        self.cut = False
        reciter = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's own name
                """Say nothing."""

            def do_GET(self) -> None:
                self._send(200, "application/json", b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reciter.bodies.append(body)
                reciter.paths.append(self.path)
                if reciter.status != 200 or not body.get("stream"):
                    self._send(reciter.status, "application/json", reciter.whole)
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for part in reciter.stream:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                    self.wfile.flush()
                if reciter.cut:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

            def _send(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients may leave at any moment."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def recite(self, *, whole: Any = None, stream: Iterable[Any] = (), status: int = 200, cut: bool = False) -> None:
        """Say this from now on: a whole answer, or events (objects; text as it is; `[DONE]` is added by you)."""
        self.whole = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
        self.stream = [
            b"data: " + (event.encode() if isinstance(event, str) else json.dumps(event).encode()) + b"\n\n"
            for event in stream
        ]
        self.status = status
        self.cut = cut
        self.bodies.clear()
        self.paths.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Gateway:
    """A running gateway."""

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        *options: str,
        ready: str = "/readyz",
        bound: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        number = time.monotonic_ns()
        path = folder / f"gateway-{number}.yaml"
        path.write_text(json.dumps(config, indent=1))  # JSON is YAML
        self.process = Process(
            ["-m", "gateway.cli", "serve", "--config", str(path), "--host", "127.0.0.1", "--port", "0", *options],
            folder / f"gateway-{number}.log",
            bound=bound,
            environment=environment,
        )
        try:
            self.port = int(self.process.find(r"on http://127\.0\.0\.1:(\d+)"))
            self.wait_for(ready)
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, path: str, limit_s: float = _START_LIMIT_S) -> None:
        """Wait until `path` answers 200."""

        def answers() -> bool:
            assert self.process.running, self.process.said()[-3000:]
            try:
                return self.get(path).status == 200
            except (OSError, http.client.HTTPException):
                return False

        assert wait_until(answers, limit_s, 0.02), f"{path} does not answer 200:\n{self.process.said()[-3000:]}"

    def get(self, path: str, key: str | None = None, method: str = "GET") -> Reply:
        return ask(self.port, method, path, headers={"authorization": f"Bearer {key}"} if key else None)

    def post(self, path: str, body: Any, key: str | None = ALICE, **headers: str) -> Reply:
        """Send `body` as JSON; headers are named with underscores."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            given["authorization"] = f"Bearer {key}"
        return ask(self.port, "POST", path, body, given)

    def chat(self, model: str = "auto", headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
        given = {name.replace("-", "_"): value for name, value in (headers or {}).items()}
        return self.post("/v1/chat/completions", {"model": model, "messages": HELLO} | fields, **given)

    def decision(self, reply: Reply, key: str = ALICE) -> dict[str, Any]:
        """Return the Decision that an answer points at; a streamed one is kept a moment after its last byte."""
        found = self.get(f"/v1/requests/{reply.headers['x-tierway-exchange-id']}", key)
        assert found.status == 200, found
        decision: dict[str, Any] = found.json()
        return decision

    def states(self) -> dict[str, str]:
        """Return what the gateway thinks of each backend."""
        tiers = self.get("/status", OPERATOR).json()["tiers"]
        return {backend["name"]: backend["state"] for tier in tiers for backend in tier["backends"]}

    def all_up(self, limit_s: float = 5) -> bool:
        """Wait until it thinks that every backend is up."""
        return wait_until(lambda: set(self.states().values()) == {"up"}, limit_s, 0.02)


def key_line(name: str, key: str, **fields: Any) -> dict[str, Any]:
    """Write an entry of `keys`."""
    return {"name": name, "sha256": sha256(key.encode()).hexdigest()} | fields


KEYS = [
    key_line("alice", ALICE),
    key_line("bob", BOB),
    key_line("narrow", NARROW, models=["auto", "small"]),
    key_line("operator", OPERATOR, admin=True),
]

_PRICES: dict[str, dict[str, float]] = {
    "small": {"input": 0.02, "output": 0.04},
    "medium": {"input": 0.10, "output": 0.20},
    "large": {"input": 1, "cached_input": 0.25, "output": 2},
}
_PATIENT = {"connect": "1s", "first_token": "10s", "between_tokens": "10s", "total": "30s"}


class Stack:
    """Three upstreams of different sizes, a reciter, and a gateway in front of them."""

    SMALL: ClassVar[str] = "tiny/small-1b"
    MEDIUM: ClassVar[str] = "mid-3b"
    LARGE: ClassVar[str] = "big-7b"

    def __init__(self, folder: Path, stop: contextlib.ExitStack) -> None:
        self.folder = folder
        self.small = self._upstream(stop, self.SMALL, "hasty-1b")
        self.medium = self._upstream(stop, self.MEDIUM)
        self.large = self._upstream(stop, self.LARGE)
        self.upstreams = (self.small, self.medium, self.large)
        self.reciter = Reciter()
        stop.callback(self.reciter.close)
        self._stop = stop
        self.gateway: Gateway

    def _upstream(self, stop: contextlib.ExitStack, *models: str) -> Upstream:
        upstream = Upstream(models, self.folder)
        stop.callback(upstream.kill)
        return upstream

    def start_gateway(self, *options: str, **changes: Any) -> Gateway:
        """Start a gateway that ends with this stack."""
        gateway = Gateway(self.config(**changes), self.folder, *options)
        self._stop.callback(gateway.process.stop)
        return gateway

    def config(
        self, *, server: Mapping[str, Any] | None = None, hold: Mapping[str, Any] | None = None, **more: Any
    ) -> Any:
        """Return the configuration of the gateway. `more` are further nouns, or others in place of these."""
        hold = {"tokens": 4, "time": "2s", **(hold or {})}
        small, medium, large = ({"tier": name} for name in ("small", "medium", "large"))
        doubting = [{**small, "doubt_below": 0.8}, {**medium, "doubt_below": 0.7}, large]

        def vllm(upstream: str, model: str, **timeouts: str) -> dict[str, Any]:
            return {"kind": "vllm", "url": upstream, "model": model, "timeouts": {**_PATIENT, **timeouts}}

        def tier(name: str, backend: str, price: str) -> dict[str, Any]:
            return {"name": name, "backends": [backend], "price": _PRICES[price]}

        return {
            "server": {"shutdown_grace": "10s", **(server or {})},
            "backends": {
                "small-1": vllm(self.small.url, self.SMALL),
                "medium-1": vllm(self.medium.url, self.MEDIUM),
                "large-1": vllm(self.large.url + "/v1", self.LARGE),
                "hasty-1": vllm(self.small.url, "hasty-1b", first_token="300ms", between_tokens="300ms", total="900ms"),
                "reciter-1": vllm(self.reciter.url, "reciter-9b"),
            },
            "tiers": [
                tier("small", "small-1", "small"),
                tier("hasty", "hasty-1", "small"),
                tier("reciter", "reciter-1", "small"),
                tier("medium", "medium-1", "medium"),
                tier("large", "large-1", "large"),
            ],
            "routes": {
                "auto": {"aliases": ["gpt-4o"], "steps": doubting, "hold": hold},
                "forgetful": {"steps": doubting, "hold": hold, "keep_doubted": "never"},
                "patient": {"steps": [{"tier": "hasty", "doubt_below": 0.8}, large], "hold": hold},
                "told": {"steps": [{"tier": "reciter", "doubt_below": 0.5}, large], "hold": hold},
            },
            "keys": KEYS,
            **more,
        }

    def reset(self) -> None:
        """As at the start, for the next test."""
        for upstream in self.upstreams:
            upstream.reset()
        assert self.gateway.all_up(), self.gateway.states()


@contextlib.contextmanager
def folder_for_a_test() -> Iterator[Path]:
    """A folder that goes when the block is left."""
    with tempfile.TemporaryDirectory(prefix="tierway-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def running_stack(*options: str, **changes: Any) -> Iterator[Stack]:
    """Start everything; `options` are the gateway's, `changes` those of its configuration."""
    with folder_for_a_test() as folder, contextlib.ExitStack() as stop:
        stack = Stack(folder, stop)
        stack.gateway = stack.start_gateway(*options, **changes)
        assert stack.gateway.all_up(), stack.gateway.states()
        yield stack
