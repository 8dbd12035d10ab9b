"""Make benchmarks/RESULTS.md of benchmarks/results/*.json, which `actstore bench ... --json FILE` writes.

python benchmarks/results.py
"""

import json
from pathlib import Path
from typing import Any

from actstore.bench.report import Rate, Report, flat, machine_line, table, unmeasured
from actstore.console import figure

HERE = Path(__file__).parent
HEAD = """# Results

Made by `python benchmarks/results.py` from `benchmarks/results/*.json`; do not edit. GB/s are 1e9 bytes of decoded
activations a second. The machine is shared and drifts: compare ratios, which are taken within one run.
"""


def reports(file: Path) -> dict[str, Report]:
    """The reports of a file by heading: one, or those of `actstore bench all`."""
    data = json.loads(file.read_text())
    several = data.get("reports")
    named = {f"{file.stem}: {name}": r for name, r in several.items()} if several else {file.stem: data}
    return {name: Report(**{**r, "rates": [Rate(**rate) for rate in r["rates"]]}) for name, r in named.items()}


def section(name: str, report: Report) -> str:
    """One report as Markdown."""
    header, lines = table(report)
    out = [f"## {name}", "", f"`{report.command}`", "", _row(header), "|" + "---|" * len(header)]
    out += [_row(line) for line in lines]
    out += ["", f"**Bound: {report.bound}** ({report.why})", ""]
    out += [f"- not measured: {line}" for line in unmeasured(report)]
    out += [f"- {k}: {figure(v)}" for k, v in flat(report.figures).items() if not k.startswith("knee")]
    return "\n".join([*out, f"- {machine_line(report)}", ""])


def _row(cells: tuple[Any, ...]) -> str:
    return "| " + " | ".join(figure(c) for c in cells) + " |"


def page(folder: Path) -> str:
    """All files of a folder."""
    found = [section(name, r) for file in sorted(folder.glob("*.json")) for name, r in reports(file).items()]
    times = [took(file) for file in sorted(folder.glob("*.json"))]
    return "\n".join([HEAD, *filter(None, times), *found])


def took(file: Path) -> str | None:
    """How long a run of `actstore bench all` took."""
    data = json.loads(file.read_text())
    flag = " --quick" if data.get("quick") else ""
    return f"`actstore bench all{flag}` ({file.stem}) took {data['seconds']:.0f} s.\n" if "reports" in data else None


def main() -> None:
    (HERE / "RESULTS.md").write_text(page(HERE / "results"))


if __name__ == "__main__":
    main()
