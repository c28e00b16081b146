"""How does the gateway run? Local models first, then the HTTP server, in one process or in several.

The process that is started owns the local models, alone. With several workers it also owns their listening sockets, and
starts a worker again when it dies. Each worker has a socket of its own on the same port, so that the kernel spreads
connections evenly, and one that nobody has accepted yet outlives the death of a worker: it waits for the next one. The
workers end with their parent, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec
import uvicorn

from backends.local import LocalModelFailed, LocalServer, LocalSettings
from backends.weights import WeightsUnavailable, local_model_ids, resolve
from gateway.app import Place, build, model_of
from gateway.config.load import Loaded, load
from gateway.config.meaning import DEMO_DIGEST
from gateway.config.model import Config, LocalBackend, NoLedger, PostgresLedger
from gateway.config.problem import ConfigError
from gateway.config.secrets import resolve_all
from gateway.edge import App
from gateway.ledger.contract import LedgerDown
from gateway.ledger.opening import open_store
from gateway.ledger.sqlite import SqliteStore
from gateway.log import set_up_logging
from gateway.protocol import HttpProtocol

_log = logging.getLogger("tierway.serve")
_RESTART_PAUSE_S = 0.25
_BACKLOG = 2048
_DEMO_KEY = "tw-demo-local-only-key"

Say = Callable[[str], None]


class WorkerSettings(msgspec.Struct, frozen=True):
    """What a worker process is told on its command line."""

    config: str
    fd: int
    worker: int
    workers: int
    folder: str
    local_urls: dict[str, str]
    admin_fd: int | None = None


def serve(loaded: Loaded, *, workers: int, host: str, port: int, say: Say) -> None:
    """Serve until told to stop. Raises `ConfigError` for secrets that cannot be had and `OSError` for a taken port."""
    config = loaded.config
    set_up_logging(format=config.telemetry.log.format, level=config.telemetry.log.level)
    resolve_all(loaded)
    _look_at_ledger(loaded)
    # The port is taken before anything slow, so that a second gateway says so at once.
    listening = [_listen(host, port)] if workers == 1 else _share(host, port, workers)
    admin = config.server.admin
    admin_listening = None if admin is None else _listen(admin.host, admin.port)
    settings = _local_settings(loaded, say)
    runner = asyncio.Runner(loop_factory=_loop_factory())
    with runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(_serve(loaded, settings, listening, admin_listening, say))


def _look_at_ledger(loaded: Loaded) -> None:
    """Make the ledger's file, or see that it is one. Raises `ConfigError`: nobody should find out by missing bills."""
    kept_in = loaded.config.ledger.store
    if isinstance(kept_in, NoLedger):
        return
    if isinstance(kept_in, PostgresLedger):
        folder = loaded.beside(str(Path(kept_in.spool).expanduser())).parent
        if not os.access(folder, os.W_OK | os.X_OK):
            message = f"the folder {folder} is not there, or cannot be written to"
            raise ConfigError((loaded.problem(("ledger", "store", "spool"), message),))
    try:
        store = open_store(loaded)
        if isinstance(store, SqliteStore):
            store.open()
            store.close()
    except LedgerDown as down:
        raise ConfigError((loaded.problem(("ledger", "store"), str(down)),)) from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop  # noqa: PLC0415 - only a serving process needs it

    return uvloop.new_event_loop


def _listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"port {port} of {host} cannot be taken: {error.strerror}") from None
    bound.listen(_BACKLOG)
    bound.setblocking(False)  # noqa: FBT003 - the library's own signature
    return bound


def _share(host: str, port: int, workers: int) -> list[socket.socket]:
    """Take a port for several sockets, once it is sure that nobody else has it, not even to share."""
    with _listen(host, port) as alone:
        port = alone.getsockname()[1]
    return [_listen(host, port, shared=True) for _ in range(workers)]


def _local_settings(loaded: Loaded, say: Say) -> list[LocalSettings]:
    """Find the weights of every local model. One that cannot be had costs its tier, not the gateway."""
    settings: list[LocalSettings] = []
    for name, backend in loaded.config.backends.items():
        if not isinstance(backend, LocalBackend):
            continue
        named = backend.weights in local_model_ids()
        try:
            weights = resolve(backend.weights if named else str(loaded.beside(str(Path(backend.weights).expanduser()))))
        except WeightsUnavailable as why:
            say(f"{name}: {why}. The gateway starts without it.")
            continue
        settings.append(
            LocalSettings(
                name=name,
                weights=weights.path,
                model_id=model_of(backend),
                context_tokens=backend.context_tokens,
                parallel=backend.parallel,
                threads=backend.threads,
            )
        )
    return settings


async def _serve(
    loaded: Loaded,
    settings: list[LocalSettings],
    listening: list[socket.socket],
    admin_listening: socket.socket | None,
    say: Say,
) -> None:
    servers: dict[str, LocalServer] = {}
    # Until the HTTP server takes the signals over, they end the start.
    starting = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if starting is not None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, starting.cancel)
    try:
        await _start_local(settings, servers, say)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        urls = {name: server.base_url for name, server in servers.items() if server.base_url is not None}
        _say_how_to_ask(loaded.config, _url(listening[0]), urls, say)
        if admin_listening is not None:
            say(f"The admin API is on {_url(admin_listening)}.")
        if len(listening) == 1:
            await _serve_here(loaded, listening[0], admin_listening, urls, Place())
        else:
            await _serve_in_workers(loaded, listening, admin_listening, urls)
    except asyncio.CancelledError:
        say("Stopped before it was ready.")
    finally:
        for one in (*listening, admin_listening):
            if one is not None:
                one.close()
        await asyncio.gather(*(server.stop() for server in servers.values()))


