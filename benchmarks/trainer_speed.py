"""The trainer's step on a CPU against its matrix products: python benchmarks/trainer_speed.py [--rounds N] [--peer].

d = 576, width 4,608, batch 4,096, about 38 active latents of a JumpReLU and 38 by construction of the others. In each
round everything runs once: the five products of a step alone (x W_enc, f W_dec, r W_dec^T, f^T r, x^T dz) in float32
and in bfloat16, then a whole step (gradients, clipping, projection, Adam, renormalisation) of every architecture in
both; JumpReLU's also by its dense path alone. --peer adds the JumpReLU trainers of SAELens and dictionary_learning, in
their environments below .peers/ (`make test-peers`), in float32 and with autocast, on the same batch. Ratios are taken
within rounds; medians are reported. Writes trainer_speed.json.

On a machine that others use: setsid -w sh -c 'echo -20 > /proc/self/autogroup; exec nice -n -20 "$@"' sh python ...
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
D, W, B = 576, 4608, 4096
COMPUTE = ("float32", "bfloat16")
ARCHITECTURES = ("jumprelu", "topk", "batchtopk", "gated")
PEERS = ("saelens", "dictionary_learning")


def batch() -> torch.Tensor:
    """Rows with E||x||^2 = 1."""
    return torch.randn(B, D, generator=torch.Generator().manual_seed(0)) / D**0.5


def products(dtype: torch.dtype) -> Callable[[], object]:
    x, r, f, W_enc = (torch.randn(*shape).to(dtype) for shape in ((B, D), (B, D), (B, W), (D, W)))
    W_dec = W_enc.T.contiguous()
    return lambda: (x @ W_enc, f @ W_dec, r @ W_dec.T, f.T @ r, x.T @ f)


def ours(architecture: Any, compute: Any) -> Callable[[], object]:
    from trainer.optim import second_moments, update
    from trainer.recipe import SHORT
    from trainer.sae import init_sae

    change = {"architecture": architecture, "compute": compute, "init_b_dec_to_mean": False}
    recipe = dataclasses.replace(SHORT, **change, threshold_init=0.1, k=38, target_l0=38.0)
    sae, x, dead = init_sae(D, W, recipe), batch(), torch.zeros(W, dtype=torch.bool)
    moments, steps = second_moments(sae), iter(range(1 << 30))

    def step() -> None:
        gradients, _ = sae.loss_and_gradients(x, 0.03, dead)
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
    command = [str(python), __file__, "--serve", name, "--compute", compute]
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

    config = JumpReLUTrainingSAEConfig(d_in=D, d_sae=W, l0_coefficient=0.03, jumprelu_init_threshold=0.1)
    sae, x = JumpReLUTrainingSAE(config), batch()
    total = SAETrainerConfig(
        total_training_samples=B << 20, train_batch_size_samples=B, lr=1e-4, lr_end=1e-5, autocast=compute == "bfloat16"
    )
    trainer = SAETrainer(total, sae, data_provider=iter([]))
    return lambda: trainer.step(x)


def dictionary_learning(compute: str) -> Callable[[], object]:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    steps, x = iter(range(1 << 30)), batch()
    how: dict[str, Any] = {"steps": 1 << 20, "layer": 0, "lm_name": "none", "seed": 0, "lr": 1e-4, "warmup_steps": 0}
    trainer = JumpReluTrainer(activation_dim=D, dict_size=W, bandwidth=0.03, target_l0=38.0, **how)
    trainer.ae.threshold.data.fill_(0.1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            trainer.update(next(steps), x)

    return step


def serve(step: Callable[[], object]) -> None:
    """Run one step for each line, and print its seconds."""
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    inside = work()
    return inside if isinstance(inside, float) else time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--only", default=",".join(ARCHITECTURES))
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--compute", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve({"saelens": saelens, "dictionary_learning": dictionary_learning}[args.serve](args.compute))
        return
    work = {f"products {c}": products(getattr(torch, c)) for c in COMPUTE}
    work |= {f"{a} {c}": ours(a, c) for a in args.only.split(",") for c in COMPUTE}
    work |= {f"jumprelu dense {c}": dense(work[f"jumprelu {c}"]) for c in COMPUTE}
    if args.peer:
        work |= {f"{name} {c}": peer(name, c) for name in PEERS for c in COMPUTE}
    for run in work.values():
        timed(run)
    rounds = [{name: timed(run) for name, run in work.items()} for _ in range(args.rounds)]
    path = HERE / "trainer_speed.json"
    known = json.loads(path.read_text())["steps"] if path.exists() else {}
    for name in work:
        seconds = [r[name] for r in rounds]
        known[name] = {
            "seconds": statistics.median(seconds),
            "all": seconds,
            "over float32 products": statistics.median(r[name] / r["products float32"] for r in rounds),
        }
        for other in PEERS if args.peer else ():
            ratio = statistics.median(r[f"{other} float32"] / r[name] for r in rounds)
            known[name][f"{other} float32 over this"] = ratio
        line = [f"{k} {v:.3f}" for k, v in known[name].items() if k != "all"]
        print(f"{name:20}", "  ".join(line))
    about = {"d_model": D, "d_sae": W, "batch": B, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps({**about, "steps": known}, indent=2) + "\n")


if __name__ == "__main__":
    main()
