"""Who asks, does the key still hold, and may it ask for this name? Keys are known by their digests only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Literal

import msgspec

Barred = Literal["disabled", "replaced", "expired"]
"""Why a key that is known is refused."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks. `names` are the model names it may ask for, None for all of them.

    `metadata` are pairs of name and value for the bill. The key holds until `expires_s`, and where another one has been
    made in its place until `replaced_s`: seconds since the epoch, None for ever.
    """

    key: str
    names: frozenset[str] | None = None
    admin: bool = False
    team: str | None = None
    user: str | None = None
    priority: int = 0
    tags: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    disabled: bool = False
    expires_s: float | None = None
    replaced_s: float | None = None

    def may_ask(self, *names: str) -> bool:
        """Whether any of `names`, all of which mean the same route, is permitted."""
        return self.names is None or any(name in self.names for name in names)

    def barred(self, now_s: float) -> Barred | None:
        """Return why the key does not hold at `now_s` (since the epoch), None where it does."""
        if self.disabled:
            return "disabled"
        if self.replaced_s is not None and now_s >= self.replaced_s:
            return "replaced"
        if self.expires_s is not None and now_s >= self.expires_s:
            return "expired"
        return None


class Keyring(msgspec.Struct, frozen=True):
    """Every caller, with the SHA-256 of its key, by the first half of that digest."""

    callers: Mapping[bytes, tuple[bytes, Caller]]

    @classmethod
    def of(cls, entries: Iterable[tuple[str, Caller]]) -> Keyring:
        """Build from pairs of hexadecimal digest and caller."""
        digests = ((bytes.fromhex(digest), caller) for digest, caller in entries)
        return cls({digest[:16]: (digest, caller) for digest, caller in digests})

    def find(self, key: bytes) -> Caller | None:
        """Return the caller that `key` belongs to, whether or not it still holds."""
        return self.holder(sha256(key).digest())

    def holder(self, digest: bytes) -> Caller | None:
        """Return the caller whose key has this digest.

        The look-up goes by half a digest, which nobody can steer; the other half is compared in constant time.
        """
        stored, caller = self.callers.get(digest[:16], (bytes(32), None))
        return caller if compare_digest(stored, digest) else None
