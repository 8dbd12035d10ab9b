"""Plots as inline SVG, so that a report is one file that needs nothing else."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from actstore.progress import scaled

INK, ACCENT, MUTED = "#222222", "#1f6f8b", "#bbbbbb"
COLOURS = (ACCENT, "#c8553d", "#588157", "#8d5a97", "#d4a017", "#555555")
mpl.rcParams.update({
    "svg.fonttype": "path", "svg.hashsalt": "actstore", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": INK, "axes.titlesize": 10, "figure.constrained_layout.use": True,
})  # fmt: skip


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def training(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss, L0 and FVU over steps, from the lines of metrics.jsonl."""
    figure = Figure(figsize=(9, 2.8))
    steps = [m["step"] for m in metrics]
    for i, (key, label) in enumerate((("loss", "loss"), ("l0", "L0"), ("fvu", "FVU (batch)"))):
        axes = figure.add_subplot(1, 3, i + 1)
        axes.plot(steps, [m[key] for m in metrics], color=ACCENT, linewidth=1.2)
        axes.set_yscale("log")
        axes.set(title=label, xlabel="step")
    return _svg(figure)


def densities(density: Sequence[float]) -> str:
    """Histogram of log10 firing frequency; latents that never fired are named in the title."""
    values = np.asarray(density)
    fired = values[values > 0]
    figure = Figure(figsize=(9, 2.8))
    axes = figure.add_subplot()
    axes.hist(np.log10(fired), bins=60, color=ACCENT)
    title = f"{len(fired)} of {len(values)} latents fired; {len(values) - len(fired)} never"
    axes.set(xlabel="log10 of the share of tokens", ylabel="latents", title=title)
    return _svg(figure)


def histogram(density: Mapping[str, Sequence[float]]) -> str:
    """Outlines of the histograms of log10 firing frequency, one per evaluation, on one pair of axes."""
    figure = Figure(figsize=(9, 3))
    axes = figure.add_subplot()
    for i, (label, shares) in enumerate(density.items()):
        fired = np.log10([share for share in shares if share > 0])
        name = f"{label}: " * bool(label) + f"{len(shares) - len(fired)} of {len(shares)} never"
        axes.hist(fired, bins=60, histtype="step", linewidth=1.2, color=COLOURS[i % len(COLOURS)], label=name)
    axes.axvline(-1, color=MUTED, linewidth=0.8, zorder=0)
    axes.set(xlabel="log10 of the share of tokens", ylabel="latents")
    axes.legend(frameon=False)
    return _svg(figure)


def positions(evaluations: Mapping[str, Sequence[Any]]) -> str:
    """FVU, L0 and delta loss over positions in a sequence (`trainer.evaluate.Position`), one line per evaluation."""
    figure = Figure(figsize=(9, 2.8))
    for i, (key, label) in enumerate((("fvu", "FVU"), ("l0", "L0"), ("delta_loss", "delta loss (nats)"))):
        axes = figure.add_subplot(1, 3, i + 1)
        for j, (name, found) in enumerate(evaluations.items()):
            points = [(p.first, getattr(p, key)) for p in found if getattr(p, key) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", markersize=3, linewidth=1.2,
                      color=COLOURS[j % len(COLOURS)], label=name)  # fmt: skip
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set(title=label, xlabel="position")
        if i == 0 and len(evaluations) > 1:
            axes.legend(frameon=False, fontsize=7)
    return _svg(figure)


def frontier(rows: Sequence[Mapping[str, Any]]) -> str:
    """FVU and delta loss over L0 (`trainer.evaluate.write_frontier`), a line for each architecture and width."""
    figure = Figure(figsize=(9, 3.6))
    draw_frontier(figure, rows)
    return _svg(figure)


def draw_frontier(figure: FigureBase, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw what `frontier` shows into a figure."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["l0"]):
        lines.setdefault(f"{row['architecture']}, {row['d_sae']:,}", []).append(row)
    for i, (key, label) in enumerate((("fvu", "FVU"), ("delta_loss", "delta loss (nats)"))):
        axes = figure.add_subplot(1, 2, i + 1)
        for j, (name, found) in enumerate(sorted(lines.items())):
            axes.plot([row["l0"] for row in found], [row[key] for row in found], "o-", markersize=4, linewidth=1.2,
                      color=COLOURS[j % len(COLOURS)], label=name)  # fmt: skip
        axes.set(xlabel="L0", ylabel=label, xscale="log", yscale="log" if min(r[key] for r in rows) > 0 else "linear")
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FormatStrFormatter("%g"))
                axis.set_minor_formatter(NullFormatter())
        if i == 0:
            axes.legend(frameon=False, fontsize=7)


def _bars(values: Mapping[str, float], label: str, *, log: bool) -> str:
    figure = Figure(figsize=(9, 0.5 + 0.4 * len(values)))
    axes = figure.add_subplot()
    names = list(values)[::-1]
    bars = axes.barh(names, [values[n] for n in names], color=ACCENT, height=0.6)
    axes.bar_label(bars, labels=[scaled(values[n]) for n in names], padding=3, color=INK)
    axes.set(xlabel=label, xscale="log" if log else "linear")
    axes.margins(x=0.12)
    return _svg(figure)


def throughput(rows_per_second: Mapping[str, float]) -> str:
    """Activations per second by stage."""
    return _bars(rows_per_second, "activations per second (log scale)", log=True)


def times(seconds: Mapping[str, float]) -> str:
    """Seconds by stage."""
    return _bars(seconds, "seconds", log=False)
