"""What do the docs say about the proofs? One row for each that has been run to its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.prove.journal import Result
from tests.prove.proof import Proof

BEGIN = "<!-- proofs: begin (written by `make prove`) -->"
END = "<!-- proofs: end -->"
EMPTY_PAGE = f"""# Proofs

Every sentence here was run at full size by `make prove`, for each of its seeds; a figure that differs from seed to
seed is given as its least and its most. `make test` runs every proof at a size of seconds.

{BEGIN}
{END}
"""
_HEAD = ("| proof | what it shows | seeds | figures | source | again with |", "| --- | --- | --- | --- | --- | --- |")


def page(old: str, proofs: Sequence[Proof], results: Iterable[Result]) -> str:
    """The page `old` with its table brought up to date.

    A proof has the row of the last source with which all its seeds held; without one here, the row that the page
    already has, since it may have been proved on another machine.
    """
    before, _, rest = old.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    kept = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| `")}
    results = list(results)
    rows = [row(proof, results) or kept.get(f"`{proof.name}`") for proof in proofs]
    lines = [*_HEAD, *filter(None, rows)] if any(rows) else ["No proof has been run to its end yet."]
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def row(proof: Proof, results: Iterable[Result]) -> str | None:
    """The row of `proof`, None while no source has all its seeds."""
    by_source: dict[str, dict[int, Result]] = {}
    complete = None
    for result in results:
        if result.proof == proof.name and result.size == "full" and result.seed in proof.seeds("full"):
            seeds = by_source.setdefault(result.source, {})
            seeds[result.seed] = result
            if len(seeds) == len(proof.seeds("full")):
                complete = result.source
    if complete is None:
        return None
    held = [by_source[complete][seed] for seed in proof.seeds("full")]
    cells = (
        f"`{proof.name}`",
        proof.sentence,
        f"{proof.full_seeds}",
        "; ".join(f"{name} {spread(one.figures.get(name) for one in held)}" for name in held[0].figures),
        f"`{complete}`",
        f"`python -m tests.prove {proof.name}`",
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def spread(values: Iterable[float | str | None]) -> str:
    """One figure over all seeds: the value they share, or the least and the most, or every text once."""
    known = [value for value in values if value is not None]
    numbers = sorted(value for value in known if not isinstance(value, str))
    if len(numbers) != len(known):
        return ", ".join(dict.fromkeys(shown(value) for value in known))
    least, most = shown(numbers[0]), shown(numbers[-1])
    return least if least == most else f"{least} to {most}"


def shown(value: float | str) -> str:
    """A figure for people: whole numbers whole, others to four digits."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
