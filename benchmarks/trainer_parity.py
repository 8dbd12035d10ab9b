"""Does the trainer end where SAELens' does? python benchmarks/trainer_parity.py STORE --site SITE [--steps N].

The same rows of a store in the same order, the same initial weights and the same constants: SAELens' JumpReLU trainer
in float32 and with autocast (in its environment below .peers/, see `make test-peers`), ours in float32 and bfloat16.
Its recipe in our words: E||x||^2 = d_model, free decoder rows, thresholds trained directly, no ReLU before the jump,
beta1 0.9, clipping at 1, a constant price. FVU and L0 are measured on rows after those trained on, in float64.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
PEER = Path(__file__).parent.parent / ".peers" / "saelens" / "bin" / "python"
LR, BANDWIDTH, THRESHOLD = 1e-3, 0.5, 0.1
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def batches(data: np.ndarray, batch: int, steps: int) -> Iterator[torch.Tensor]:
    for step in range(steps):
        start = step * batch % (len(data) - batch + 1)
        yield torch.from_numpy(data[start : start + batch])


def serve(folder: Path, args: argparse.Namespace) -> None:
    """SAELens' side: its initial weights to start.npz, and what it ends with to float32.npz and bfloat16.npz."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    data = np.load(folder / "train.npy", mmap_mode="c")
    for compute in ("float32", "bfloat16"):
        torch.manual_seed(0)
        config = JumpReLUTrainingSAEConfig(
            d_in=data.shape[1],
            d_sae=args.width,
            l0_coefficient=args.price,
            jumprelu_init_threshold=THRESHOLD,
            jumprelu_bandwidth=BANDWIDTH,
            decoder_init_norm=1.0,
        )
        sae = JumpReLUTrainingSAE(config)
        if compute == "float32":
            np.savez(folder / "start.npz", **{name: getattr(sae, name).detach().numpy() for name in NAMES})
        total = SAETrainerConfig(
            total_training_samples=args.batch * args.steps,
            train_batch_size_samples=args.batch,
            lr=LR,
            lr_end=LR,
            autocast=compute == "bfloat16",
        )
        trainer, began = SAETrainer(total, sae, data_provider=iter([])), time.perf_counter()
        for x in batches(data, args.batch, args.steps):
            trainer.step(x)
            trainer.n_training_steps += 1
        found = {name: getattr(sae, name).detach().float().numpy() for name in NAMES}
        np.savez(folder / f"{compute}.npz", **found, seconds=time.perf_counter() - began)


def ours(folder: Path, compute: Any, args: argparse.Namespace) -> dict[str, np.ndarray]:
    from trainer.recipe import Recipe
    from trainer.sae import sae_of
    from trainer.train import train

    recipe = Recipe(
        unit_mean_square=False,
        compute=compute,
        bandwidth=BANDWIDTH,
        lr=LR,
        lr_warmup_steps=0,
        beta1=0.9,
        unit_decoder=False,
        clip_norm=1.0,
        batch_size=args.batch,
        sparsity_coefficient=args.price,
        sparsity_warmup_steps=0,
        log_threshold=False,
        relu_before_jump=False,
    )
    with np.load(folder / "start.npz") as start:
        sae = sae_of(recipe, {name: torch.from_numpy(start[name]).clone() for name in NAMES})
    data, began = np.load(folder / "train.npy", mmap_mode="c"), time.perf_counter()
    train(sae, batches(data, args.batch, args.steps), steps=args.steps, scale=1.0, log_every=args.steps)
    found: dict[str, Any] = {name: getattr(sae, name).numpy() for name in NAMES}
    return {**found, "seconds": np.array(time.perf_counter() - began)}


def measure(params: Any, x: np.ndarray) -> dict[str, float]:
    """FVU and L0 of raw SAELens parameters, b_dec subtracted before the encoder."""
    p, exact = {name: np.asarray(params[name], np.float64) for name in NAMES}, x.astype(np.float64)
    z = (exact - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = z * (z > np.maximum(p["threshold"], 0))
    left = ((exact - f @ p["W_dec"] - p["b_dec"]) ** 2).sum()
    fvu, l0 = left / ((exact - exact.mean(0)) ** 2).sum(), (f != 0).sum(1).mean()
    return {"fvu": float(fvu), "l0": float(l0), "dead": float((~(f != 0).any(0)).mean())}


def prepare(folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Rows divided so that E||x||^2 = d_model: train.npy, and 16,384 more that are returned."""
    import actstore

    with actstore.ActivationDataset(args.store, sites=args.site, batch_size=args.batch, dtype="float32") as data:
        stats = data.store.stats(args.site)
        scale, rows = np.sqrt(stats.mean_sq_norm / len(stats.mean)), []
        for x in data:
            rows.append(x.numpy() / np.float32(scale))
            if len(rows) * args.batch >= args.rows + (1 << 14):
                break
    every = np.concatenate(rows)
    np.save(folder / "train.npy", every[: -(1 << 14)])
    return every[-(1 << 14) :]


def trainers(args: argparse.Namespace) -> list[Row]:
    """FVU, L0 and dead latents on 16,384 rows after those trained on."""
    options = {name: getattr(args, name) for name in ("steps", "batch", "width", "price")}
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        folder = Path(scratch)
        held_out = prepare(folder, args)
        subprocess.run([str(PEER), __file__, "--serve", scratch, json.dumps(options)], check=True)
        params: dict[str, Any] = {f"saelens {c}": dict(np.load(folder / f"{c}.npz")) for c in ("float32", "bfloat16")}
        params |= {f"ours {compute}": ours(folder, compute, args) for compute in ("float32", "bfloat16")}
    rows: list[Row] = [
        {"trainer": name, **options, **measure(p, held_out), "seconds": float(p["seconds"])}
        for name, p in params.items()
    ]
    for row in rows:
        row |= {f"{key} over saelens float32": row[key] / rows[0][key] for key in ("fvu", "l0")}
    return rows


def main() -> None:
    if "--serve" in sys.argv[1:2]:
        serve(Path(sys.argv[2]), argparse.Namespace(**json.loads(sys.argv[3])))
        return
    import record

    arguments = record.parser(__doc__)
    arguments.add_argument("store")
    arguments.add_argument("--site", required=True)
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--batch", type=int, default=1024)
    arguments.add_argument("--width", type=int, default=2304)
    arguments.add_argument("--rows", type=int, default=262_144)
    arguments.add_argument("--price", type=float, default=1.0)
    record.main(__file__, {"trainers": trainers}, arguments)


if __name__ == "__main__":
    main()
