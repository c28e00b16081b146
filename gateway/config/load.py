"""Is this file a configuration, and if not, where and why? All problems are listed together, by position.

What cannot be YAML is told alone, because nothing behind it can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec import inspect

from gateway.config.findings import Findings
from gateway.config.meaning import Check, model_id
from gateway.config.model import Config
from gateway.config.problem import ConfigError, Problem, in_order
from gateway.config.shape import Mark, Place, Walk, spelled
from gateway.config.source import compose, read_text

__all__ = ["ConfigError", "Loaded", "Problem", "load", "model_id", "parse"]

_NONE: Mapping[str, str] = MappingProxyType({})


class Loaded(msgspec.Struct, frozen=True):
    """A configuration and where it came from.

    `digest` is the first 12 hexadecimal digits of the SHA-256 of its content: comments, order of names and white space
    do not change it. `marks` has line and column (from 1) of every value that stands in the file.
    """

    config: Config
    digest: str
    path: Path
    warnings: tuple[Problem, ...]
    marks: Mapping[Place, Mark]

    def beside(self, path: str) -> Path:
        """Return a path of the file as a path of this process: a relative one starts at the folder of the file."""
        return self.path.absolute().parent / path

    def problem(self, place: Place, message: str) -> Problem:
        """Return a problem at a place of the file, or at what stands around it where it is not written out."""
        near = place
        while near not in self.marks:
            near = near[:-1]
        where = spelled(place)
        return Problem(str(self.path), *self.marks[near], f"{where}: {message}" if where else message)


def load(path: Path, *, local_model_ids: Mapping[str, str] = _NONE) -> Loaded:
    """Read and check a file. Raises ConfigError with every problem, an unreadable file being one.

    `local_model_ids` says which model id each word for local weights stands for (`small` → `smollm2-135m-instruct`);
    without it names of such models are not checked.
    """
    return _parse(read_text(path), str(path), path, local_model_ids)


def parse(text: str, file: str = "gateway.yaml", *, local_model_ids: Mapping[str, str] = _NONE) -> Loaded:
    """Check a text as if it stood in `file`, which need not exist. Raises ConfigError."""
    return _parse(text, file, Path(file), local_model_ids)


def _parse(text: str, file: str, path: Path, local_model_ids: Mapping[str, str]) -> Loaded:
    walk = Walk(file)
    config: Config = walk.value(compose(text, file), inspect.type_info(Config), ())
    if () in walk.broken:  # not a mapping at all: stand-ins only
        raise ConfigError(in_order(walk.problems))
    findings = Findings(file, walk.marks, walk.broken)
    Check(config, findings, local_model_ids)
    errors = in_order([*walk.problems, *findings.errors])
    if errors:
        raise ConfigError(errors)
    content = msgspec.json.encode(config, order="deterministic")
    return Loaded(config, sha256(content).hexdigest()[:12], path, in_order(findings.warnings), walk.marks)
