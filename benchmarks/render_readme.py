"""Write the demo's figures (benchmarks/demo.json) into the README's table; record_demo.py calls it."""

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
| time on 2 cores | {seconds:.0f} s |
"""


def main() -> None:
    figures = json.loads((HERE / "demo.json").read_text())["figures"]
    rows = ROWS.format(megabytes=figures["bytes_stored"] / 1e6, **figures)
    readme = HERE.parent / "README.md"
    table = re.compile(r"\| activations stored .*?\| time on 2 cores [^\n]*\n", re.DOTALL)
    text, found = table.subn(rows, readme.read_text())
    if found != 1:
        raise SystemExit("README.md has no table of the demo's figures")
    readme.write_text(text)


if __name__ == "__main__":
    main()
