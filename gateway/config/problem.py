"""What is wrong, and at which place? One finding about a configuration file, and the fault that carries all of them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST_GUESSED = 64
"""Longest word that is compared with the known ones: the comparison is quadratic in its length."""
LONGEST_QUOTED = 40


class Problem(msgspec.Struct, frozen=True):
    """One finding. `line` and `column` count from 1."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class ConfigError(Exception):
    """The file is no configuration. `problems` are all that were found, in the order of the file."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Return the problems by position, each once (an aliased node is read once for every use)."""
    return tuple(sorted(set(problems), key=lambda problem: (problem.line, problem.column, problem.message)))


def quoted(text: str) -> str:
    """Text of the file as a message may show it: one line, short, between backticks."""
    shown = "".join(c if c.isprintable() and c != "`" else "?" for c in text[: LONGEST_QUOTED + 1])
    return f"`{shown[:LONGEST_QUOTED]}…`" if len(shown) > LONGEST_QUOTED else f"`{shown}`"


def guess(text: str, known: Iterable[str]) -> str:
    """`; did you mean …?` where one of the known words is close, else nothing."""
    if len(text) > LONGEST_GUESSED:
        return ""
    by_folded = {word.casefold(): word for word in known}
    close = get_close_matches(text.casefold(), by_folded, n=1)
    return f"; did you mean {quoted(by_folded[close[0]])}?" if close else ""
