"""Which processes that wrote to the ledger are dead? By what they hold, on one machine; else by what is heard of them.

Clocks of several machines are not compared: a process lives as long as what is heard of it changes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Protocol

from gateway.ledger.contract import LedgerDown

_TRIES = 100
_BLIND = 0.75
"""Of a lease. Who looks in time looks twice as often."""
_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Alive(Protocol):
    """Who lives. All of it blocks for no longer than a file system does."""

    def open(self) -> None:
        """Show that this process lives, before it writes anything."""
        ...

    def dead(self, heard: Mapping[str, int | None]) -> frozenset[str]:
        """Return those that are dead, of processes with what was last heard of them."""
        ...

    def close(self) -> None:
        """Show no more that this process lives."""
        ...


class Heartbeats:
    """By heartbeats alone: a process of which nothing new was heard for `lease_s` is dead."""

    def __init__(self, lease_s: float, *, now: Callable[[], float] = monotonic) -> None:
        self._lease_s = lease_s
        self._now = now
        self._since: dict[str, tuple[int | None, float]] = {}
        self._looked_s = now()

    def open(self) -> None:
        pass

    def dead(self, heard: Mapping[str, int | None]) -> frozenset[str]:
        now_s, before = self._now(), self._since
        if now_s - self._looked_s > _BLIND * self._lease_s:
            # Who could not look for so long cannot know who was silent meanwhile: everyone has a lease again.
            before = {}
        self._looked_s = now_s
        self._since = {
            name: before[name] if name in before and before[name][0] == at else (at, now_s)
            for name, at in heard.items()
        }
        return frozenset(name for name, (_, since_s) in self._since.items() if now_s - since_s >= self._lease_s)

    def close(self) -> None:
        pass


class HeldFiles:
    """By a lock on a file beside the ledger's, which the system takes from a process when it dies."""

    def __init__(self, ledger: Path, instance: str) -> None:
        if not _SANE.fullmatch(instance):
            raise ValueError(f"{instance!r} cannot be part of a file's name")
        self._ledger = ledger
        self._instance = instance
        self._file: int | None = None

    def open(self) -> None:
        try:
            for path in self._ledger.parent.glob(f"{self._ledger.name}-alive-*"):
                _held(path)  # who died with nothing open has left nothing but this
            if not any(self._take() for _ in range(_TRIES)):
                raise BlockingIOError(errno.EWOULDBLOCK, "a living process has the same name")
        except OSError as error:
            raise LedgerDown(f"The file {self._path(self._instance)} cannot be made and locked: {error}.") from error

    def dead(self, heard: Mapping[str, int | None]) -> frozenset[str]:
        return frozenset(name for name in heard if name != self._instance and not _held(self._path(name)))

    def close(self) -> None:
        if self._file is not None:
            self._path(self._instance).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _path(self, instance: str) -> Path:
        return self._ledger.with_name(f"{self._ledger.name}-alive-{instance}")

    def _take(self) -> bool:
        """Make and lock the file; return whether it is still there then: another may have taken it for a dead one's."""
        path = self._path(self._instance)
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = path.stat().st_ino == os.fstat(file).st_ino
        except (BlockingIOError, FileNotFoundError):
            there = False
        if there:
            self._file = file
        else:
            os.close(file)
        return there


def _held(path: Path) -> bool:
    """Whether its process lives. The file of one that does not is removed."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(file)
