"""Run `actstore demo` afresh and record its figures: benchmarks/demo.json, which the README quotes."""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import render_readme

from actstore.bench import machine

HERE = Path(__file__).parent


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.json"
        command = ["actstore", "demo", "--out", f"{scratch}/demo", "--json", str(file)]
        subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)
        figures = json.loads(file.read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record = {
        "command": "python benchmarks/record_demo.py",
        "figures": figures,
        "largest_process_bytes": peak,
        "machine": machine(),
    }
    (HERE / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    render_readme.main()


if __name__ == "__main__":
    main()
