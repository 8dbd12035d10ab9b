"""The trainer's step against its matrix products: python benchmarks/trainer_speed.py [--rounds N] [--peer].

d = 576, width 4,608, batch 4,096, about 38 active latents of a JumpReLU and 38 by construction of the others. In each
round everything runs once: the five products of a step alone (x W_enc, f W_dec, r W_dec^T, f^T r, x^T dz) in float32
and in bfloat16, then a whole step (gradients, clipping, projection, Adam, renormalisation) of every architecture in
both; JumpReLU's also by its dense path alone. --peer adds the JumpReLU trainers of SAELens and dictionary_learning, in
their environments below .peers/ (`make test-peers`), in float32 and with autocast, on the same batch. Ratios are taken
within rounds; medians are reported.

On a GPU (not run yet): --device cuda --architectures jumprelu --shape 2304 16384 4096, and the same with 65536.
JumpReLU's step is then also taken with Triton's kernels, and apart, gradients and update. TFLOP/s are 10 d w a token
over the seconds, which for a sparse step is more than it does.

On a machine that others use: setsid -w sh -c 'echo -20 > /proc/self/autogroup; exec nice -n -20 "$@"' sh python ...
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
Row = dict[str, Any]
D, W, B = 576, 4608, 4096
DEVICE = "cpu"
COMPUTE = ("float32", "bfloat16")
ARCHITECTURES = ("jumprelu", "topk", "batchtopk", "gated")
PEERS = ("saelens", "dictionary_learning")


def batch() -> torch.Tensor:
    """Rows with E||x||^2 = 1."""
    return torch.randn(B, D, generator=torch.Generator().manual_seed(0)).to(DEVICE) / D**0.5


def products(dtype: torch.dtype) -> Callable[[], object]:
    x, r, f, W_enc = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((B, D), (B, D), (B, W), (D, W)))
    W_dec = W_enc.T.contiguous()
    return lambda: (x @ W_enc, f @ W_dec, r @ W_dec.T, f.T @ r, x.T @ f)


def ours(architecture: Any, compute: Any, kernels: Any = "torch", part: str = "step") -> Callable[[], object]:
    """A whole step, or the gradients or the update alone."""
    from trainer.optim import second_moments, update
    from trainer.recipe import SHORT
    from trainer.sae import init_sae

    change = {"architecture": architecture, "compute": compute, "kernels": kernels, "init_b_dec_to_mean": False}
    recipe = dataclasses.replace(SHORT, **change, threshold_init=0.1, k=38, target_l0=38.0)
    sae, x = init_sae(D, W, recipe, device=DEVICE), batch()
    moments, steps, dead = second_moments(sae), iter(range(1 << 30)), torch.zeros(W, dtype=torch.bool, device=DEVICE)
    fixed = sae.loss_and_gradients(x, 0.03, dead)[0] if part == "update" else {}

    def step() -> None:
        gradients = dict(fixed) if part == "update" else sae.loss_and_gradients(x, 0.03, dead)[0]
        if part != "gradients":
            update(sae, gradients, moments, step=next(steps), rate=1e-4, recipe=recipe)

    return step


def dense(step: Callable[[], object]) -> Callable[[], object]:
    """A step of ours without the sparse path."""
    from trainer import sparse

    def run() -> None:
        before, sparse.LEAST_LATENTS = sparse.LEAST_LATENTS, 1 << 60
        step()
        sparse.LEAST_LATENTS = before

    return run


def peer(name: str, compute: str) -> Callable[[], object]:
    """A step of another trainer in a process of its own, which waits for a line before each."""
    python = HERE.parent / ".peers" / name / "bin" / "python"
    command = [str(python), __file__, "--serve", name, compute, *map(str, (D, W, B)), DEVICE]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step() -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    return step


def saelens(compute: str) -> Callable[[], object]:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    sizes: dict[str, Any] = {"d_in": D, "d_sae": W, "device": DEVICE}
    config = JumpReLUTrainingSAEConfig(l0_coefficient=0.03, jumprelu_init_threshold=0.1, **sizes)
    sae, x = JumpReLUTrainingSAE(config), batch()
    rates: dict[str, Any] = {"lr": 1e-4, "lr_end": 1e-5, "autocast": compute == "bfloat16", "device": DEVICE}
    total = SAETrainerConfig(total_training_samples=B << 20, train_batch_size_samples=B, **rates)
    trainer = SAETrainer(total, sae, data_provider=iter([]))
    return lambda: trainer.step(x)


def dictionary_learning(compute: str) -> Callable[[], object]:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    steps, x = iter(range(1 << 30)), batch()
    how: dict[str, Any] = {"steps": 1 << 20, "layer": 0, "lm_name": "none", "seed": 0, "lr": 1e-4, "warmup_steps": 0}
    how["device"] = DEVICE
    trainer = JumpReluTrainer(activation_dim=D, dict_size=W, bandwidth=0.03, target_l0=38.0, **how)
    trainer.ae.threshold.data.fill_(0.1)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=compute == "bfloat16"):
            trainer.update(next(steps), x)

    return step


def serve(step: Callable[[], object]) -> None:
    """Run one step for each line, and print its seconds."""
    for _ in sys.stdin:
        print(timed(step), flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds; what a worker measured itself counts."""
    began = time.perf_counter()
    inside = work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return inside if isinstance(inside, float) else time.perf_counter() - began


