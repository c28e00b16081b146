"""How does a measurement start its processes, pin them to cores, and read their CPU time? As Linux accounts for it."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
# Pins itself, then becomes the program: every thread of it is pinned, also those that start before we could look.
PINNED = """\
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class DidNotStartError(Exception):
    """A process ended, or said nothing, before it was ready."""


class Process:
    """A Python program on chosen cores, with its standard error in a file. Use it as a context manager."""

    def __init__(
        self, name: str, argv: Sequence[str], cores: Sequence[int], folder: Path, *, talks: bool = False
    ) -> None:
        self.name = name
        self.errors = folder / f"{name}.stderr"
        with self.errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PINNED, ",".join(map(str, cores)), *argv],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else errors,
                stderr=errors,
                cwd=ROOT,
                text=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def line(self, timeout_s: float) -> Any:
        """Read its next line of standard output, a JSON value. Raise `DidNotStartError` when there is none in time."""
        out = self._process.stdout
        if out is None or not select.select([out], [], [], timeout_s)[0]:
            raise DidNotStartError(f"{self.name} said nothing for {timeout_s} s\n{self.last_words()}")
        text = out.readline()
        if not text:
            raise DidNotStartError(f"{self.name} ended\n{self.last_words()}")
        return json.loads(text)

    def say(self, text: str) -> None:
        """Write a line to its standard input."""
        if self._process.stdin is not None:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 20) -> None:
        """Ask it to end; make it end when it does not."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def last_words(self) -> str:
        """Return the end of its standard error."""
        return self.errors.read_text(errors="replace")[-2000:]


def free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(
    port: int, method: str, path: str, body: Any = None, key: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one request on a connection of its own; return status, headers in lower case, and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def wait_until_ready(process: Process, port: int, path: str, timeout_s: float) -> None:
    """Wait for a 200 on a path. Raise `DidNotStartError` when there is none in time."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if process.ended():
            break
        try:
            if ask(port, "GET", path)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise DidNotStartError(f"{process.name} does not answer {path}\n{process.last_words()}")


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # the thread ended meanwhile
                continue
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU seconds, user and system, of a process and its living descendants, of all their threads."""
    return sum(map(_own_cpu_s, family(pid)))


def _own_cpu_s(pid: int) -> float:
    try:
        # The process's own CPU clock (clock_getcpuclockid of glibc): the sum that /proc/PID/stat shows in ticks of
        # 10 ms, in nanoseconds.
        return time.clock_gettime(((~pid) << 3) | 2)
    except OSError:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
