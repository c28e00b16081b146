"""How does the admin API stand for a test? In a thread with a loop of its own, asked over HTTP, keys in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import uvicorn

from gateway.admin import admin_app
from gateway.config import model as noun
from gateway.config.secrets import Secret
from gateway.errors import Refusal
from gateway.key_admin import KeyAdmin
from gateway.key_store import MemoryKeys
from gateway.keys import LiveKeys, caller_of
from policies.access import Keyring
from tests.gateway.key_stores import AnyKeys, redis_keys
from tests.running import Reply, ask
from tests.servers.redis import RedisServer

ADMIN_KEY = "the-admin-key"
CONFIGURED = (
    noun.Key(name="conf-a", sha256="a" * 64, team="red", tags=("old",), metadata={"a": "1"}),
    noun.Key(name="conf-z", sha256="b" * 64, disabled=True, expires="2020-01-01T00:00:00Z"),
)


class AdminServer:
    """A running admin API. `store` is of its own loop; `live` are keys over it, as a gateway has them."""

    def __init__(self, port: int, store: AnyKeys, loop: asyncio.AbstractEventLoop) -> None:
        self.port = port
        self.store = store
        self.live = LiveKeys(Keyring.of((one.sha256, caller_of(one)) for one in CONFIGURED), store)
        self._loop = loop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, key: str | None = ADMIN_KEY, **headers: str) -> Reply:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            given["authorization"] = f"Bearer {key}"
        return ask(self.port, method, path, body, given)

    def create(self, name: str, **fields: Any) -> str:
        """Make a key; return it."""
        reply = self.ask("POST", "/admin/keys", {"name": name, **fields})
        assert reply.status == 201, reply
        key: str = reply.json()["key"]
        return key

    def caller(self, key: str) -> str:
        """Poll once and say whose key it is, or why it is refused."""

        async def find() -> str:
            await self.live.poll()
            try:
                return (await self.live.find(key.encode())).key
            except Refusal as refusal:
                return refusal.message

        return asyncio.run_coroutine_threadsafe(find(), self._loop).result(10)


@contextlib.contextmanager
def running_admin(
    redis: RedisServer | None, *, prefix: str | None = None, options: Mapping[str, Any] | None = None
) -> Iterator[AdminServer]:
    """Serve the admin API; without a Redis its keys are in memory."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        started = threading.Event()
        made: list[AdminServer] = []
        servers: list[uvicorn.Server] = []

        async def serve(store: AnyKeys) -> None:
            keys = KeyAdmin(
                store,
                configured=CONFIGURED,
                models=("auto", "small", "large"),
                teams=("red", "blue"),
                **(options or {}),
            )
            app = admin_app(keys, secret=Secret(ADMIN_KEY), config="c0ffee")
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
            servers.append(server)
            made.append(AdminServer(listening.getsockname()[1], store, asyncio.get_running_loop()))
            started.set()
            await server._serve([listening])

        async def whole() -> None:
            if redis is None:
                await serve(MemoryKeys())
                return
            async with redis_keys(redis, prefix) as store:
                await serve(store)

        thread = threading.Thread(target=asyncio.run, args=(whole(),))
        thread.start()
        try:
            assert started.wait(10)
            yield made[0]
        finally:
            servers[0].should_exit = True
            thread.join()


def as_key(reply: Reply) -> dict[str, Any]:
    """The key of an answer that went well."""
    assert reply.status in (200, 201), reply
    key: dict[str, Any] = msgspec.json.decode(reply.body)
    return key
