"""Which architecture recovers known features: python benchmarks/trainer_synthetic.py [--seeds N] [--steps N].

A world of 512 features in 64 dimensions (`tests/synthetic.py`, after SynthSAEBench), SAEs of width 128, which is the
quarter of the features that fire most, at the L0 that those have. Each seed is a world and initial weights of its own.
F1, MCC and FVU are over 20,000 held-out activations.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import record
import torch
from record import HERE, Row

sys.path.insert(0, str(HERE.parent / "tests"))
import synthetic

from trainer.recipe import SHORT
from trainer.sae import init_sae
from trainer.train import train


def batches(x: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield x[torch.randint(len(x), (size,), generator=rng)]


def run(seed: int, steps: int, *, fast: bool) -> dict[str, dict[str, float]]:
    features, d, width, l0, roots, rows, size = (
        (256, 48, 64, 12.0, 6, 50_000, 256) if fast else (512, 64, 128, 16.0, 12, 200_000, 512)
    )
    world = synthetic.world(features, d, l0=l0, roots=roots, seed=seed)
    (x, _), (held_out, fires) = world.draw(rows, 2 * seed + 1), world.draw(20_000, 2 * seed + 2)
    k = round(float(fires[:, :width].sum(1).double().mean()))
    scale, variance = float(x.square().sum(1).mean().sqrt()), (held_out - held_out.mean(0)).square().sum()
    jumprelu = {"target_l0": float(k), "sparsity_coefficient": 2.0}
    changes: dict[str, dict[str, Any]] = {
        "jumprelu": jumprelu,
        "jumprelu, matryoshka": {**jumprelu, "prefixes": 3},
        "batchtopk": {"architecture": "batchtopk"},
        "batchtopk, matryoshka": {"architecture": "batchtopk", "prefixes": 3},
        "topk": {"architecture": "topk"},
    }
    changes |= {f"gated, {c}": {"architecture": "gated", "sparsity_coefficient": c} for c in (0.4, 0.5, 0.6)}
    found: dict[str, dict[str, float]] = {}
    for name, change in changes.items():
        began = time.perf_counter()
        common = {"target_l0": None, "aux_k": width // 4, "k": k, "batch_size": size}
        recipe = dataclasses.replace(SHORT, **{**common, **change})
        sae = init_sae(d, width, recipe, seed=seed, mean=(x / scale).mean(0))
        train(sae, batches(x, size, seed), steps=steps, scale=scale)
        f = sae.encode(held_out / scale)
        figures = synthetic.scores(f, sae.W_dec, fires, world.features)
        figures["fvu"] = float((sae.decode(f) * scale - held_out).square().sum() / variance)
        found[name] = {**figures, "true l0": float(k), "seconds": time.perf_counter() - began}
        print(seed, f"{name:22}", "  ".join(f"{key} {value:.4f}" for key, value in found[name].items()), flush=True)
    return found


def architectures(args: argparse.Namespace) -> list[Row]:
    """Means over seeds, with standard errors. `true l0` is the L0 of the features that the SAE has room for."""
    torch.set_num_threads(1)
    steps = 20 if args.quick else args.steps
    runs = [run(seed, steps, fast=args.fast or args.quick) for seed in range(1 if args.quick else args.seeds)]
    table: list[Row] = []
    for name in runs[0]:
        row: Row = {"architecture": name, "seeds": len(runs), "steps": steps}
        for measure in runs[0][name]:
            values = [r[name][measure] for r in runs]
            row[measure] = statistics.mean(values)
            if len(values) > 1:
                row[f"{measure} ±"] = statistics.stdev(values) / math.sqrt(len(values))
        table.append(row)
    return table


if __name__ == "__main__":
    arguments = record.parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=4000)
    arguments.add_argument("--fast", action="store_true", help="the smaller world of the test")
    record.main(__file__, {"architectures": architectures}, arguments)
