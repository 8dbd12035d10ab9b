"""Train a llamascopium SAE on one site of a store.

python examples/train_llamascopium.py URL --site resid_post.12 --hook blocks.12.hook_resid_post
"""

import argparse
import math
import sys
import tempfile

import torch
from llamascopium import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig

import actstore
from actstore.stream.adapters import token_batches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--site", required=True)
    parser.add_argument("--hook", default="hook_resid_post", help="llamascopium's name of the site")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="folder for checkpoints")
    args = parser.parse_args()
    torch.manual_seed(0)

    data = actstore.ActivationDataset(
        args.url, sites=args.site, batch_size=args.batch_size, dtype="float32", with_rows=True
    )
    stream = token_batches(data, names={args.site: args.hook})
    stats = data.store.stats(args.site)
    sae = Initializer(InitializerConfig(grid_search_init_norm=True)).initialize_sae_from_config(
        SAEConfig(
            hook_point_in=args.hook,
            hook_point_out=args.hook,
            d_model=len(stats.mean),
            expansion_factor=4,
            act_fn="topk",
            top_k=16,
            device=args.device,
        ),
        activation_stream=stream,
        activation_norm={args.hook: math.sqrt(stats.mean_sq_norm)},  # or 8 batches go into an estimate
    )
    x = sae.normalize_activations(next(iter(stream)))[args.hook]  # looked at, not used up
    first = error(sae, x)
    Trainer(
        TrainerConfig(
            total_training_tokens=args.steps * args.batch_size,
            lr=2e-3,
            lr_warm_up_steps=1,  # divides by it
            k_warmup_steps=0,
            l1_coefficient=None,
            n_checkpoints=0,
            exp_result_path=args.out or tempfile.mkdtemp(),
        )
    ).fit(sae, stream)
    last = error(sae, x)
    print(f"loss first {first:.5f} last {last:.5f}")
    return 0 if last < first else 1


@torch.no_grad()
def error(sae: torch.nn.Module, x: torch.Tensor) -> float:
    """Fraction of the variance of x [B, d] that the SAE leaves unexplained."""
    return ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


if __name__ == "__main__":
    sys.exit(main())
