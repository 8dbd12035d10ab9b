"""Train a dictionary_learning SAE on one site of a store.

python examples/train_dictionary_learning.py URL --site resid_post.12
"""

import argparse
import sys

from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

import actstore
from actstore.stream.adapters import Restarting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--site", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="folder for the SAE")
    args = parser.parse_args()

    data = actstore.ActivationDataset(args.url, sites=args.site, batch_size=args.batch_size, dtype="float32")
    d = data.store.sites[args.site].d
    config = {
        "trainer": Recorded,
        "dict_class": AutoEncoderTopK,
        "activation_dim": d,
        "dict_size": 4 * d,
        "k": 16,
        "lr": 2e-3,
        "steps": args.steps,
        "warmup_steps": 0,
        "decay_start": None,
        "layer": 0,
        "lm_name": args.site,
        "seed": 0,
        "device": args.device,
    }
    trainSAE(
        Restarting(data),
        [config],
        steps=args.steps,
        normalize_activations=True,
        save_dir=args.out,
        device=args.device,
    )
    print(f"loss first {Recorded.losses[0]:.5f} last {Recorded.losses[-1]:.5f}")
    return 0 if Recorded.losses[-1] < Recorded.losses[0] else 1


class Recorded(TopKTrainer):
    """Keeps the loss of each step, which dictionary_learning drops."""

    losses: list[float] = []  # noqa: RUF012

    def update(self, step, x):  # noqa: ANN001, ANN201
        """One step on x [B, d]."""
        loss = super().update(step, x)
        self.losses.append(loss)
        return loss


if __name__ == "__main__":
    sys.exit(main())
