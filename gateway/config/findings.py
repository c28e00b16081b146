"""What was found in a file, and at which line? Errors and warnings as they are found, by place.

Knows which places could not be read, so that nothing is said of a stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.config.problem import Problem
from gateway.config.shape import Mark, Place, spelled


class Findings:
    """The `errors` and `warnings` of one file. `marks` are the places that stand in it, `broken` those with a fault."""

    def __init__(self, file: str, marks: Mapping[Place, Mark], broken: set[Place]) -> None:
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []
        self.marks = marks
        self.broken = broken
        self._file = file

    def error(self, place: Place, message: str) -> None:
        """Note an error at a place, or at what stands around it where it is not written out."""
        self.errors.append(self._problem(place, message))

    def error_at(self, mark: Mark, message: str) -> None:
        """Note an error at a line and column."""
        self.errors.append(Problem(self._file, *mark, message))

    def warn(self, place: Place, message: str) -> None:
        """Note a warning at a place."""
        self.warnings.append(self._problem(place, message))

    def at(self, place: Place) -> Mark:
        """Return where a place stands, or what is around it."""
        while place not in self.marks:
            place = place[:-1]
        return self.marks[place]

    def whole(self, place: Place) -> bool:
        """Whether this place is written out and could be read."""
        return place in self.marks and place not in self.broken

    def sound(self, place: Place) -> bool:
        """Whether nothing in or below this place, nor a key misspelt in it, is a fault."""
        return not any(fault[: len(place)] == place for fault in self.broken)

    def all_read(self, *nouns: str) -> bool:
        """Whether all of these nouns could be read, and no noun of the file is misspelt."""
        return not any(len(fault) <= 1 or fault[0] in nouns for fault in self.broken)

    def all_named(self, noun: str, key: str) -> bool:
        """Whether every member of a list has been read as far as its `key`."""
        return not any(
            len(fault) <= 1 or (fault[0] == noun and (len(fault) < 3 or fault[2] == key)) for fault in self.broken
        )

    def _problem(self, place: Place, message: str) -> Problem:
        where = spelled(place)
        return Problem(self._file, *self.at(place), f"{where}: {message}" if where else message)


def spot(mark: Mark) -> str:
    """`12:3` of a line and column."""
    return f"{mark[0]}:{mark[1]}"
