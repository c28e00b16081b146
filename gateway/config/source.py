"""Is this text YAML, of a size and depth that can be read? Text in, its root node with positions out.

The parser sees nothing that was not bounded before: bytes, depth, documents, characters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gateway.config.problem import ConfigError, Problem

LARGEST_FILE = 1024 * 1024
DEEPEST = 32

# libyaml where PyYAML was built with it: ten times as fast, the same nodes.
_Loader: type[Any] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def read_text(path: Path) -> str:
    """Return the text of the file. Raises ConfigError where there is none, or over 1 MiB, or not UTF-8."""
    file = str(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
        raise ConfigError((Problem(file, 1, 1, f"cannot be read: {reason}"),)) from None
    if len(data) > LARGEST_FILE:
        raise ConfigError((Problem(file, 1, 1, "larger than 1MiB, which no configuration is"),))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        before = data[: fault.start].decode("utf-8-sig", errors="replace")
        raise ConfigError((_at_index(file, before, len(before), "not UTF-8 text"),)) from None


def compose(text: str, file: str) -> yaml.Node:
    """Return the root node of the one document in `text`. Raises ConfigError with what keeps it from being one."""
    if len(text) > LARGEST_FILE:
        raise ConfigError((Problem(file, 1, 1, "larger than 1MiB, which no configuration is"),))
    odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if odd is not None:
        message = f"the character U+{ord(odd.group()):04X} cannot stand in YAML"
        raise ConfigError((_at_index(file, text, odd.start(), message),))
    try:
        _bound(text, file)
        root: yaml.Node | None = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as fault:
        raise ConfigError((_syntax(fault, text, file),)) from None
    except yaml.YAMLError as fault:
        raise ConfigError((Problem(file, 1, 1, f"not YAML: {fault}"),)) from None
    if root is None:
        raise ConfigError((Problem(file, 1, 1, "the file is empty; docs/configuration.md has an example"),))
    return root


def _bound(text: str, file: str) -> None:
    """Refuse what the recursive composer must not see. Raises ConfigError."""
    parser = _Loader(text)
    depth = documents = 0
    while parser.check_event():
        event = parser.get_event()
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        message = ""
        if depth > DEEPEST:
            message = f"nested more than {DEEPEST} levels deep"
        elif documents > 1:
            message = "a second YAML document begins here; the file must hold one"
        if message:
            mark = event.start_mark
            raise ConfigError((Problem(file, mark.line + 1, mark.column + 1, message),))


def _syntax(fault: yaml.MarkedYAMLError, text: str, file: str) -> Problem:
    mark = fault.problem_mark or fault.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    rows = text.split("\n")
    row = rows[line] if line < len(rows) else ""
    indent = row[: len(row) - len(row.lstrip())]
    if "\t" in indent:
        return Problem(file, line + 1, indent.index("\t") + 1, "a tab; YAML is indented with spaces")
    message = f"not YAML: {fault.problem or 'no sense can be made of this'}"
    if fault.context:
        start = fault.context_mark
        message += f" ({fault.context}" + (f" that began at {start.line + 1}:{start.column + 1})" if start else ")")
    return Problem(file, line + 1, column + 1, message)


def _at_index(file: str, text: str, index: int, message: str) -> Problem:
    before = text[:index]
    return Problem(file, before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1, message)
