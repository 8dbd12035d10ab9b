"""Train a SAELens SAE on one site of a store.

python examples/train_saelens.py URL --site resid_post.12 [--checkpoints DIR] [--resume DIR/4096]
"""

import argparse
import sys

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import actstore
from actstore.stream.adapters import endless, load_state, scaling_factor, state_saver


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--site", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--checkpoints", help="folder for a checkpoint half-way")
    parser.add_argument("--resume", help="folder of a checkpoint")
    args = parser.parse_args()
    torch.manual_seed(0)

    data = actstore.ActivationDataset(args.url, sites=args.site, batch_size=args.batch_size, dtype="float32")
    d = data.store.sites[args.site].d
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=d, d_sae=4 * d, k=16, normalize_activations="expected_average_only_in")
    )
    trainer = Recorded(
        SAETrainerConfig(
            total_training_samples=args.steps * args.batch_size,
            train_batch_size_samples=args.batch_size,
            lr=2e-3,
            lr_end=2e-4,  # asserted, though only schedules that decay use it
            n_checkpoints=1 if args.checkpoints else 0,
            checkpoint_path=args.checkpoints,
        ),
        sae,
        data_provider=endless(data),
        save_checkpoint_fn=state_saver(data),
    )
    trainer.activation_scaler.scaling_factor = scaling_factor(data)  # or 1000 batches go into an estimate
    if args.resume:
        trainer.load_trainer_state(args.resume)
        sae.load_weights_from_checkpoint(args.resume)
        load_state(data, args.resume)
    trainer.fit()
    print(f"loss first {trainer.losses[0]:.5f} last {trainer.losses[-1]:.5f}")
    return 0 if trainer.losses[-1] < trainer.losses[0] else 1


class Recorded(SAETrainer):
    """Keeps the loss of each step, which SAELens reports to wandb only."""

    def step(self, batch):  # noqa: ANN001, ANN201
        """One step on a batch [B, d]."""
        self.losses = getattr(self, "losses", [])
        out = super().step(batch)
        self.losses.append(out.loss.item())
        return out


if __name__ == "__main__":
    sys.exit(main())
