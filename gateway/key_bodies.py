"""What do the bodies of the admin API look like, both ways? Those that come in are read strictly, field by field."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.config import model as noun
from gateway.config.problem import guess
from gateway.errors import Refusal

_T = TypeVar("_T", bound=msgspec.Struct)
_AT = " - at `"
_LONGEST_CHARS = 256
_PATTERN = re.compile(r"Expected `str` matching regex '(.*)'")
_WORDS = {
    meta.pattern: meta.extra["words"]
    for alias in (noun.Name, noun.Moment)
    for meta in get_args(alias)[1:]
    if meta.extra is not None
}

KeyState = Literal["active", "disabled", "expired"]
Models = Annotated[tuple[noun.ModelId, ...], Meta(max_length=256)]
User = Annotated[str, Meta(min_length=1, max_length=256)]
Priority = Annotated[int, Meta(ge=-100, le=100)]
Tags = Annotated[tuple[noun.Name, ...], Meta(max_length=32)]
Metadata = Annotated[dict[noun.Name, Annotated[str, Meta(max_length=512)]], Meta(max_length=32)]


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a creation."""

    name: noun.Name
    models: Models | None = None
    admin: bool = False
    team: noun.Name | None = None
    user: User | None = None
    priority: Priority = 0
    tags: Tags = ()
    metadata: Metadata = {}
    expires: noun.Moment | None = None
    disabled: bool = False


class KeyChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a change: what is not there stays; null takes away."""

    models: Models | UnsetType | None = UNSET
    admin: bool | UnsetType = UNSET
    team: noun.Name | UnsetType | None = UNSET
    user: User | UnsetType | None = UNSET
    priority: Priority | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    expires: noun.Moment | UnsetType | None = UNSET
    disabled: bool | UnsetType = UNSET


class Rotation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a rotation: how long older keys still hold, none of them longer than until now."""

    grace: str = "24h"


class OldKey(msgspec.Struct, frozen=True):
    """A key that was replaced: until when it holds."""

    until: str


class ShownKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is shown. `key` itself only where it was made just now."""

    name: str
    source: Literal["store", "config"]
    state: KeyState
    models: tuple[str, ...] | None
    admin: bool
    team: str | None
    user: str | None
    priority: int
    tags: tuple[str, ...]
    metadata: dict[str, str]
    expires: str | None
    created: str | None = None
    changed: str | None = None
    replaced: tuple[OldKey, ...] = ()
    key: str | UnsetType = UNSET


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the list. Where there is more it comes after the name `next`."""

    object: Literal["list"] = "list"
    data: tuple[ShownKey, ...]
    has_more: bool
    next: str | None


def read(body: bytes, wanted: type[_T]) -> _T:
    """Read a body. Raises `Refusal` (400)."""
    try:
        return msgspec.json.decode(body, type=wanted)
    except msgspec.ValidationError as error:
        raise _complaint(str(error), wanted) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refusal("invalid_json", "The body is not valid JSON.") from None


def _complaint(message: str, wanted: type[msgspec.Struct]) -> Refusal:
    """Say what msgspec found wrong in the words of the API: the field's path first."""
    # The path stands last. What stands before it may quote the body, which could have such a path in it as well.
    what, _, path = message.rpartition(_AT) if message.endswith("`") and _AT in message else (message, "", "")
    path = path[:-1].removeprefix("key` in `").removeprefix("$").removeprefix(".")[:_LONGEST_CHARS]
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        return Refusal("missing_required_parameter", f"Missing '{missing[1]}'.", param=missing[1])
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        name = unknown[1][:_LONGEST_CHARS]
        known = [field.name for field in msgspec.structs.fields(wanted)]
        return Refusal("invalid_value", f"There is no field '{name}' here{guess(name, known)}.", param=name)
    if pattern := _PATTERN.fullmatch(what):
        # msgspec quotes the pattern as a string of Python.
        written = pattern[1].replace("\\\\", "\\")
        what = f"expected {_WORDS.get(written, 'other text')}"
    what = what.replace("`", "'")[:_LONGEST_CHARS]
    code = "invalid_type" if re.match(r"Expected '[^']*', got '", what) else "invalid_value"
    return Refusal(code, f"Invalid '{path}': {what}." if path else f"{what}.", param=path or None)
