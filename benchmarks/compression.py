"""Does compressing the store cost SAEs anything? python benchmarks/compression.py --model GGUF --dir DIR.

After `benchmarks/frontier.py` in the same DIR, whose tokens it takes. SmolLM2-135M in float32, resid_post.15: 262,144
rows are captured as f32 and copied (`actstore cp`) as bf16, fixed:1e-3 and fixed:4e-3. The same rows in the same order,
three epochs, the same five seeds: SAEs of 2,304 latents, preset `short`, evaluated by splicing into the model on
held-out text, whose activations are never stored. Run again to go on; without --model it only records.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import record
from frontier import SITE, run
from record import Row

ENCODINGS = {"f32": "f32", "bf16": "bf16", "fixed-1e-3": "fixed:1e-3", "fixed-4e-3": "fixed:4e-3"}
ROWS, EPOCHS, BATCH, WIDTH, SEEDS = 262_144, 3, 512, 2304, range(5)
MEASURES = ("l0", "fvu", "delta_loss")
T = 2.776
"""Student's t for a 95% interval of five values."""


def make(out: Path, model: Path, sequences: int) -> None:
    where = ["--model", model, "--tokens", out / "tokens", "--sites", SITE, "--out", out / "compression/f32"]
    how = ["--dtype", "float32", "--encoding", "f32", "--rows", ROWS, "--bucket-rows", 1 << 16]
    run("actstore", "capture", *where, *how)
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


def encodings(args: argparse.Namespace) -> list[Row]:
    """Means of five seeds. "over f32" is the mean difference to f32 of the same seed, "±" half its 95% interval."""
    if args.model:
        make(args.dir, args.model, args.sequences)
    evaluations = json.loads((args.dir / "compression/evaluation/frontier.json").read_text())["evaluations"]
    found: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MEASURES} for name in ENCODINGS}
    for row in sorted(evaluations, key=lambda row: row["name"]):
        for measure in MEASURES:
            found[row["name"].split("/")[0]][measure].append(row[measure])
    rows: list[Row] = []
    for name, measures in found.items():
        info = json.loads((args.dir / f"compression/{name}.json").read_text())
        line: Row = {"stored as": ENCODINGS[name], "rows": ROWS, "epochs": EPOCHS, "d_sae": WIDTH}
        line["bytes a value"] = info["bytes_stored"] / (info["rows"] * info["sites"][SITE]["d"])
        for measure, values in measures.items():
            change = [a - b for a, b in zip(values, found["f32"][measure], strict=True)]
            line |= {measure: statistics.mean(values), f"{measure} over f32": statistics.mean(change)}
            line[f"{measure} ±"] = T * statistics.stdev(change) / math.sqrt(len(change))
            line[f"{measure} of each seed"] = values
        rows.append(line)
    return rows


if __name__ == "__main__":
    arguments = record.parser(__doc__)
    arguments.add_argument("--model", type=Path, help="default: record what is in --dir")
    arguments.add_argument("--sequences", type=int, default=16)
    record.main(__file__, {"encodings": encodings}, arguments, daemons=True)
