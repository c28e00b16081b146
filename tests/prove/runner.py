"""How are proofs run? In order, seed by seed, passing over what has already been shown for this very source."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tests.prove.journal import Journal, Result
from tests.prove.proof import Proof, Size
from tests.prove.report import shown


def run(
    proofs: Sequence[Proof],
    size: Size,
    journal: Journal,
    source: str,
    *,
    seed: int | None = None,
    fresh: bool = False,
    say: Callable[[str], None],
) -> list[tuple[str, int]]:
    """Run every seed of `proofs` that is not in `journal` for `source`; only `seed` if given; all again if `fresh`.

    The (name, seed) of those that did not hold. Other errors than AssertionError are bugs of a proof and end the run.
    """
    finished = finished_seeds(journal, size, source)
    broken = []
    for proof in proofs:
        wanted = proof.seeds(size) if seed is None else (seed,)
        todo = [one for one in wanted if fresh or (proof.name, one) not in finished]
        say(f"{proof.name}: {proof.sentence}")
        if len(todo) < len(wanted):
            say(
                f"  {len(wanted) - len(todo)} of {len(wanted)} seeds held before with this source (--fresh runs them again)"
            )
        for one in todo:
            started = time.monotonic()
            try:
                figures = proof.run(one, size)
            except AssertionError as failure:
                broken.append((proof.name, one))
                say(f"  seed {one}: BROKEN: {failure}")
                say(f"    again: python -m tests.prove {proof.name} --seed {one} --size {size}")
                continue
            took_s = time.monotonic() - started
            journal.append(
                Result(proof=proof.name, seed=one, size=size, source=source, took_s=round(took_s, 3), figures=figures)
            )
            told = ", ".join(f"{name} {shown(value)}" for name, value in figures.items())
            say(f"  seed {one}: held in {took_s:.1f} s: {told}")
    return broken


def finished_seeds(journal: Journal, size: Size, source: str) -> set[tuple[str, int]]:
    """The (name, seed) that have held at `size` with `source`."""
    return {(one.proof, one.seed) for one in journal.results() if (one.size, one.source) == (size, source)}
