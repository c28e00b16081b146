"""How is a server process started for a test, and how is it sure to be gone afterwards?

It is stopped by its process id, never by name. It is also told to stop by the kernel when the process that started it
dies, so that a test run that is killed leaves no server behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_START_LIMIT_S = 30.0
_STOP_LIMIT_S = 10.0
_PR_SET_PDEATHSIG = 1
# Looked up before any fork: the child between fork and exec must do as little as possible.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)


class ServerMissingError(Exception):
    """No such server is to be had on this machine; the message says what was tried."""


class ServerDiedError(Exception):
    """The server ended before it was ready; the message has the end of its log."""


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    directory: Path,
    *,
    ready: Callable[[], bool],
    stop_signal: signal.Signals,
    user: int | None = None,
    environment: Mapping[str, str] | None = None,
    start_limit_s: float = _START_LIMIT_S,
) -> Iterator[int]:
    """Run `command` in `directory` as `user` (None: as we are); its process id, once `ready()` is true.

    Its output goes to `directory / "log"`; its environment is `quiet_environment()` unless given.
    Raises ServerDiedError when it ends before, TimeoutError when it is not ready in time.
    """

    def die_with_parent() -> None:
        if _PRCTL is not None:
            _PRCTL(_PR_SET_PDEATHSIG, stop_signal)

    log_path = directory / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=quiet_environment() if environment is None else environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one call that takes no lock
            user=user,
            group=user,
            extra_groups=None if user is None else (),
        )
    try:
        _wait_until_ready(process, ready, log_path, start_limit_s)
        yield process.pid
    finally:
        process.send_signal(stop_signal)
        try:
            process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def quiet_environment() -> dict[str, str]:
    """An environment in which servers speak English and find nothing of the user's."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _wait_until_ready(
    process: subprocess.Popen[bytes], ready: Callable[[], bool], log_path: Path, limit_s: float
) -> None:
    give_up_at = time.monotonic() + limit_s
    while not ready():
        if process.poll() is not None:
            end_of_log = log_path.read_text(errors="replace")[-2000:]
            raise ServerDiedError(f"{process.args!r} ended with {process.returncode}:\n{end_of_log}")
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"{process.args!r} was not ready within {limit_s:g} s")
        time.sleep(0.01)
