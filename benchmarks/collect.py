"""Record the --json files of commands: python benchmarks/collect.py NAME FILE.json ...

Each file is a part of NAME.json and NAME.md: rates of an `actstore bench` report, or figures by dotted name.

    actstore bench read runs/store --json read.json && python benchmarks/collect.py io read.json
    examples/smollm2.sh runs/smollm2 && python benchmarks/collect.py smollm2 runs/smollm2/*.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import record
from record import Row

LEFT_OUT = ("density", "provenance", "machine", "out", "store", "fingerprint", "command", "rates")


def rows(data: dict[str, Any]) -> list[Row]:
    """Rates, each a row, then figures."""
    rates = [{k: v for k, v in rate.items() if k != "more"} | rate["more"] for rate in data.get("rates", ())]
    return rates + [{"what": name, "value": value} for name, value in flat(data).items()]


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars by dotted name."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        if name not in LEFT_OUT:
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


if __name__ == "__main__":
    name, *files = sys.argv[1:]
    for file in map(Path, files):
        data = json.loads(file.read_text())
        record.keep(name, file.stem, rows(data), data.get("command", ""))