def steps(args: argparse.Namespace) -> list[Row]:
    """Each runs once in a round. Products are those of a step alone; a "dense" step is ours without the sparse path."""
    shape = (64, 512, 256) if args.quick else args.shape
    globals().update(DEVICE=args.device, **dict(zip("DWB", shape, strict=True)))
    work = jobs(args.architectures, peers=args.peer)
    found = [{name: timed(run) for name, run in work.items()} for _ in range(args.rounds + 1)][1:]
    rows: list[Row] = []
    for name in work:
        row: Row = {"d": D, "d_sae": W, "batch": B, "threads": torch.get_num_threads(), "step": name}
        row["seconds"] = statistics.median(r[name] for r in found)
        row["over float32 products"] = statistics.median(r[name] / r["products float32"] for r in found)
        if DEVICE == "cuda":
            row["TFLOP/s"] = 1e-12 * 10 * D * W * B / row["seconds"]
        for other in PEERS if args.peer else ():
            row[f"{other} float32 over this"] = statistics.median(r[f"{other} float32"] / r[name] for r in found)
        rows.append(row)
    return rows


def jobs(architectures: list[str], *, peers: bool) -> dict[str, Callable[[], object]]:
    work = {f"products {c}": products(getattr(torch, c)) for c in COMPUTE}
    work |= {f"{a} {c}": ours(a, c) for a in architectures for c in COMPUTE}
    if DEVICE == "cpu":
        work |= {f"jumprelu dense {c}": dense(ours("jumprelu", c)) for c in COMPUTE}
    else:
        work |= {f"jumprelu triton {c}": ours("jumprelu", c, "triton") for c in COMPUTE}
        parts = [(kernels, part) for kernels in ("torch", "triton") for part in ("gradients", "update")]
        work |= {f"{part} {k} bfloat16": ours("jumprelu", "bfloat16", k, part) for k, part in parts}
    return work | {f"{name} {c}": peer(name, c) for name in PEERS if peers for c in COMPUTE}


def main() -> None:
    if "--serve" in sys.argv[1:2]:
        name, compute, *shape, device = sys.argv[2:]
        globals().update(DEVICE=device, **dict(zip("DWB", map(int, shape), strict=True)))
        serve({"saelens": saelens, "dictionary_learning": dictionary_learning}[name](compute))
        return
    import record

    arguments = record.parser(__doc__)
    arguments.add_argument("--peer", action="store_true")
    arguments.add_argument("--architectures", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--shape", type=int, nargs=3, metavar=("D", "W", "B"), default=(D, W, B))
    record.main(__file__, {"steps": steps}, arguments)


if __name__ == "__main__":
    main()
