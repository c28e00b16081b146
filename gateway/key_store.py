"""Where do keys live that are made while tierway runs? In this process, or in Redis for every worker and replica.

Only digests are kept. A key is replaced as a whole and only where nobody has changed it meanwhile, so of two changes at
the same time exactly one is made. Every change is told in order, under a position: a reader that knows the last one
it saw learns what came after it, or that it has to forget all it knew (too much came, or the store has lost its data).
"""

from __future__ import annotations

import bisect
import secrets
from collections.abc import Sequence
from hashlib import sha256
from typing import Protocol

import msgspec

from policies.access import Caller

MOST_TOLD = 1_000
"""A reader that missed more changes than this forgets everything, which costs it less than to be told."""

LONGEST_PAGE = 100
MOST_REPLACED = 8
"""Most digests of one key that were replaced and still hold."""


class KeysDown(Exception):  # noqa: N818 - it names a state, as `StoreDown` does
    """The store of keys cannot be asked, or nobody knows whether it did what it was told."""


def new_key() -> str:
    """Return a key that nobody can guess: 256 random bits."""
    return "tw-" + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """Return the digest that is kept in place of a key, in hexadecimal."""
    return sha256(key.encode()).hexdigest()


class KeyFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the operator says of a key: the fields of `keys` in the configuration. Times are seconds since the epoch."""

    models: tuple[str, ...] | None = None
    admin: bool = False
    team: str | None = None
    user: str | None = None
    priority: int = 0
    tags: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    expires_s: float | None = None
    disabled: bool = False


class Replaced(msgspec.Struct, frozen=True):
    """A digest that another one has replaced, and until when it still holds."""

    digest: str
    until_s: float


class StoredKey(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One key of the store. `revision` is another one after every change."""

    name: str
    digest: str
    revision: str
    created_s: float
    changed_s: float
    facts: KeyFacts = KeyFacts()
    replaced: tuple[Replaced, ...] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """Every digest that leads to this key."""
        return (self.digest, *(one.digest for one in self.replaced))

    def caller(self, digest: str) -> Caller | None:
        """Return who the holder of the key with this digest is; None where it is no digest of this key."""
        until = {self.digest: None, **{one.digest: one.until_s for one in self.replaced}}
        if digest not in until:
            return None
        facts = self.facts
        return Caller(
            key=self.name,
            names=None if facts.models is None else frozenset(facts.models),
            admin=facts.admin,
            team=facts.team,
            user=facts.user,
            priority=facts.priority,
            tags=facts.tags,
            metadata=facts.metadata,
            disabled=facts.disabled,
            expires_s=facts.expires_s,
            replaced_s=until[digest],
        )


def new_revision() -> str:
    """Return a revision that no key has had."""
    return secrets.token_hex(8)


class Changes(msgspec.Struct, frozen=True):
    """What has changed since a position, up to the position `at`. `names` is None where it may be anything."""

    at: str
    names: tuple[str, ...] | None


class KeySource(Protocol):
    """Where keys are looked up. Both raise `KeysDown`."""

    async def find(self, digests: Sequence[bytes]) -> Sequence[StoredKey | None]:
        """Return the keys of these SHA-256 digests, in their order."""
        ...

    async def changes(self, since: str) -> Changes:
        """Return the names of the keys that changed after the position `since`, which is empty at first."""
        ...


class KeyShelf(Protocol):
    """Where keys are kept. All raise `KeysDown`."""

    async def named(self, name: str) -> StoredKey | None:
        """Return the key of this name."""
        ...

    async def page(self, after: str, limit: int) -> Sequence[StoredKey]:
        """Return up to `limit` keys (at most `LONGEST_PAGE`) whose names come after `after`, by name."""
        ...

    async def replace(self, name: str, before: StoredKey | None, after: StoredKey | None) -> bool:
        """Put `after` in the place of `before`; None: there is none. False where something else stands there."""
        ...


class MemoryKeys:
    """Keys of one process, lost with it."""

    def __init__(self) -> None:
        self._by_name: dict[str, StoredKey] = {}
        self._by_digest: dict[str, str] = {}
        self._names: list[str] = []
        self._told = 0
        self._changed: list[str] = []

    async def find(self, digests: Sequence[bytes]) -> Sequence[StoredKey | None]:
        names = (self._by_digest.get(digest.hex()) for digest in digests)
        return [None if name is None else self._by_name[name] for name in names]

    async def changes(self, since: str) -> Changes:
        at = str(self._told)
        missed = self._told - int(since) if since else MOST_TOLD + 1
        if missed > min(MOST_TOLD, len(self._changed)):
            return Changes(at, None)
        return Changes(at, tuple(self._changed[len(self._changed) - missed :]))

    async def named(self, name: str) -> StoredKey | None:
        return self._by_name.get(name)

    async def page(self, after: str, limit: int) -> Sequence[StoredKey]:
        start = bisect.bisect_right(self._names, after)
        return [self._by_name[name] for name in self._names[start : start + limit]]

    async def replace(self, name: str, before: StoredKey | None, after: StoredKey | None) -> bool:
        standing = self._by_name.get(name)
        if (standing and standing.revision) != (before and before.revision):
            return False
        for digest in standing.digests if standing else ():
            del self._by_digest[digest]
        if standing is None:
            bisect.insort(self._names, name)
        if after is None:
            self._by_name.pop(name, None)
            self._names.remove(name)
        else:
            self._by_name[name] = after
            self._by_digest.update(dict.fromkeys(after.digests, name))
        self._told += 1
        self._changed = [*self._changed[-MOST_TOLD:], name]
        return True
