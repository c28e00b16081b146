"""`python -m tests.prove`: run the proofs and write down what they showed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.prove.journal import Journal, digest
from tests.prove.proof import Proof
from tests.prove.proofs import PROOFS
from tests.prove.report import EMPTY_FIGURES, EMPTY_PAGE, figures_page, page
from tests.prove.runner import finished_seeds, run


def main(arguments: Sequence[str], proofs: Sequence[Proof], root: Path) -> int:
    """Do what the command line says. The exit status: 0 all hold, 1 some do not, 130 interrupted."""
    by_name = {proof.name: proof for proof in proofs}
    if len(by_name) < len(proofs):
        raise ValueError("two proofs have the same name")
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these proofs (default: all)")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--size", choices=("full", "test"), default="full", help="how much to do (default: full)")
    parser.add_argument("--fresh", action="store_true", help="run again what has already held")
    parser.add_argument("--list", action="store_true", help="say which proofs there are, and run nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in by_name]
    if unknown:
        parser.error(f"no proof is called {', '.join(unknown)}; there are: {', '.join(by_name) or 'none'}")

    chosen = [by_name[name] for name in options.names] or list(proofs)
    journal = Journal(root / ".prove" / "results.jsonl")
    source = digest(root)
    if options.list:
        finished = finished_seeds(journal, options.size, source)
        for proof in chosen:
            done = sum((proof.name, seed) in finished for seed in proof.seeds(options.size))
            print(f"{proof.name}: {proof.sentence} ({done} of {len(proof.seeds(options.size))} seeds held)")
        return 0

    print(f"{len(chosen)} proofs at {options.size} size, source {source}", flush=True)
    try:
        broken = run(
            chosen,
            options.size,
            journal,
            source,
            seed=options.seed,
            fresh=options.fresh,
            say=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print("stopped; what has held is kept, and the same command goes on from here")
        return 130
    finally:
        # Also after a crash: what was shown until then was shown.
        _write_pages(root / "docs", proofs, journal)
    for name, seed in broken:
        print(f"BROKEN: {name}, seed {seed}")
    return 1 if broken else 0


def _write_pages(docs: Path, proofs: Sequence[Proof], journal: Journal) -> None:
    results = journal.results()
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / "proofs.md"
    path.write_text(page(path.read_text() if path.exists() else EMPTY_PAGE, proofs, results))
    for name in dict.fromkeys(proof.figures_in for proof in proofs if proof.figures_in is not None):
        theirs = [proof for proof in proofs if proof.figures_in == name]
        path = docs / name
        path.write_text(figures_page(path.read_text() if path.exists() else EMPTY_FIGURES, theirs, results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], PROOFS, Path(__file__).parents[2]))
