"""Does compressing the store cost SAEs anything? python benchmarks/compression.py --model GGUF --dir DIR.

After `benchmarks/frontier.py` in the same DIR, whose tokens it takes. SmolLM2-135M in float32, resid_post.15: 262,144
rows are captured as f32 and copied (`actstore cp`) as bf16, fixed:1e-3 and fixed:4e-3. The same rows in the same order,
three epochs, the same five seeds: SAEs of 2,304 latents, preset `short`, evaluated by splicing into the model on
held-out text, whose activations are never stored. Reported: means over seeds, and of the differences to f32 of the
same seed, with 95% intervals (Student's t). Writes compression.json and compression.md. Run again to go on; --record
only writes.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from frontier import HERE, SITE, run

from actstore.bench import machine
from actstore.console import figure

ENCODINGS = {"f32": "f32", "bf16": "bf16", "fixed-1e-3": "fixed:1e-3", "fixed-4e-3": "fixed:4e-3"}
ROWS, EPOCHS, BATCH, WIDTH, SEEDS = 262_144, 3, 512, 2304, range(5)
MEASURES = ("l0", "fvu", "delta_loss")
T = 2.776
"""Student's t for a 95% interval of five values."""


def make(out: Path, model: Path, sequences: int) -> None:
    where = ["--model", model, "--tokens", out / "tokens", "--sites", SITE, "--out", out / "compression/f32"]
    run(
        "actstore",
        "capture",
        *where,
        "--dtype",
        "float32",
        "--encoding",
        "f32",
        "--rows",
        ROWS,
        "--bucket-rows",
        1 << 16,
    )
    for name, encoding in ENCODINGS.items():
        folder = out / "compression" / name
        if name != "f32":
            run("actstore", "cp", out / "compression/f32", folder, "--encoding", encoding)
        run("actstore", "info", folder, "--json", out / f"compression/{name}.json")
        what = ["--store", folder, "--sites", SITE, "--widths", WIDTH, "--seeds", *SEEDS]
        how = ["--preset", "short", "--steps", EPOCHS * ROWS // BATCH, "--checkpoint-every", 500, "--keep", 1]
        run("trainer", "sweep", *what, *how, "--out", out / "compression/saes" / name)
    what = ["--sae", out / "compression/saes", "--tokens", out / "heldout-text", "--model", model]
    run("trainer", "eval", *what, "--sequences", sequences, "--out", out / "compression/evaluation")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    return statistics.mean(values), T * statistics.stdev(values) / math.sqrt(len(values))


def record(out: Path) -> None:
    rows = json.loads((out / "compression/evaluation/frontier.json").read_text())["evaluations"]
    found: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MEASURES} for name in ENCODINGS}
    for row in sorted(rows, key=lambda row: row["name"]):
        for measure in MEASURES:
            found[row["name"].split("/")[0]][measure].append(row[measure])
    figures: dict[str, Any] = {}
    for name, measures in found.items():
        info = json.loads((out / f"compression/{name}.json").read_text())
        figures[name] = {"bytes_per_value": info["bytes_stored"] / (info["rows"] * info["sites"][SITE]["d"])}
        for measure, values in measures.items():
            change = [a - b for a, b in zip(values, found["f32"][measure], strict=True)]
            figures[name][measure] = {"seeds": values, "mean": interval(values), "minus_f32": interval(change)}
    about = {
        "command": "python benchmarks/compression.py --model GGUF --dir DIR",
        "rows": ROWS,
        "epochs": EPOCHS,
        "d_sae": WIDTH,
    }
    about |= {"tokens": rows[0]["tokens"], "figures": figures, "machine": machine()}
    (HERE / "compression.json").write_text(json.dumps(about, indent=1) + "\n")
    lines = [
        "# What compression costs",
        "",
        f"`{about['command']}`; its docstring says what was done. Do not edit.",
        "",
    ]
    lines += ["Mean of five seeds; in brackets the difference to f32 of the same seed, with its 95% interval.", ""]
    lines += ["| stored as | bytes a value | L0 | FVU | delta loss |", "|---|---|---|---|---|"]
    for name, f in figures.items():
        cells = [f"{f['bytes_per_value']:.2f}"]
        for measure in MEASURES:
            (mean, _), (change, half) = f[measure]["mean"], f[measure]["minus_f32"]
            cells.append(figure(mean) if name == "f32" else f"{figure(mean)} ({change:+.2g} ± {half:.2g})")
        lines.append(f"| {ENCODINGS[name]} | {' | '.join(cells)} |")
    lines += ["", ", ".join(f"{k} {v}" for k, v in machine().items()), ""]
    (HERE / "compression.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if not args.record:
        make(args.dir, args.model, args.sequences)
    record(args.dir)


if __name__ == "__main__":
    main()
