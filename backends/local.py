"""How does a local model stay up? A child process of its own, watched, restarted when it dies, ended with us.

Rules a reader must not break:

* The model never runs in this process: a crash in it costs a restart, not the gateway.
* The URL is valid for as long as the server is: a restarted child listens on the port of the first one.
* `stop()`, and any way of failing to start, leave no process behind. Where we cannot act any more (kill -9), the child
  acts itself: `backends.model_server` says how.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections import deque
from pathlib import Path
from typing import Literal

import msgspec

from backends.model_server import HOST, Ready, ServerSettings

State = Literal["starting", "ready", "restarting", "stopped", "failed"]

_log = logging.getLogger("tierway.local")

_KEPT_LINES = 50
_TOLD_LINES = 8
_LOG_PREFIX = re.compile(r"^[\d.]+ [EWID] ")  # llama.cpp's time and level
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent

# Threads of OpenMP that wait by spinning take the cores from the other models: with two models on two cores decoding
# falls from 164 to 2 tokens/s. These make them sleep.
_QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


class LocalSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One local model: its name in logs, its GGUF file and how it is served.

    `context_tokens` is the window of each of the `parallel` requests; `model_id` what the server calls itself.
    """

    name: str
    weights: Path
    model_id: str
    context_tokens: int = 4096
    parallel: int = 4
    threads: int = 1


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long the supervisor waits for what, in seconds.

    The pause before a restart doubles from `first_pause_s` to `longest_pause_s`, and begins anew once a child has
    lived for `healthy_after_s`.
    """

    start_s: float = 120.0
    stop_s: float = 3.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    healthy_after_s: float = 60.0


class LocalModelFailed(Exception):  # noqa: N818 says what is the matter, as the faults of backend.py do
    """The model server did not start. The message names the model and carries the server's last words."""


