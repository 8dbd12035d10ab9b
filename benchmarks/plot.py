"""Reports as pictures (PNG or SVG by the file's suffix): bars of rates, or lines where concurrency varies."""

from pathlib import Path
from typing import Any

from actstore.bench.report import Rate, Report, is_grid

WIDTH = 8.0
"""Inches."""
CEILING, MEASURED = "#9aa5b1", "#2b6cb0"


def check_name(file: Path | None) -> None:
    """`ValueError` for a suffix other than png or svg."""
    if file is not None and file.suffix not in (".png", ".svg"):
        raise ValueError(f"can't draw {file.name}: the name must end in .png or .svg")


def draw(report: Report, file: Path) -> None:
    """Draw a report."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = is_grid(report)
    figure = Figure(figsize=(WIDTH, 4.5 if curves else 1.2 + 0.32 * len(report.rates)), layout="constrained")
    FigureCanvasAgg(figure)
    if curves:
        _curves(report, figure)
    else:
        _bars(report, figure.subplots())
    figure.suptitle(f"{report.command}\nbound: {report.bound}", fontsize=9, wrap=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _bars(report: Report, axes: Any) -> None:
    """One bar a rate, with its ratio and what that is to."""
    for i, r in enumerate(report.rates):
        axes.barh(i, r.gb_s or 0.0, color=CEILING if _is_ceiling(r) else MEASURED)
        axes.annotate(
            "not measured" if r.gb_s is None else f" {r.gb_s:.3g}  ({r.of_ceiling or 0:.2f} of {r.ceiling})",
            (r.gb_s or 0.0, i),
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(report.rates)), [r.what for r in report.rates], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s")
    axes.margins(x=0.35, y=0.01)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def _is_ceiling(r: Rate) -> bool:
    return r.ceiling in ("itself", "memory copy") and "rows/s" not in r.more


def _curves(report: Report, figure: Any) -> None:
    """Rate by concurrency: a panel for each verb, a line for each object size, a ring at its knee."""
    verbs = ("GET", "PUT")
    panels = figure.subplots(1, len(verbs))
    for verb, axes in zip(verbs, panels, strict=True):
        rates = [r for r in report.rates if r.more.get("verb") == verb and r.gb_s is not None]
        for size in sorted({r.more["MiB"] for r in rates}):
            points = [(r.more["at once"], r.gb_s) for r in rates if r.more["MiB"] == size]
            (line,) = axes.plot(*zip(*points, strict=True), marker=".", label=f"{size:g} MiB")
            knee = report.figures["knee"][verb][f"{size:g} MiB"]
            axes.plot(knee, dict(points)[knee], marker="o", markersize=10, fillstyle="none", color=line.get_color())
        ticks = sorted({r.more["at once"] for r in rates})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_title(verb, fontsize=9)
        axes.set_xlabel("requests at once (ring: knee)")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GB/s")
    panels[0].legend(fontsize=7)
