"""Which architecture recovers known features: python benchmarks/trainer_synthetic.py [--seeds N] [--steps N] [--fast].

A world of 512 features in 64 dimensions (`tests/synthetic.py`, after SynthSAEBench), SAEs of width 128, which is the
quarter of the features that fire most, at the L0 that those have. Each seed is a world and initial weights of its own.
F1, MCC and FVU are over 20,000 held-out activations, in trainer_synthetic.json as means and standard errors. --fast is
the smaller world of the test.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import synthetic  # noqa: E402  the tests' world

from trainer.recipe import SHORT  # noqa: E402
from trainer.sae import init_sae  # noqa: E402
from trainer.train import train  # noqa: E402


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed, args.steps, fast=args.fast) for seed in range(args.seeds)]
    table: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        table[name] = {}
        for figure in runs[0][name]:
            values = [r[name][figure] for r in runs]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            table[name][figure] = {"mean": statistics.mean(values), "standard error": error}
    about = {"seeds": args.seeds, "steps": args.steps, "world": "fast" if args.fast else "full"}
    (HERE / "trainer_synthetic.json").write_text(json.dumps({**about, "architectures": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
