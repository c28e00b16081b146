"""Does a local model stay up, come back on the same port, and leave nothing behind?"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from backends import local
from backends.local import LocalModelFailed, LocalServer, LocalSettings, Patience
from tests.local_models import small_model_path

ROOT = Path(local.__file__).resolve().parent.parent
PATIENCE = Patience(start_s=60, first_pause_s=0.01)


def settings(weights: Path) -> LocalSettings:
    return LocalSettings(name="small", weights=weights, model_id="tiny", context_tokens=256, parallel=1)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[LocalServer]:
    server = LocalServer(settings(small_model_path()), PATIENCE)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def healthy(base_url: str | None) -> bool:
    assert base_url is not None
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Callable[[], bool], limit_s: float = 5) -> bool:
    until = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_it_starts_answers_and_leaves_nothing() -> None:
    async def play() -> int:
        async with running() as server:
            pid = server.pid
            assert pid is not None
            states = [server.state]
            assert await asyncio.to_thread(healthy, server.base_url)
        assert [*states, server.state] == ["ready", "stopped"]
        assert server.pid is None
        await server.stop()  # again: harmless
        return pid

    assert not alive(asyncio.run(play()))


def test_a_killed_child_comes_back_on_the_same_port(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        async with running() as server:
            url, pid = server.base_url, server.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert await asyncio.to_thread(wait_until, lambda: server.restarts == 1, 30)
            assert server.state == "ready"
            assert server.base_url == url
            assert server.pid not in {None, pid}
            assert await asyncio.to_thread(healthy, url)

    with caplog.at_level(logging.WARNING, "tierway.local"):
        asyncio.run(play())
    assert "local model small died (status -9)" in caplog.text


def test_the_port_is_said_only_once_it_answers() -> None:
    server = LocalServer(settings(Path("model.gguf")))
    assert server.base_url is None
    assert server.state == "stopped"


def test_a_bad_path_is_said_clearly(tmp_path: Path) -> None:
    async def play() -> str:
        server = LocalServer(settings(tmp_path / "none.gguf"))
        with pytest.raises(LocalModelFailed) as failure:
            await server.start()
        assert server.state == "failed"
        assert server.base_url is None
        await server.stop()
        return str(failure.value)

    assert asyncio.run(play()) == f"local model small did not start: there is no file {tmp_path / 'none.gguf'}"


def test_a_file_that_is_no_model_is_said_clearly(tmp_path: Path) -> None:
    small_model_path()  # or there is no server that could refuse it
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF and nothing else")

    async def play() -> None:
        with pytest.raises(LocalModelFailed, match=r"small did not start: .*failed to load model"):
            await LocalServer(settings(bad)).start()

    asyncio.run(play())


def test_a_start_that_takes_too_long_leaves_nothing() -> None:
    model = small_model_path()

    async def play() -> None:
        server = LocalServer(settings(model), Patience(start_s=0.01))
        with pytest.raises(LocalModelFailed, match=r"did not answer within 0\.01 s"):
            await server.start()
        assert server.state == "failed"

    asyncio.run(play())
    assert not children_of(os.getpid())


def test_a_cancelled_start_leaves_nothing() -> None:
    model = small_model_path()

    async def play() -> None:
        starting = asyncio.create_task(LocalServer(settings(model)).start())
        assert await asyncio.to_thread(wait_until, lambda: bool(children_of(os.getpid())))
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(play())
    assert not children_of(os.getpid())


PARENT = """
import asyncio, sys
from pathlib import Path
from backends.local import LocalServer, LocalSettings
async def main():
    server = LocalServer(LocalSettings(name="small", weights=Path(sys.argv[1]), model_id="tiny", context_tokens=256))
    starting = asyncio.create_task(server.start())
    if sys.argv[2] == "loading":
        print("loading", flush=True)
    await starting
    print(server.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["ready", "loading"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_parent_takes_its_child_along(moment: str) -> None:
    command = [sys.executable, "-c", PARENT, str(small_model_path()), moment]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = parent.stdout.readline().strip()
        assert said
        assert wait_until(lambda: bool(children_of(parent.pid)))
        children = children_of(parent.pid)
        parent.kill()
    assert children
    assert wait_until(lambda: not any(alive(child) for child in children))


def children_of(pid: int) -> list[int]:
    """Return the living children of `pid` that serve a model, or are about to."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"backends.model_server" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found
