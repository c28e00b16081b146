"""How does a bill look beside what the dearest model alone would have cost? Draws what `tierway cost` says of tiers.

tierway cost --by tier --format json | python loadtests/cost_picture.py docs/cost.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

_COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#b279a2")
_PARTS = {"shares": "requests", "outside": "from outside", "idle": "idle"}
_WASTED, _IDLE, _BASELINE = "#e45756", "#d0d0d0", "#f2a541"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report by tier: what was spent beside what was not, and below it what became of the servers' hours."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - it picks its way to draw when it is imported

    total, lines = report["total"], report["data"]
    cost, baseline = float(total["cost_usd"]), float(total["baseline_usd"])
    servers = [one for one in report["servers"] if float(one["hour_usd"])]
    rows = 2 if servers else 1
    figure, axes = plt.subplots(rows, figsize=(9, 2.4 * rows + 0.8), layout="constrained", squeeze=False)
    upper = axes[0][0]
    left = 0.0
    for line, colour in zip(lines, _COLOURS, strict=False):
        wasted = float(line["wasted_usd"])
        shown = float(line["cost_usd"]) - wasted
        upper.barh("the cascade", shown, left=left, color=colour, label=f"{line['tier']}: answers shown")
        if wasted:
            doubted = f"{line['tier']}: doubted answers"
            upper.barh("the cascade", wasted, left=left + shown, color=_WASTED, label=doubted)
        left += shown + wasted
    dearest = max(lines, key=lambda line: float(line["cost_usd"]))["tier"] if lines else "nothing"
    upper.barh(f"{dearest} alone", baseline, color=_BASELINE, label="the same tokens, repriced")
    saved = 100 * (1 - cost / baseline) if baseline else 0.0
    _finish(
        upper,
        f"{total['exchanges']} requests cost ${cost:.3f} of servers at work: {saved:.0f} % less than {dearest} alone",
    )
    if servers:
        lower = axes[1][0]
        idle = sum(float(one["idle_usd"]) for one in servers)
        whole = sum(float(one["hour_usd"]) for one in servers)
        for one in servers:
            left = 0.0
            for part, colour in (("shares", _COLOURS[0]), ("outside", _COLOURS[3]), ("idle", _IDLE)):
                amount = float(one[f"{part}_usd"])
                lower.barh(one["backend"], amount, left=left, color=colour, label=_PARTS[part])
                left += amount
        _finish(lower, f"For ${idle:.2f} of the ${whole:.2f} that their hours cost, the servers did nothing")
    figure.savefig(path, dpi=150)


def _finish(axes: Any, title: str) -> None:
    axes.invert_yaxis()
    axes.set_xlabel("US dollars")
    # Between two dollar signs it would read a formula.
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def main(argv: Sequence[str]) -> int:
    """Read a report from standard input and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args(argv)
    draw(json.load(sys.stdin), asked.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
