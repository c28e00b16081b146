"""What is a proof? A sentence, and a function of a seed that breaks when the sentence is not true."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

Size = Literal["full", "test"]
Figures = dict[str, float | str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """One proof: `run(seed, size)` gives its figures, or raises AssertionError when the sentence is not true.

    The same seed and size do the same again, as far as a clock and a network allow. `test` is a matter of seconds.
    `figures_in` is the page of docs/ that shows its figures, where they are too many for a row of proofs.md.
    """

    name: str
    sentence: str
    run: Callable[[int, Size], Figures]
    full_seeds: int
    test_seeds: int = 1
    figures_in: str | None = None

    def seeds(self, size: Size) -> range:
        """The seeds that make the proof complete at `size`; they start at 1."""
        return range(1, 1 + (self.full_seeds if size == "full" else self.test_seeds))
