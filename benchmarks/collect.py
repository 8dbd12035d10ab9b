"""Gather the --json files of one run into benchmarks/NAME.json and a table in benchmarks/NAME.md.

python benchmarks/collect.py runs/smollm2 smollm2 "examples/smollm2.sh runs/smollm2"
"""

import json
import sys
from pathlib import Path
from typing import Any

from actstore.bench import machine
from actstore.console import figure

HERE = Path(__file__).parent
LEFT_OUT = ("density", "provenance", "machine", "out", "store", "fingerprint", "command")


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Scalars by dotted name; rates by what they measure."""
    if isinstance(data, dict):
        return {k: v for n, d in data.items() if n not in LEFT_OUT for k, v in flat(d, f"{prefix}.{n}").items()}
    if isinstance(data, list):
        named = [(f"{prefix}.{r['what']}", r) for r in data]
        return {f"{n}, {unit}": r[k] for n, r in named for k, unit in (("gb_s", "GB/s"), ("of_ceiling", "of ceiling"))}
    return {prefix: data}


def main() -> None:
    run, name, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    parts = {p.stem: flat(json.loads(p.read_text()), p.stem) for p in sorted(run.glob("*.json"))}
    record = {"command": command, "figures": {k: v for p in parts.values() for k, v in p.items()}, "machine": machine()}
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# {name}", "", f"`{command}`, collected by `python benchmarks/collect.py`. Do not edit.", ""]
    lines += ["| | |", "|---|---|", *(f"| {k} | {figure(v)} |" for k, v in record["figures"].items()), ""]
    lines += [", ".join(f"{k} {v}" for k, v in record["machine"].items()), ""]
    (HERE / f"{name}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
