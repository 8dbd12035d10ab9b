"""One self-contained HTML file: figures, plots as inline SVG, versions. It loads nothing and runs no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from actstore.bench import machine
from actstore.console import figure
from trainer.files import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: 0.15rem 1.5rem 0.15rem 0; border-bottom: 1px solid #ddd; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
svg { max-width: 100%; height: auto; } footer { color: #666; margin-top: 2rem; font-size: 0.85rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence and a plot."""

    title: str
    text: str
    plot: str
    """Inline SVG."""


def write_report(path: Path, *, title: str, figures: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Write the report to `path`, whole or not at all."""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(figure(v))}</td></tr>" for k, v in figures.items())
    parts = "".join(f"<h2>{escape(s.title)}</h2><p>{escape(s.text)}</p>{s.plot}" for s in sections)
    versions = ", ".join(f"{k} {v}" for k, v in machine().items())
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><table>{rows}</table>{parts}<footer>{escape(versions)}</footer></body></html>\n"
    )
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))