class LocalServer:
    """A model server of our own.

    `start()` once, from the thread that will outlive the child: on Linux the kernel ends the child with that thread.
    """

    def __init__(self, settings: LocalSettings, patience: Patience | None = None) -> None:
        self._settings = settings
        self._patience = patience or Patience()
        self._state: State = "stopped"
        self._port = 0
        self._restarts = 0
        self._child: _Child | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """What it is doing; "failed" means that the first start failed and nothing is being tried."""
        return self._state

    @property
    def base_url(self) -> str | None:
        """Where it answers, without `/v1`; None before it was ready for the first time."""
        return f"http://{HOST}:{self._port}" if self._port else None

    @property
    def restarts(self) -> int:
        """How many times a dead child was replaced by one that answers."""
        return self._restarts

    @property
    def pid(self) -> int | None:
        """Process id of the child that serves now; None while there is none."""
        return self._child.pid if self._child and self._state == "ready" else None

    async def start(self) -> None:
        """Start the child and return when it answers. Raises `LocalModelFailed`."""
        if self._supervisor is not None:
            raise RuntimeError(f"{self._settings.name} was started before")
        self._state = "starting"
        try:
            await self._spawn()
        except BaseException:  # a cancelled start is a failed one; the child is gone already
            self._state = "failed"
            raise
        self._state = "ready"
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self._settings.name}")

    async def stop(self) -> None:
        """End the child and wait until it is gone. Harmless when there is none."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        self._state = "stopped"
        if self._child is not None:
            child, self._child = self._child, None
            await child.end(self._patience.stop_s)

    async def _supervise(self) -> None:
        """Replace the child whenever it dies, until cancelled."""
        patience = self._patience
        pause_s = patience.first_pause_s
        while True:
            child = self._child
            if child is None:  # only `stop` takes it away, after cancelling this
                return
            started = time.monotonic()
            status = await child.gone()
            self._state = "restarting"
            if time.monotonic() - started >= patience.healthy_after_s:
                pause_s = patience.first_pause_s
            _log.warning("local model %s died (status %s): %s", self._settings.name, status, child.last_words())
            while self._state == "restarting":
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, patience.longest_pause_s)
                try:
                    await self._spawn()
                except (LocalModelFailed, OSError) as why:
                    _log.warning(
                        "local model %s was not restarted, next try in %g s: %s", self._settings.name, pause_s, why
                    )
                else:
                    self._restarts += 1
                    self._state = "ready"
                    _log.warning("local model %s was restarted", self._settings.name)

    async def _spawn(self) -> None:
        """Replace the child by one that answers; on any failure there is none and nothing is left of it."""
        settings = self._settings
        if self._child is not None:
            old, self._child = self._child, None
            await old.end(self._patience.stop_s)
        told = ServerSettings(
            weights=str(settings.weights.absolute()),
            model_id=settings.model_id,
            context_tokens=settings.context_tokens,
            parallel=settings.parallel,
            threads=settings.threads,
            port=self._port,
            parent_pid=os.getpid(),
        )
        child = await _Child.spawn(told)
        try:
            async with asyncio.timeout(self._patience.start_s):
                ready = await child.ready()
        except TimeoutError:
            await child.end(0)
            raise LocalModelFailed(
                f"local model {settings.name} did not answer within {self._patience.start_s:g} s: {child.last_words()}"
            ) from None
        except BaseException:  # cancelled
            await child.end(0)
            raise
        if ready is None:
            await child.end(0)
            raise LocalModelFailed(f"local model {settings.name} did not start: {child.last_words()}")
        self._port = ready.port
        self._child = child


class _Child:
    """One process of `backends.model_server` and the pipes to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._listener = asyncio.create_task(self._listen(), name=f"stderr of {process.pid}")

    @classmethod
    async def spawn(cls, settings: ServerSettings) -> _Child:
        """Start a process. Its standard input stays open for as long as we live: its end tells it to leave."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "backends.model_server",
            msgspec.json.encode(settings).decode(),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=_PACKAGE_ROOT,  # `-m` looks there first, installed or not
            env={**os.environ, **_QUIET_THREADS},
            start_new_session=True,  # a terminal's Ctrl-C is for us alone; we end the child when we have finished
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> Ready | None:
        """Return what the child says when it answers, None if it ended first."""
        if self._process.stdout is None:
            return None
        line = await self._process.stdout.readline()
        if line.endswith(b"\n"):
            return msgspec.json.decode(line, type=Ready)
        await self.gone()
        return None

    async def gone(self) -> int:
        """Wait for the end of the process and of what it had to say; return its status, negative for a signal."""
        status = await self._process.wait()
        await asyncio.wait([self._listener])
        return status

    async def end(self, grace_s: float) -> None:
        """End the process, by force if it is still there after `grace_s`, and reap it, even when we are cancelled."""
        ending = asyncio.ensure_future(self._end(grace_s))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            raise

    async def _end(self, grace_s: float) -> None:
        process = self._process
        # The process may be gone at any moment.
        with contextlib.suppress(ProcessLookupError):
            if grace_s > 0:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await process.wait()
            if process.returncode is None:
                process.kill()
        await self.gone()
        if process.stdin is not None:
            process.stdin.close()

    def last_words(self) -> str:
        """Return the last lines of its standard error, as one; llama.cpp says the same thing several times."""
        said = dict.fromkeys(_LOG_PREFIX.sub("", line) for line in self._lines)
        return "; ".join(list(said)[-_TOLD_LINES:]) or "it said nothing"

    async def _listen(self) -> None:
        """Keep the pipe empty, so that the child never waits for us."""
        stream = self._process.stderr
        if stream is None:
            return
        rest = b""
        while chunk := await stream.read(4096):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._hear(line)
            rest = rest[-4096:]  # a line without end is cut, not kept
        self._hear(rest)

    def _hear(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._lines.append(text)
            _log.debug("model server %d: %s", self._process.pid, text)
