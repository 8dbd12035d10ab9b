"""Draw what `actstore bench ... --json FILE.json` wrote: python benchmarks/plot.py FILE.json PICTURE.png (or .svg).

Rates are bars; those of `actstore bench storage` are curves by requests at once, with a ring at each knee.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def bars(report: dict[str, Any], axes: Any) -> None:
    """One bar a rate, with its ratio and what that is to."""
    rates = report["rates"]
    axes.barh(range(len(rates)), [r["gb_s"] for r in rates])
    for i, r in enumerate(rates):
        words = f" {r['gb_s']:.3g}  ({r['of_ceiling']:.2f} of {r['ceiling']})"
        axes.annotate(words, (r["gb_s"], i), va="center", fontsize=7)
    axes.set_yticks(range(len(rates)), [r["what"] for r in rates], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s")
    axes.margins(x=0.35, y=0.01)
    axes.set_xlim(left=0)


def curves(report: dict[str, Any], axes: Any, verb: str) -> None:
    """A line for each object size."""
    rates = [{**r["more"], "gb_s": r["gb_s"]} for r in report["rates"] if r["more"].get("verb") == verb]
    for size in sorted({r["MiB"] for r in rates}):
        points = {r["at once"]: r["gb_s"] for r in rates if r["MiB"] == size}
        (line,) = axes.plot(*zip(*points.items(), strict=True), marker=".", label=f"{size:g} MiB")
        knee = report["figures"]["knee"][verb][f"{size:g} MiB"]
        axes.plot(knee, points[knee], marker="o", markersize=10, fillstyle="none", color=line.get_color())
    ticks = sorted({r["at once"] for r in rates})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_title(f"{verb}, GB/s by requests at once", fontsize=9)
    axes.set_ylim(bottom=0)


def main(source: Path, picture: Path) -> None:
    report = json.loads(source.read_text())
    knees = report["figures"].get("knee")
    figure = Figure(figsize=(8, 4.5 if knees else 1.2 + 0.32 * len(report["rates"])), layout="constrained")
    if knees:
        panels = figure.subplots(1, len(knees))
        for verb, axes in zip(knees, panels, strict=True):
            curves(report, axes, verb)
        panels[0].legend(fontsize=7)
    else:
        bars(report, figure.subplots())
    figure.suptitle(f"{report['command']}\nbound: {report['bound']}", fontsize=9, wrap=True)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
