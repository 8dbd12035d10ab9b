"""Train a SAELens SAE on each of several sites at once, on one stream of row-aligned batches.

python examples/train_saelens_multi.py URL --sites resid_post.12 mlp_out.12
"""

import argparse
import sys

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

import actstore
from actstore.stream.adapters import endless, scaling_factor, state_saver


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    args = parser.parse_args()
    torch.manual_seed(0)

    settings = {"sites": args.sites, "batch_size": args.batch_size, "dtype": "float32"}
    data = actstore.ActivationDataset(args.url, **settings)
    saes = {}
    for site in args.sites:
        d = data.store.sites[site].d
        config = TopKTrainingSAEConfig(d_in=d, d_sae=4 * d, k=16, normalize_activations="expected_average_only_in")
        saes[site] = TopKTrainingSAE(config)
    trainer = MultiSAETrainer(
        SAETrainerConfig(
            total_training_samples=args.steps * args.batch_size,
            train_batch_size_samples=args.batch_size,
            lr=2e-3,
            lr_end=2e-4,  # asserted, though only schedules that decay use it
        ),
        saes,
        hook_names={site: site for site in args.sites},
        data_provider=endless(data),
        save_checkpoint_fn=state_saver(data),
    )
    for site in args.sites:
        trainer.trainers[site].activation_scaler.scaling_factor = scaling_factor(data, site)

    x = next(iter(actstore.ActivationDataset(args.url, **settings, seed=1)))
    first = {site: error(saes[site], x[site] * scaling_factor(data, site)) for site in args.sites}
    trainer.fit()  # folds the scaling factor into the weights
    last = {site: error(saes[site], x[site]) for site in args.sites}
    for site in args.sites:
        print(f"{site}: loss first {first[site]:.5f} last {last[site]:.5f}")
    return 0 if all(last[site] < first[site] for site in args.sites) else 1


@torch.no_grad()
def error(sae: TopKTrainingSAE, x: torch.Tensor) -> float:
    """Fraction of the variance of x [B, d] that the SAE leaves unexplained."""
    return ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


if __name__ == "__main__":
    sys.exit(main())
