"""What may the operator do to a key of the store? Create, list, change, rotate and delete, each checked and atomic.

Keys of the configuration are shown and never changed. A change reads the key and puts another one in its place where
nobody has been faster; it is tried again where somebody was, so of several changes all are made, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from time import time

import msgspec
from msgspec import UNSET, UnsetType

from gateway.config import model as noun
from gateway.config.problem import guess, quoted
from gateway.config.units import UnitError, parse_duration
from gateway.errors import Refusal
from gateway.key_bodies import KeyChange, KeyState, NewKey, OldKey, Page, Rotation, ShownKey
from gateway.key_store import (
    LONGEST_PAGE,
    MOST_REPLACED,
    KeyFacts,
    KeyShelf,
    Replaced,
    StoredKey,
    digest_of,
    new_key,
    new_revision,
)
from gateway.keys import moment, moment_s

_TRIES = 10
_MOST_READ = 20_000
_LOOKS_LIKE_A_KEY = re.compile(r"tw-[A-Za-z0-9_-]{40,}")


class KeyAdmin:
    """The keys of the store, and those of the configuration to read.

    `models` are the names that clients may ask for, `teams` those that are declared; `time_s` the time since the epoch.
    """

    def __init__(
        self,
        shelf: KeyShelf,
        *,
        configured: Collection[noun.Key] = (),
        models: Collection[str] = (),
        teams: Collection[str] = (),
        time_s: Callable[[], float] = time,
    ) -> None:
        self._shelf = shelf
        self._configured: Mapping[str, noun.Key] = {key.name: key for key in configured}
        self._models = models
        self._teams = teams
        self._time_s = time_s

    async def create(self, new: NewKey) -> ShownKey:
        """Make a key. Raises `Refusal`."""
        if not new.name.isprintable():  # the pattern of a name lets a line break stand at its end
            raise Refusal("invalid_value", "Invalid 'name': it ends with a line break.", param="name")
        if _LOOKS_LIKE_A_KEY.search(new.name):
            raise Refusal("invalid_value", "Invalid 'name': this looks like a key, and names are logged.", param="name")
        facts = self._facts(KeyFacts(), msgspec.structs.asdict(new))
        now_s = self._time_s()
        if facts.expires_s is not None and facts.expires_s <= now_s:
            raise Refusal("invalid_value", "Invalid 'expires': this time is over.", param="expires")
        key = new_key()
        stored = StoredKey(
            name=new.name,
            digest=digest_of(key),
            revision=new_revision(),
            created_s=now_s,
            changed_s=now_s,
            facts=facts,
        )
        if new.name in self._configured or not await self._shelf.replace(new.name, None, stored):
            where = " in the configuration" if new.name in self._configured else ""
            raise Refusal("already_exists", f"There is a key of this name{where} already.", param="name")
        return self._shown(stored, key)

    async def show(self, name: str) -> ShownKey:
        """Return a key. Raises `Refusal`."""
        if name in self._configured:
            return self._shown_configured(self._configured[name])
        return self._shown(await self._stored(name))

    async def page(self, *, after: str, limit: int, team: str | None = None, tag: str | None = None) -> Page:
        """Return up to `limit` keys by name, those of a team or tag where one is given.

        A page may have fewer keys although there is more: no call reads the whole store.
        """
        found: list[ShownKey] = []
        read_keys, last = 0, after
        while True:
            part = await self._shelf.page(last, LONGEST_PAGE)
            end = part[-1].name if part else None
            stored = (self._shown(one) for one in part if one.name not in self._configured)
            for one in sorted([*stored, *self._configured_between(last, end)], key=lambda one: one.name):
                if len(found) == limit:
                    return Page(data=tuple(found), has_more=True, next=last)
                last = one.name
                if (team is None or one.team == team) and (tag is None or tag in one.tags):
                    found.append(one)
            if end is None:
                return Page(data=tuple(found), has_more=False, next=None)
            read_keys, last = read_keys + len(part), end
            if read_keys >= _MOST_READ:
                return Page(data=tuple(found), has_more=True, next=last)

    async def change(self, name: str, change: KeyChange) -> ShownKey:
        """Change what is said of a key. Raises `Refusal`."""
        told = {field: value for field, value in msgspec.structs.asdict(change).items() if value is not UNSET}

        def changed(before: StoredKey, now_s: float) -> StoredKey:
            facts = self._facts(before.facts, told)
            return msgspec.structs.replace(before, facts=facts, revision=new_revision(), changed_s=now_s)

        return self._shown(await self._replace(name, changed))

    async def rotate(self, name: str, rotation: Rotation) -> ShownKey:
        """Make another key in the place of one. Raises `Refusal`."""
        try:
            grace_s = parse_duration(rotation.grace)
        except UnitError as error:
            raise Refusal("invalid_value", f"Invalid 'grace': {error}.", param="grace") from None
        key = new_key()

        def rotated(before: StoredKey, now_s: float) -> StoredKey:
            until_s = now_s + grace_s
            older = (Replaced(before.digest, until_s), *before.replaced)
            replaced = tuple(
                msgspec.structs.replace(one, until_s=min(one.until_s, until_s))
                for one in older
                if min(one.until_s, until_s) > now_s
            )
            if len(replaced) > MOST_REPLACED:
                raise Refusal(
                    "invalid_value",
                    f"Invalid 'grace': {MOST_REPLACED} older keys hold already. A grace of '0s' ends them.",
                    param="grace",
                )
            return msgspec.structs.replace(
                before, digest=digest_of(key), revision=new_revision(), changed_s=now_s, replaced=replaced
            )

        return self._shown(await self._replace(name, rotated), key)

    async def delete(self, name: str) -> None:
        """Delete a key: also one of the store that a key of the configuration hides. Raises `Refusal`."""
        for _ in range(_TRIES):
            before = await self._shelf.named(name)
            if before is None:
                break
            if await self._shelf.replace(name, before, None):
                return
        raise self._not_here(name)

    # -- how it is done -----------------------------------------------------------------------------------------------

    async def _stored(self, name: str) -> StoredKey:
        stored = None if name in self._configured else await self._shelf.named(name)
        if stored is None:
            raise self._not_here(name)
        return stored

    async def _replace(self, name: str, changed: Callable[[StoredKey, float], StoredKey]) -> StoredKey:
        for _ in range(_TRIES):
            before = await self._stored(name)
            after = changed(before, self._time_s())
            if await self._shelf.replace(name, before, after):
                return after
        raise Refusal("keys_unavailable", "Others change this key all the time; nothing was changed.")

    def _not_here(self, name: str) -> Refusal:
        if name in self._configured:
            return Refusal("invalid_value", "This key stands in the configuration; change it there.", param="name")
        return Refusal("key_not_found", "There is no key of this name.")

    def _facts(self, before: KeyFacts, told: Mapping[str, object]) -> KeyFacts:
        """Return `before` with what is told, checked as the configuration is. Raises `Refusal`."""
        models, team, expires, metadata = (told.get(name) for name in ("models", "team", "expires", "metadata"))
        for number, model in enumerate(models if isinstance(models, tuple) else ()):
            if model not in self._models:
                text = f"no route, tier or model {quoted(model)}{guess(model, self._models)}"
                raise Refusal("invalid_value", f"Invalid 'models[{number}]': {text}.", param=f"models[{number}]")
        if isinstance(team, str) and team not in self._teams:
            text = f"no team {quoted(team)} is declared{guess(team, self._teams)}"
            raise Refusal("invalid_value", f"Invalid 'team': {text}.", param="team")
        new = {name: value for name, value in told.items() if name in KeyFacts.__struct_fields__}
        if isinstance(expires, str):
            try:
                new["expires_s"] = moment_s(expires)
            except ValueError:
                raise Refusal("invalid_value", "Invalid 'expires': there is no such time.", param="expires") from None
        elif "expires" in told:
            new["expires_s"] = None
        if isinstance(metadata, dict):
            new["metadata"] = tuple(sorted(metadata.items()))
        return msgspec.convert({**msgspec.structs.asdict(before), **new}, KeyFacts)

    def _configured_between(self, after: str, end: str | None) -> Iterator[ShownKey]:
        for name, key in self._configured.items():
            if name > after and (end is None or name <= end):
                yield self._shown_configured(key)

    def _shown(self, stored: StoredKey, key: str | UnsetType = UNSET) -> ShownKey:
        facts, now_s = stored.facts, self._time_s()
        return ShownKey(
            name=stored.name,
            source="store",
            state=_state(facts.disabled, facts.expires_s, now_s),
            models=facts.models,
            admin=facts.admin,
            team=facts.team,
            user=facts.user,
            priority=facts.priority,
            tags=facts.tags,
            metadata=dict(facts.metadata),
            expires=None if facts.expires_s is None else moment(facts.expires_s),
            created=moment(stored.created_s),
            changed=moment(stored.changed_s),
            replaced=tuple(OldKey(moment(one.until_s)) for one in stored.replaced if one.until_s > now_s),
            key=key,
        )

    def _shown_configured(self, key: noun.Key) -> ShownKey:
        expires_s = None if key.expires is None else moment_s(key.expires)
        return ShownKey(
            name=key.name,
            source="config",
            state=_state(key.disabled, expires_s, self._time_s()),
            models=key.models,
            admin=key.admin,
            team=key.team,
            user=key.user,
            priority=key.priority,
            tags=key.tags,
            metadata=key.metadata,
            expires=key.expires,
        )


def _state(disabled: bool, expires_s: float | None, now_s: float) -> KeyState:  # noqa: FBT001 - a fact, not a switch
    if disabled:
        return "disabled"
    return "active" if expires_s is None or now_s < expires_s else "expired"
