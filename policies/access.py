"""May this caller ask for this name? Keys are known by their digests only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from hmac import compare_digest

import msgspec


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks. `names` are the model names it may ask for, None for all of them."""

    key: str
    names: frozenset[str] | None = None
    admin: bool = False

    def may_ask(self, *names: str) -> bool:
        """Whether any of `names`, all of which mean the same route, is permitted."""
        return self.names is None or any(name in self.names for name in names)


class Keyring(msgspec.Struct, frozen=True):
    """Every caller, with the SHA-256 of its key, by the first half of that digest."""

    callers: Mapping[bytes, tuple[bytes, Caller]]

    @classmethod
    def of(cls, entries: Iterable[tuple[str, Caller]]) -> Keyring:
        """Build from pairs of hexadecimal digest and caller."""
        digests = ((bytes.fromhex(digest), caller) for digest, caller in entries)
        return cls({digest[:16]: (digest, caller) for digest, caller in digests})

    def find(self, key: bytes) -> Caller | None:
        """Return the caller that `key` belongs to.

        The look-up goes by half a digest, which nobody can steer; the other half is compared in constant time.
        """
        digest = sha256(key).digest()
        stored, caller = self.callers.get(digest[:16], (bytes(32), None))
        return caller if compare_digest(stored, digest) else None
