"""Run `actstore demo` afresh and record its figures for the README: python benchmarks/record_demo.py [--plain].

--plain emulates a processor without AVX-512 and AMX, and records in demo_plain.json instead of demo.json.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import quiet
import render_readme

from actstore.bench import machine

HERE = Path(__file__).parent
PLAIN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def main() -> None:
    plain = "--plain" in sys.argv[1:]
    os.environ.update(PLAIN if plain else {})
    with tempfile.TemporaryDirectory() as scratch, quiet.cores():
        file = Path(scratch) / "figures.json"
        command = ["actstore", "demo", "--out", f"{scratch}/demo", "--json", str(file)]
        subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)
        figures = json.loads(file.read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record = {
        "command": "python benchmarks/record_demo.py" + " --plain" * plain,
        "figures": figures,
        "largest_process_bytes": peak,
        "machine": machine(),
    }
    (HERE / ("demo_plain.json" if plain else "demo.json")).write_text(json.dumps(record, indent=1) + "\n")
    render_readme.main()


if __name__ == "__main__":
    main()
