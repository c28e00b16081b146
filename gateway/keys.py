"""Whose key is this? Keys of the configuration at once; keys of the store from a cache that learns of every change.

* A key that is configured or cached costs no wait and no task.
* All keys that have to be looked up wait for one question to the store, which asks for many: a flood of keys that
  nobody has is one question at a time, and what is remembered of it is bounded.
* Changes are asked for every half second, so one is known everywhere within a second. While the store cannot be asked,
  what is cached is believed for a time, and what is not cached is not called unknown: nobody knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from hmac import compare_digest
from itertools import islice
from time import monotonic, time
from typing import Any, Literal, TypeVar

import msgspec

from gateway.config import model as noun
from gateway.errors import Refusal
from gateway.key_store import Changes, KeysDown, KeySource, StoredKey
from policies.access import Caller, Keyring

_log = logging.getLogger("tierway.keys")
_POLL_S = 0.5
_UNKNOWN_FOR_S = 5.0
_MOST_UNKNOWN = 10_000
_MOST_WAITING = 10_000
_MOST_ASKED = 100  # what 100 of them take to read holds nobody else up
_TRIES = 3

_MOST_HELD = 10_000

_Held = TypeVar("_Held", bound=Hashable)
_Answer = Caller | Literal["unknown", "nobody knows"]

_WHY = {
    "disabled": "The API key is disabled.",
    "replaced": "The API key was replaced by a newer one, and its time has run out.",
    "expired": "The API key has expired.",
}


def caller_of(key: noun.Key) -> Caller:
    """Return who a key of the configuration belongs to."""
    return Caller(
        key=key.name,
        names=None if key.models is None else frozenset(key.models),
        admin=key.admin,
        team=key.team,
        user=key.user,
        priority=key.priority,
        tags=key.tags,
        metadata=tuple(sorted(key.metadata.items())),
        disabled=key.disabled,
        expires_s=None if key.expires is None else moment_s(key.expires),
    )


def moment_s(text: str) -> float:
    """Return a `Moment` in seconds since the epoch. Raises ValueError where the calendar has no such time."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).timestamp()
    except OverflowError:
        raise ValueError("in no year from 1 to 9999") from None


