"""What is the secret that a reference means? References in, values out that do not show themselves.

A value leaves its `Secret` only through `reveal()`, at the one place that sends it. No message here shows any part of
one.
"""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import msgspec

from gateway.config.load import Loaded
from gateway.config.model import SecretFromEnv, SecretFromFile, SecretRef
from gateway.config.problem import ConfigError, Problem, in_order
from gateway.config.shape import Place

LARGEST_SECRET = 16 * 1024
"""Bytes of the largest secret: what servers take in a header is less."""

_REDACTED = "Secret(…)"


class SecretError(ValueError):
    """A reference leads to no usable secret. The message names the reference and the reason, never the value."""


class Secret:
    """A value that logs, tracebacks and pickles cannot show."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself."""
        return self._value

    def __repr__(self) -> str:
        return _REDACTED

    def __str__(self) -> str:
        return _REDACTED

    def __format__(self, spec: str) -> str:
        return format(_REDACTED, spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # type: ignore[assignment]  # a hash tells something of the value

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not pickled or copied")


def resolve(ref: SecretRef, *, folder: Path, environ: Mapping[str, str]) -> Secret:
    """Return the secret of one reference. Raises SecretError.

    A relative `path` starts at `folder`. White space around the content of a file is dropped, that of a variable is
    not: an editor adds the one, nobody means the other.
    """
    if isinstance(ref, SecretFromEnv):
        what = f"the environment variable `{ref.name}`"
        value = environ.get(ref.name)
        if value is None:
            raise SecretError(f"{what} is not set")
    else:
        what = f"the file `{folder / ref.path}`"
        value = _content(folder / ref.path, what).strip()
    if not value:
        raise SecretError(f"{what} is empty")
    if len(value) > LARGEST_SECRET:
        raise SecretError(f"{what} holds more than {LARGEST_SECRET} characters")
    if not value.isascii():
        raise SecretError(f"{what} holds a character outside ASCII, which no HTTP header carries")
    if not value.isprintable():
        raise SecretError(f"{what} holds a line break or another control character")
    if value != value.strip():
        raise SecretError(f"{what} begins or ends with a space")
    return Secret(value)


def check(loaded: Loaded, environ: Mapping[str, str] = os.environ) -> tuple[Problem, ...]:
    """Return what keeps the references of a configuration from being resolved, by position."""
    problems = []
    for place, ref in references(loaded):
        try:
            resolve(ref, folder=loaded.beside("."), environ=environ)
        except SecretError as fault:
            problems.append(loaded.problem(place, str(fault)))
    return in_order(problems)


def resolve_all(loaded: Loaded, environ: Mapping[str, str] = os.environ) -> Mapping[SecretRef, Secret]:
    """Return every secret of a configuration by its reference. Raises ConfigError with all that cannot be had."""
    found: dict[SecretRef, Secret] = {}
    problems = []
    for place, ref in references(loaded):
        try:
            found[ref] = resolve(ref, folder=loaded.beside("."), environ=environ)
        except SecretError as fault:
            problems.append(loaded.problem(place, str(fault)))
    if problems:
        raise ConfigError(in_order(problems))
    return found


def references(loaded: Loaded) -> Iterator[tuple[Place, SecretRef]]:
    """Every reference of a configuration with its place."""
    yield from _below((), loaded.config)


def _below(place: Place, value: object) -> Iterator[tuple[Place, SecretRef]]:
    if isinstance(value, SecretFromEnv | SecretFromFile):
        yield place, value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _below((*place, name), getattr(value, name))
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield from _below((*place, name), member)
    elif isinstance(value, tuple):
        for index, member in enumerate(value):
            yield from _below((*place, index), member)


def _content(path: Path, what: str) -> str:
    try:
        # Looked at first: to open a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SecretError(f"{what} is not a regular file")
        with path.open("rb") as stream:
            data = stream.read(LARGEST_SECRET + 1)
    except (OSError, ValueError) as fault:
        if isinstance(fault, SecretError):
            raise
        reason = (fault.strerror if isinstance(fault, OSError) else None) or "not a path"
        raise SecretError(f"{what} cannot be read: {reason}") from None
    if len(data) > LARGEST_SECRET:
        raise SecretError(f"{what} is larger than {LARGEST_SECRET} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SecretError(f"{what} is not text") from None
