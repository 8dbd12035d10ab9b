"""Wide JumpReLU SAEs on a CPU, the sparse step against the dense: python benchmarks/trainer_sparse.py [--rounds N].

Random rows with E||x||^2 = 1, thresholds at which latents fire as often as Zipf's law with exponent 1/2 says and a
token has 38 on average, Gemma Scope's recipe. In each round every variant does one whole step (gradients, projection,
Adam, renormalisation): dense or sparse, float32 or bfloat16 products, Adam or lazy Adam. Ratios are taken within
rounds, medians are reported, of the clock's seconds and of the processors'. One thread unless --threads says more.

    memory      what a step holds at width 2^20, on paper
    steps       whole steps, with 38 active latents
    gradients   gradients alone, at the L0s of --l0
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import record
import torch
from record import Row

from trainer import parts, sparse
from trainer.fused import Latents
from trainer.optim import second_moments, update
from trainer.recipe import GEMMA_SCOPE
from trainer.sae import JumpReLUSAE, init_sae

SHAPES = ((576, 4608, 4096), (576, 32768, 1024), (256, 131072, 1024))
"""d_model, d_sae, batch."""
L0 = 38
COMPUTE = ("float32", "bfloat16")


def wide(d: int, w: int, l0: float) -> JumpReLUSAE:
    """An SAE whose latents fire on Gaussian rows as often as Zipf's law says, `l0` at a time."""
    sae = init_sae(d, w, dataclasses.replace(GEMMA_SCOPE, lazy_adam=True))
    assert isinstance(sae, JumpReLUSAE)
    rate = torch.arange(1, w + 1, dtype=torch.float64) ** -0.5
    rate = (rate * l0 / rate.sum()).clamp(max=0.4)[torch.randperm(w, generator=torch.Generator().manual_seed(0))]
    sae.threshold.copy_((torch.special.ndtri(1 - rate) * d**-0.5).clamp(min=1e-6).log())
    return sae


@contextmanager
def path(taken: str) -> Iterator[None]:
    """Take the dense path, or the sparse one however many pairs there are."""
    before = sparse.LEAST_LATENTS, sparse.MOST_KEPT
    sparse.LEAST_LATENTS = 1 << 60 if taken == "dense" else 1
    sparse.MOST_KEPT = dict.fromkeys(COMPUTE, 1)
    yield
    sparse.LEAST_LATENTS, sparse.MOST_KEPT = before


def timed(
    sae: JumpReLUSAE, x: torch.Tensor, moments: dict[str, torch.Tensor] | None, step: int, name: str
) -> dict[str, float]:
    """Seconds, on the clock and of all processors, of one step, or of its gradients alone without moments."""
    taken, compute, adam = name.split()
    sae.recipe = dataclasses.replace(sae.recipe, compute=compute, lazy_adam=adam == "lazy")
    with path(taken):
        began, before = time.perf_counter(), time.process_time()
        gradients, _ = sae.loss_and_gradients(x, 1e-3)
        if moments is not None:
            update(sae, gradients, moments, step=step, rate=1e-7, recipe=sae.recipe)
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - before}


def measure(shape: tuple[int, int, int], l0: float, rounds: int, *, whole: bool) -> list[Row]:
    d, w, b = shape
    sae, x = wide(d, w, l0), torch.randn(b, d, generator=torch.Generator().manual_seed(1)) / d**0.5
    adams = ("adam", "lazy") if whole else ("adam",)
    names = [f"{taken} {c} {a}" for c in COMPUTE for taken in ("dense", "sparse") for a in adams]
    moments, seconds = second_moments(sae) if whole else None, []
    for number in range(rounds + 1):
        first = number * len(names)
        seconds.append({n: timed(sae, x, moments, first + i, n) for i, n in enumerate(names)})
    with path("sparse"):
        kept = sparse.pairs(sae, Latents(sae.b_enc, sae.theta, relu=True, half=sae.recipe.bandwidth / 2), x)
    _, found = sae.loss_and_gradients(x, 1e-3)
    assert kept is not None
    rows: list[Row] = []
    for n in names:
        base = f"dense {n.split()[1]} adam"
        row: Row = {"d": d, "d_sae": w, "batch": b, "L0": float(found.l0), "step": n}
        for unit in ("seconds", "cpu"):
            row[unit] = statistics.median(r[n][unit] for r in seconds[1:])
            row[f"dense over this, {unit}"] = statistics.median(r[base][unit] / r[n][unit] for r in seconds[1:])
        row |= {"pairs per token": len(kept.z) / b, "touched latents": float((found.fired > 0).float().mean())}
        rows.append(row)
    return rows


def memory(_args: argparse.Namespace) -> list[Row]:
    """What a step with bfloat16 products holds on paper, in GB, at d = 2304, width 2^20, batch 4,096 and L0 100, if
    every latent fires equally often.
    """
    d, w, batch, l0 = 2304, 1 << 20, 4096, 100
    weights, touched = 2 * d * w, 1 - math.exp(-batch * l0 / w)
    rows = parts.TILE_ELEMENTS * parts.BFLOAT16_TILES // parts.BLOCK
    bytes_of = {
        "parameters, float32": (4 * weights, 4 * weights),
        "second moments": (4 * weights, 4 * weights),
        "bfloat16 copies": (2 * weights, 2 * d * parts.BLOCK),
        "gradients": (4 * weights, 4 * weights * touched),
        "pre-activations, features, slopes": (3 * 2 * rows * w, (2 + 4 + 4) * rows * parts.BLOCK),
    }
    table = {what: {"dense": a / 1e9, "sparse, lazy Adam": b / 1e9} for what, (a, b) in bytes_of.items()}
    whole = {column: sum(line[column] for line in table.values()) for column in ("dense", "sparse, lazy Adam")}
    untiled = {"dense": 2 * batch * w / 1e9, "sparse, lazy Adam": 0.0}
    table |= {"together": whole, "(pre-activations of the whole batch at once would be)": untiled}
    return [{"what": what, **line} for what, line in table.items()]


def steps(args: argparse.Namespace) -> list[Row]:
    """A whole step: gradients, projection, Adam, renormalisation."""
    return _measured(args, (L0,), whole=True)


def gradients(args: argparse.Namespace) -> list[Row]:
    """Gradients alone, at the L0s of `--l0`: where sparse stops to pay."""
    return _measured(args, args.l0, whole=False)


def _measured(args: argparse.Namespace, l0s: Sequence[float], *, whole: bool) -> list[Row]:
    torch.set_num_threads(args.threads)
    shapes = ((64, 1024, 128),) if args.quick else tuple(SHAPES[i] for i in args.shapes)
    return [row for shape in shapes for l0 in l0s for row in measure(shape, l0, args.rounds, whole=whole)]


if __name__ == "__main__":
    arguments = record.parser(__doc__, rounds=3)
    arguments.add_argument("--l0", type=float, nargs="*", default=(38, 100, 200, 400))
    arguments.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)))
    arguments.add_argument("--threads", type=int, default=1)
    record.main(__file__, {"memory": memory, "steps": steps, "gradients": gradients}, arguments)