async def _start_local(settings: list[LocalSettings], servers: dict[str, LocalServer], say: Say) -> None:
    async def start(one: LocalSettings) -> None:
        say(f"Loading {one.model_id} …")
        server = servers[one.name] = LocalServer(one)
        try:
            await server.start()
        except LocalModelFailed as why:
            say(f"{why} The gateway starts without it.")

    await asyncio.gather(*(start(one) for one in settings))


def _url(listening: socket.socket) -> str:
    address = listening.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{shown}:{address[1]}"


def _say_how_to_ask(config: Config, url: str, local_urls: Mapping[str, str], say: Say) -> None:
    missing = [
        tier.name
        for tier in config.tiers
        if all(isinstance(config.backends[name], LocalBackend) and name not in local_urls for name in tier.backends)
    ]
    if missing:
        say(f"Without the tiers {', '.join(missing)}: their models are not there.")
    model = next(iter(config.routes), config.tiers[0].name)
    key = _DEMO_KEY if any(one.sha256 == DEMO_DIGEST for one in config.keys) else "$TIERWAY_KEY"
    say(f"tierway serves {', '.join(tier.name for tier in config.tiers if tier.name not in missing)} on {url}. Try:")
    say("")
    say(f"  curl -i {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\")
    question = '{"role": "user", "content": "What is the capital of Japan?"}'
    say(f"""    -d '{{"model": "{model}", "temperature": 0, "max_tokens": 64, "messages": [{question}]}}'""")
    say("")


class _Server(uvicorn.Server):
    """uvicorn would end by dying of the signal that stopped it: before the local models are stopped, which is ours."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


class _Beside(_Server):
    """A server beside another one, which has the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _settings(app: App, loaded: Loaded, lifespan: Literal["on", "off"]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        proxy_headers=False,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(loaded.config.server.shutdown_grace)),
    )


async def _serve_here(
    loaded: Loaded,
    listening: socket.socket,
    admin_listening: socket.socket | None,
    local_urls: Mapping[str, str],
    place: Place,
) -> None:
    apps = build(loaded, local_urls=local_urls, place=place)
    server = _Server(_settings(apps.main, loaded, "on"))
    # What was made until now lives as long as the process: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    # A request makes some hundred objects and hardly a cycle: looking every 700 finds nothing and costs a twentieth.
    gc.set_threshold(20_000, 20, 20)
    beside: _Server | None = None
    serving: asyncio.Task[None] | None = None
    if apps.admin is not None and admin_listening is not None:
        beside = _Beside(_settings(apps.admin, loaded, "off"))
        serving = asyncio.create_task(beside.serve(sockets=[admin_listening]))
    with contextlib.suppress(KeyboardInterrupt):
        await server.serve(sockets=[listening])
    if beside is not None and serving is not None:
        beside.should_exit = True
        await serving


# -- several workers --------------------------------------------------------------------------------------------------


async def _serve_in_workers(
    loaded: Loaded,
    listening: list[socket.socket],
    admin_listening: socket.socket | None,
    local_urls: Mapping[str, str],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with tempfile.TemporaryDirectory(prefix="tierway-") as folder:
        tasks = [
            asyncio.create_task(
                _keep_worker(
                    WorkerSettings(
                        str(loaded.path.absolute()),
                        one.fileno(),
                        number,
                        len(listening),
                        folder,
                        dict(local_urls),
                        # One of them is enough for the operator.
                        admin_listening.fileno() if admin_listening is not None and number == 0 else None,
                    ),
                    stop,
                    loaded.config.server.shutdown_grace,
                )
            )
            for number, one in enumerate(listening)
        ]
        await stop.wait()
        await asyncio.wait(tasks)


async def _keep_worker(settings: WorkerSettings, stop: asyncio.Event, grace_s: float) -> None:
    """Run one worker, and another in its place when it dies, until told to stop."""
    stopping = asyncio.create_task(stop.wait())
    while not stop.is_set():
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway.serve",
            msgspec.json.encode(settings).decode(),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[fd for fd in (settings.fd, settings.admin_fd) if fd is not None],
            start_new_session=True,
        )
        dying = asyncio.create_task(child.wait())
        await asyncio.wait([stopping, dying], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            if child.returncode is None:
                child.terminate()
            done, _ = await asyncio.wait([dying], timeout=grace_s + 5.0)
            if not done:
                child.kill()
                await dying
            return
        _log.error("worker %d died with status %s; starting it again", settings.worker, child.returncode)
        await asyncio.wait([stopping], timeout=_RESTART_PAUSE_S)


def _be_worker(settings: WorkerSettings) -> None:
    loaded = load(Path(settings.config), local_model_ids=local_model_ids())
    log = loaded.config.telemetry.log
    set_up_logging(format=log.format, level=log.level)
    listening = socket.socket(fileno=settings.fd)
    place = Place(worker=settings.worker, workers=settings.workers, folder=Path(settings.folder))

    async def run() -> None:
        # The parent holds the other end of standard input: when it is gone, so are we.
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _end_with_parent)
        admin_listening = None if settings.admin_fd is None else socket.socket(fileno=settings.admin_fd)
        await _serve_here(loaded, listening, admin_listening, settings.local_urls, place)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(run())


def _end_with_parent() -> None:
    if not os.read(sys.stdin.fileno(), 1):
        os._exit(1)


if __name__ == "__main__":
    _be_worker(msgspec.json.decode(sys.argv[1], type=WorkerSettings))
