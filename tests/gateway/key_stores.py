"""How does a test get stores of keys, and keys to put there?"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence

import msgspec

from gateway.key_redis import RedisKeys
from gateway.key_store import Changes, KeyFacts, KeysDown, MemoryKeys, Replaced, StoredKey, digest_of, new_revision
from gateway.redis_line import Place
from gateway.redis_store import RedisStore
from tests.servers.redis import RedisServer

AnyKeys = MemoryKeys | RedisKeys


def stored(name: str, key: str = "", *, replaced: tuple[Replaced, ...] = (), **facts: object) -> StoredKey:
    """A record of a key, which is called as its owner where no other is given."""
    return StoredKey(
        name=name,
        digest=digest_of(key or name),
        revision=new_revision(),
        created_s=1.0,
        changed_s=1.0,
        facts=msgspec.convert(facts, KeyFacts),
        replaced=replaced,
    )


def changed(key: StoredKey, **facts: object) -> StoredKey:
    """The same key with other facts."""
    new = msgspec.convert({**msgspec.structs.asdict(key.facts), **facts}, KeyFacts)
    return msgspec.structs.replace(key, revision=new_revision(), facts=new)


@contextlib.asynccontextmanager
async def redis_keys(server: RedisServer, prefix: str | None = None) -> AsyncIterator[RedisKeys]:
    """A store in a real Redis, empty where no prefix is given."""
    place = Place(addresses=(("127.0.0.1", server.port),), password=server.password, timeout_s=2.0)
    store = RedisStore(place)
    try:
        yield RedisKeys(store, prefix=prefix or f"t{secrets.token_hex(8)}")
    finally:
        await store.close()


class Watched:
    """A source of keys that counts what it is asked, and can be down or slow."""

    def __init__(self, keys: AnyKeys) -> None:
        self.keys = keys
        self.down = False
        self.asked: list[int] = []
        self.polls = 0

    async def find(self, digests: Sequence[bytes]) -> Sequence[StoredKey | None]:
        if self.down:
            raise KeysDown("cut off")
        self.asked.append(len(digests))
        return await self.keys.find(digests)

    async def changes(self, since: str) -> Changes:
        if self.down:
            raise KeysDown("cut off")
        self.polls += 1
        return await self.keys.changes(since)
