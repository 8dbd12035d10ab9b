"""One self-contained HTML file: figures, plots as inline SVG, versions. It loads nothing and runs no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePath
from typing import Any

from actstore.bench import machine
from actstore.console import figure
from trainer import plots
from trainer.evaluate import DENSE, Evaluation
from trainer.files import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin-bottom: 1rem; }
td, th { padding: 0.15rem 1.5rem 0.15rem 0; border-bottom: 1px solid #ddd; text-align: left; }
td:last-child, .many td:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
svg { max-width: 100%; height: auto; } footer { color: #666; margin-top: 2rem; font-size: 0.85rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence, and a plot or a table."""

    title: str
    text: str
    plot: str = ""
    """Inline SVG."""
    table: Sequence[Sequence[Any]] = ()
    """Lines of cells; the first is the header."""


def write_report(path: Path, *, title: str, figures: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Write the report to `path`, whole or not at all."""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(figure(v))}</td></tr>" for k, v in figures.items())
    parts = "".join(f"<h2>{escape(s.title)}</h2><p>{escape(s.text)}</p>{s.plot}{_table(s.table)}" for s in sections)
    versions = ", ".join(f"{k} {v}" for k, v in machine().items())
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><table>{rows}</table>{parts}<footer>{escape(versions)}</footer></body></html>\n"
    )
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def _table(lines: Sequence[Sequence[Any]]) -> str:
    if not lines:
        return ""
    header = "".join(f"<th>{escape(str(cell))}</th>" for cell in lines[0])
    rows = ("".join(f"<td>{escape(figure(cell))}</td>" for cell in line) for line in lines[1:])
    return f'<table class="many"><tr>{header}</tr>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def evaluation_sections(evaluations: Sequence[Evaluation]) -> list[Section]:
    """What `trainer eval` found: a table if there are several evaluations, positions and densities."""
    labels = evaluation_labels(evaluations)
    columns = ("l0", "fvu", "delta_loss", "loss_recovered", "ce_clean", "dead", "dense", "tokens")
    lines = [[label, *(getattr(e, name) for name in columns)] for label, e in labels.items()]
    sections = [
        Section(
            title="By position",
            text="Over positions 0, 1, 2-3, 4-7 and so on of a sequence. FVU compares with the mean of all tokens.",
            plot=plots.positions({label: e.positions for label, e in labels.items()}),
        ),
        Section(
            title="Firing densities",
            text=f"Latents by the share of tokens on which they fire; dense ones fire on more than {DENSE:.0%}.",
            plot=plots.histogram({label: e.density for label, e in labels.items()}),
        ),
    ]
    if len(evaluations) == 1:
        return sections
    text = "Every model on every data set; each FVU compares with that model's mean on that data set."
    table = [["model, data", *(name.replace("_", " ") for name in columns)], *lines]
    return [Section(title="By model and data set", text=text, table=table), *sections]


def evaluation_labels(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Evaluations by the parts of model and data set that tell them apart."""
    models, data = {e.model for e in evaluations}, {e.data for e in evaluations}
    short: list[str] = []
    for e in evaluations:
        parts = [PurePath(e.model).name] * (len(models) > 1) + [PurePath(e.data).name] * (len(data) > 1)
        short.append(", ".join(parts))
    if len(set(short)) < len(short):  # two paths may end alike
        short = [f"{e.model}, {e.data}" for e in evaluations]
    return dict(zip(short, evaluations, strict=True))


def frontier_sections(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Many SAEs (`trainer.evaluate.write_frontier`): what each L0 costs, for every site, model and data set."""
    columns = ("name", "l0", "fvu", "delta_loss", "loss_recovered", "dead", "dense")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        names = (row["site"], PurePath(row["model"]).name, PurePath(row["data"]).name)
        groups.setdefault(", ".join(names), []).append(row)
    return [
        Section(
            title=name,
            text="A line for each architecture and width; lower and further left is better.",
            plot=plots.frontier(group),
            table=[[c.replace("_", " ") for c in columns], *([row[c] for c in columns] for row in group)],
        )
        for name, group in groups.items()
    ]
