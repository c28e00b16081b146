"""Which proofs have been finished, with which figures? One line of JSON each, so that a run can be stopped anywhere.

A result stands for the source it was made with: another digest, and it has to be proved again. A line that was cut
short by a power failure is no result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tests.prove.proof import Figures, Size

# What a proof's outcome can depend on: the gateway, the proofs, the servers they start, and the locked libraries.
SOURCES = ("gateway", "backends", "policies", "routing", "tests/prove", "tests/servers", "locks/test.txt")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One proof that held, for one seed."""

    proof: str
    seed: int
    size: Size
    source: str
    took_s: float
    figures: Figures


def digest(root: Path, sources: Iterable[str] = SOURCES) -> str:
    """Twelve hex digits that change when any file of `sources` is changed, added, renamed or removed."""
    total = hashlib.sha256()
    for source in sources:
        top = root / source
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(str(path.relative_to(root)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


class Journal:
    """The results in one file, oldest first; a later one for the same proof, seed, size and source counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def results(self) -> list[Result]:
        """All results; lines that are none are passed over."""
        found = []
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Result))
            except msgspec.DecodeError:
                continue
        return found

    def append(self, result: Result) -> None:
        """Keep `result`; it is on the disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            os.fsync(file.fileno())