def moment(time_s: float) -> str:
    """Return seconds since the epoch as a `Moment`."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class LiveKeys:
    """Every key that is known now. Without a `source`: those of the configuration alone.

    `valid_for_s` is how long cached keys are believed after the store last answered, `most_cached` how many there are.
    `time_s` is the time since the epoch, `clock_s` one that never jumps.
    """

    def __init__(
        self,
        configured: Keyring,
        source: KeySource | None = None,
        *,
        valid_for_s: float = 30.0,
        most_cached: int = 100_000,
        time_s: Callable[[], float] = time,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._configured = configured
        self._configured_names = frozenset(caller.key for _, caller in configured.callers.values())
        self._source = source
        self._valid_for_s = valid_for_s
        self._most_cached = most_cached
        self._time_s = time_s
        self._clock_s = clock_s
        self._cached: OrderedDict[bytes, tuple[bytes, Caller]] = OrderedDict()
        self._halves: dict[str, tuple[bytes, ...]] = {}
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._held: dict[Any, Any] = {}
        self._waiting: dict[bytes, asyncio.Future[_Answer]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._at = ""
        self._changes_seen = 0
        self._believed_until_s = float("-inf")
        self._down = False

    def known(self, key: bytes) -> Caller | None:
        """Return whose key it is if that is known here; None: `find` has to look. Raises `Refusal` (401)."""
        return self._here(sha256(key).digest())

    async def find(self, key: bytes) -> Caller:
        """Return whose key it is. Raises `Refusal`: 401, or 503 where the store cannot tell."""
        digest = sha256(key).digest()
        caller = self._here(digest)
        if caller is not None:
            return caller
        match await self._look_up(digest):
            case Caller() as caller:
                return self._holding(caller)
            case "unknown":
                raise Refusal("invalid_api_key", "The API key is not known here.")
            case "nobody knows":
                raise Refusal("keys_unavailable", "The API key cannot be checked at the moment.", retry_after_s=1)

    @property
    def down(self) -> bool:
        """Whether the store could not be asked the last time."""
        return self._down

    @property
    def counts(self) -> tuple[int, int]:
        """How many keys are cached, and how many are remembered as unknown."""
        return len(self._cached), len(self._unknown)

    # -- what is known here -------------------------------------------------------------------------------------------

    def _here(self, digest: bytes) -> Caller | None:
        caller = self._configured.holder(digest)
        if caller is None:
            stored, caller = self._cached.get(digest[:16], (b"", None))
            if caller is None or not compare_digest(stored, digest) or self._clock_s() >= self._believed_until_s:
                return None
            self._cached.move_to_end(digest[:16])
        return self._holding(caller)

    def _holding(self, caller: Caller) -> Caller:
        why = caller.barred(self._time_s())
        if why is not None:
            raise Refusal("invalid_api_key", _WHY[why])
        return caller

    def _keep(self, digest: bytes, caller: Caller) -> None:
        half = digest[:16]
        self._cached[half] = (digest, caller)
        self._cached.move_to_end(half)
        others = self._halves.get(caller.key, ())
        if half not in others:
            self._halves[caller.key] = (*others, half)
        if len(self._cached) > self._most_cached:
            oldest, (_, dropped) = self._cached.popitem(last=False)
            left = tuple(one for one in self._halves[dropped.key] if one != oldest)
            if left:
                self._halves[dropped.key] = left
            else:
                del self._halves[dropped.key]

    def _keep_unknown(self, digest: bytes) -> None:
        self._unknown[digest] = self._clock_s() + _UNKNOWN_FOR_S
        self._unknown.move_to_end(digest)
        if len(self._unknown) > _MOST_UNKNOWN:
            self._unknown.popitem(last=False)

    # -- what the store knows -----------------------------------------------------------------------------------------

    async def _look_up(self, digest: bytes) -> _Answer:
        if self._source is None or self._unknown.get(digest, 0.0) > self._clock_s():
            return "unknown"
        answer = self._waiting.get(digest)
        if answer is None:
            if len(self._waiting) >= _MOST_WAITING:
                return "nobody knows"
            answer = self._waiting[digest] = asyncio.get_running_loop().create_future()
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(self._source))
        # Who leaves does not take the answer away from others who wait for it.
        return await asyncio.shield(answer)

    async def _ask(self, source: KeySource) -> None:
        """Ask for all that wait, until nobody does."""
        try:
            while self._waiting:
                asked = tuple(islice(self._waiting, _MOST_ASKED))
                for digest, answer in zip(asked, await self._answers(source, asked), strict=True):
                    self._waiting.pop(digest).set_result(answer)
        except KeysDown as fault:
            self._tell_down(fault)
        finally:
            # Whoever came while the store did not answer has waited long enough with the others.
            for waiting in self._waiting.values():
                waiting.set_result("nobody knows")
            self._waiting.clear()
            self._asking = None

    async def _answers(self, source: KeySource, digests: Sequence[bytes]) -> list[_Answer]:
        """Return what the store says of `digests`, and keep it. Raises KeysDown."""
        for _ in range(_TRIES):
            if self._clock_s() >= self._believed_until_s:
                await self.poll()
            seen = self._changes_seen
            answers = [
                self._answer(digest, stored) for digest, stored in zip(digests, await source.find(digests), strict=True)
            ]
            # A change that was told meanwhile may be newer than the answer.
            if seen == self._changes_seen:
                for digest, answer in zip(digests, answers, strict=True):
                    if isinstance(answer, Caller):
                        self._keep(digest, answer)
                    else:
                        self._keep_unknown(digest)
                break
        return answers

    def _answer(self, digest: bytes, stored: StoredKey | None) -> _Answer:
        # What the configuration names is the operator's last word on that name.
        if stored is None or stored.name in self._configured_names:
            return "unknown"
        caller = stored.caller(digest.hex())
        if caller is None:
            return "unknown"
        # What keys may ask for and carry is much the same: held once, a cached key takes a third of the memory.
        return msgspec.structs.replace(
            caller,
            names=self._once(caller.names),
            team=self._once(caller.team),
            tags=self._once(caller.tags),
            metadata=self._once(caller.metadata),
        )

    def _once(self, value: _Held) -> _Held:
        if len(self._held) > _MOST_HELD:
            self._held.clear()
        held: _Held = self._held.setdefault(value, value)
        return held

    # -- what has changed ---------------------------------------------------------------------------------------------

    async def keep_polling(self) -> None:
        """Ask for changes until cancelled."""
        if self._source is None:
            return
        while True:
            try:
                await self.poll()
            except KeysDown as fault:
                self._tell_down(fault)
            await asyncio.sleep(_POLL_S)

    async def poll(self) -> None:
        """Ask for changes once, and look up again what they have made wrong. Raises KeysDown."""
        if self._source is None:
            return
        asked_s = self._clock_s()
        changes = await self._source.changes(self._at)
        stale = self._forget(changes)
        self._at = changes.at
        self._believed_until_s = max(self._believed_until_s, asked_s + self._valid_for_s)
        if self._down:
            self._down = False
            _log.info("the store of keys answers again")
        # At once, for the store may be gone when they are asked for.
        for start in range(0, len(stale), _MOST_ASKED):
            await self._answers(self._source, stale[start : start + _MOST_ASKED])

    def _forget(self, changes: Changes) -> list[bytes]:
        """Forget what has changed, or everything where nobody knows what; return the digests that are worth a look."""
        halves = [half for name in changes.names or () for half in self._halves.pop(name, ())]
        stale = [cached[0] for half in halves if (cached := self._cached.pop(half, None)) is not None]
        if changes.names is None:
            self._cached.clear()
            self._halves.clear()
        if changes.names != ():
            self._changes_seen += 1
            self._unknown.clear()
        return stale

    def _tell_down(self, fault: KeysDown) -> None:
        if not self._down:
            self._down = True
            _log.warning(
                "the store of keys cannot be asked (%s); its keys that are known here are believed for %g s",
                fault,
                self._valid_for_s,
            )
