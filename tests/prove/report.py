"""What do the docs say about the proofs? One row for each that has been run to its end.

One with many figures has them in a table on another page.
"""

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
FIGURES_BEGIN = "<!-- figures -->"
FIGURES_END = "<!-- end of figures -->"
EMPTY_FIGURES = f"""# Figures

{FIGURES_BEGIN}
{FIGURES_END}
"""
_HEAD = ("| proof | what it shows | seeds | figures | source | again with |", "| --- | --- | --- | --- | --- | --- |")


def page(old: str, proofs: Sequence[Proof], results: Iterable[Result]) -> str:
    """The page `old` with its table brought up to date.

    A proof has the row of the last source with which all its seeds held; without one here, the row that the page
    already has, since it may have been proved on another machine.
    """
    before, table, after = _between(old, BEGIN, END)
    kept = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| `")}
    results = list(results)
    rows = [row(proof, results) or kept.get(f"`{proof.name}`") for proof in proofs]
    lines = [*_HEAD, *filter(None, rows)] if any(rows) else ["No proof has been run to its end yet."]
    return "\n".join([before, "", *lines, "", after])


def figures_page(old: str, proofs: Sequence[Proof], results: Iterable[Result]) -> str:
    """The page `old` with the figures of `proofs` brought up to date, by the same rule as the rows of `page`."""
    before, sections, after = _between(old, FIGURES_BEGIN, FIGURES_END)
    kept = {text.partition("`")[0]: "### `" + text.strip() for text in sections.split("### `")[1:]}
    results = list(results)
    found = [section(proof, results) or kept.get(proof.name) for proof in proofs]
    return "\n\n".join([before, *filter(None, found), after])


def _between(old: str, begin: str, end: str) -> tuple[str, str, str]:
    """Part a page into what is before, between and after its marks, which stay with what is around them."""
    before, _, rest = old.partition(begin)
    written, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no {begin} … {end}")
    return before + begin, written, end + after


def section(proof: Proof, results: Iterable[Result]) -> str | None:
    """The figures of `proof` as a table of their own, None while no source has all its seeds."""
    complete = _complete(proof, results)
    if complete is None:
        return None
    source, held = complete
    seeds = f"{proof.full_seeds} seeds" if proof.full_seeds > 1 else "1 seed"
    told = [f"| {name} | {spread(one.figures.get(name) for one in held)} |" for name in held[0].figures]
    return "\n".join(
        [
            f"### `{proof.name}`",
            "",
            f"{proof.sentence} ({seeds}, source `{source}`)",
            "",
            "| | |",
            "| --- | --- |",
            *told,
        ]
    )


def row(proof: Proof, results: Iterable[Result]) -> str | None:
    """The row of `proof`, None while no source has all its seeds."""
    complete = _complete(proof, results)
    if complete is None:
        return None
    source, held = complete
    figures = "; ".join(f"{name} {spread(one.figures.get(name) for one in held)}" for name in held[0].figures)
    cells = (
        f"`{proof.name}`",
        proof.sentence,
        f"{proof.full_seeds}",
        figures if proof.figures_in is None else f"[in {proof.figures_in}]({proof.figures_in}#figures)",
        f"`{source}`",
        f"`python -m tests.prove {proof.name}`",
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _complete(proof: Proof, results: Iterable[Result]) -> tuple[str, list[Result]] | None:
    """The last source with which every seed held, with their results."""
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
    return complete, [by_source[complete][seed] for seed in proof.seeds("full")]


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
