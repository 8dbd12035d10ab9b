"""Run `actstore demo` afresh and record its figures for the README: python benchmarks/record_demo.py [--plain].

--plain emulates a processor without AVX-512 and AMX, and records in demo_plain.json instead of demo.json. The README's
table is then written anew from both.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from record import HERE, commit, cores

from actstore.bench import machine

PLAIN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ROWS = """| activations stored | {rows:,} of `resid_post.3`, {megabytes:.0f} MB |
| compression, lossless, everything counted | {ratio:.3g} to bfloat16 |
| L0 | {l0:.3g} |
| FVU | {fvu:.3g} |
| delta loss | {delta_loss:.3g} nats per token |
| loss recovered | {loss_recovered:.3g} |
| dead latents | {dead_fraction:.1%} |
| time on 2 cores with bfloat16 products ({processor}) | {seconds:.0f} s |
| time on 2 cores without AVX-512 and AMX (emulated) | {plain_seconds:.0f} s |
"""


def main() -> None:
    plain = "--plain" in sys.argv[1:]
    os.environ.update(PLAIN if plain else {})
    with tempfile.TemporaryDirectory() as scratch, cores():
        file = Path(scratch) / "figures.json"
        command = [
            str(Path(sys.executable).parent / "actstore"),
            "demo",
            "--out",
            f"{scratch}/demo",
            "--json",
            str(file),
        ]
        subprocess.run(command, check=True)
        figures = json.loads(file.read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    known = {
        "command": "python benchmarks/record_demo.py" + " --plain" * plain,
        "figures": figures,
        "largest_process_bytes": peak,
        "machine": machine(),
        "commit": commit(),
    }
    (HERE / ("demo_plain.json" if plain else "demo.json")).write_text(json.dumps(known, indent=1) + "\n")
    render()


def render() -> None:
    """Write the figures of both records into the README's table."""
    record, plain = (json.loads((HERE / name).read_text()) for name in ("demo.json", "demo_plain.json"))
    figures = record["figures"] | {"plain_seconds": plain["figures"]["seconds"]}
    processor = record["machine"]["processor"]
    rows = ROWS.format(megabytes=figures["bytes_stored"] / 1e6, processor=processor, **figures)
    readme = HERE.parent / "README.md"
    table = re.compile(r"\| activations stored .*?(?:\| time on 2 cores [^\n]*\n)+", re.DOTALL)
    text, found = table.subn(lambda _: rows, readme.read_text())
    if found != 1:
        raise SystemExit("README.md has no table of the demo's figures")
    readme.write_text(text)


if __name__ == "__main__":
    main()
