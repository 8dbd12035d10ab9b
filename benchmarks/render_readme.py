"""Write the demo's figures (benchmarks/demo.json, demo_plain.json) into the README's table; record_demo.py calls it."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
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
    record, plain = (json.loads((HERE / name).read_text()) for name in ("demo.json", "demo_plain.json"))
    figures = record["figures"] | {"plain_seconds": plain["figures"]["seconds"]}
    processor = record["machine"]["processor"]
    rows = ROWS.format(megabytes=figures["bytes_stored"] / 1e6, processor=processor, **figures)
    readme = HERE.parent / "README.md"
    table = re.compile(r"\| activations stored .*?(?:\| time on 2 cores [^\n]*\n)+", re.DOTALL)
    text, found = table.subn(rows, readme.read_text())
    if found != 1:
        raise SystemExit("README.md has no table of the demo's figures")
    readme.write_text(text)


if __name__ == "__main__":
    main()
