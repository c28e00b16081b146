"""What would be left of a folder after a power cut? What was synced; of the rest all, nothing, or any part.

`kill -9` cannot show it: what a process wrote the kernel has. `unsynced.c`, put into every process that writes to the
folder by LD_PRELOAD, keeps beside it an image of what was synced. `Disk.cut` puts that in its place, when no process
runs that wrote to it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import msgspec

from tests.servers.process import ServerMissingError

_SOURCE = Path(__file__).with_name("unsynced.c")
_SECTOR_BYTES = 512
"""What a disk writes as a whole or not at all."""


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """What a power cut took: files that are as they were before or gone, and sectors of those."""

    files: int
    sectors: int


def library(folder: Path) -> Path:
    """Build the library in `folder`. Raises ServerMissingError where that cannot be."""
    if not sys.platform.startswith("linux"):
        raise ServerMissingError("unsynced writes can be dropped on Linux only")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ServerMissingError("dropping unsynced writes needs a C compiler (cc), and there is none")
    path = folder / "unsynced.so"
    built = subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", path, _SOURCE, "-ldl"], capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        raise ServerMissingError(f"{_SOURCE.name} cannot be compiled: {built.stderr[-500:]}")
    return path


class Disk:
    """A folder of which a power cut leaves what was synced.

    `beside` is an empty folder for the images. Who writes runs with `environment`. What is there at first, and after
    `settle`, counts as synced.
    """

    def __init__(self, folder: Path, beside: Path, library: Path) -> None:
        self.folder = folder.resolve()
        self._images = beside.resolve() / "images"
        self._shim = ctypes.CDLL(str(library))
        self.environment = {
            "LD_PRELOAD": str(library),
            "UNSYNCED_FOLDER": str(self.folder),
            "UNSYNCED_IMAGES": str(self._images),
        }
        self.settle()

    def settle(self) -> None:
        """From now on all is durable as it is. Nobody may write meanwhile."""
        shutil.rmtree(self._images, ignore_errors=True)
        for part in ("tree", "content"):
            (self._images / part).mkdir(parents=True)
        self._shim.unsynced_settle(os.fsencode(self.folder), os.fsencode(self._images))
        owner = self.folder.stat()
        for path in (self._images, *self._images.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)

    def cut(self, random: Random | None = None) -> Lost:
        """Leave what was synced, and of the rest nothing, or with `random` any sectors, as a disk that reorders does.

        No process that wrote to the folder may still run.
        """
        tree, content = self._images / "tree", self._images / "content"
        names = {path.stat().st_ino: path.name for path in content.iterdir()}
        owner = self.folder.stat()
        kept = 0.0 if random is None else random.choice((0.0, 0.3, 0.7, 0.95))
        files = sectors = 0
        for live in sorted(self.folder.rglob("*"), reverse=True):
            image = tree / live.relative_to(self.folder)
            if live.is_dir() and not live.is_symlink() and not image.exists():
                live.rmdir()
            elif live.is_file() and not image.is_file():
                live.unlink()
                files += 1
        for image in sorted(tree.rglob("*")):
            live = self.folder / image.relative_to(tree)
            if image.is_dir():
                if not live.exists():
                    live.mkdir(mode=0o700)
                    os.chown(live, owner.st_uid, owner.st_gid)
                continue
            synced = image.read_bytes()
            written = live.read_bytes() if live.is_file() else b""
            if synced == written and live.exists():
                continue
            # Sectors of two different files of the same name never mix.
            same = self._identity(live) == names[image.stat().st_ino]
            left, lost = _mixed(synced, written, random, kept) if same and random is not None and kept else (synced, 0)
            sectors += lost or _differ(synced, written)
            files += 1
            made = not live.exists()
            live.write_bytes(left)
            if made:
                live.chmod(0o600)
                os.chown(live, owner.st_uid, owner.st_gid)
        self.settle()
        return Lost(files=files, sectors=sectors)

    def _identity(self, path: Path) -> str:
        found = ctypes.create_string_buffer(64)
        self._shim.unsynced_identify(os.fsencode(path), found)
        return found.value.decode()


def _mixed(synced: bytes, written: bytes, random: Random, kept: float) -> tuple[bytes, int]:
    """Return any mixture of two states of a file, and how many sectors of the written one are not in it."""
    length = random.choice((len(synced), len(written)))
    parts: list[bytes] = []
    lost = 0
    for at in range(0, length, _SECTOR_BYTES):
        size = min(_SECTOR_BYTES, length - at)
        old, new = synced[at : at + size], written[at : at + size]
        if old == new or (new and random.random() < kept):
            chosen = new
        else:
            chosen, lost = old, lost + 1
        parts.append(chosen.ljust(size, b"\0"))
    return b"".join(parts), lost


def _differ(synced: bytes, written: bytes) -> int:
    longer = max(len(synced), len(written))
    return sum(
        synced[at : at + _SECTOR_BYTES] != written[at : at + _SECTOR_BYTES] for at in range(0, longer, _SECTOR_BYTES)
    )
