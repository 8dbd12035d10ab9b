"""Train an overcomplete SAE on one site of a store, epoch by epoch.

python examples/train_overcomplete.py URL --site resid_post.12
"""

import argparse
import sys

import torch
from overcomplete.sae import TopKSAE, train_sae

import actstore
from actstore.stream.adapters import scaling_factor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--site", required=True)
    parser.add_argument("--steps", type=int, default=50, help="rounded up to whole epochs")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    data = actstore.ActivationDataset(args.url, sites=args.site, batch_size=args.batch_size, dtype="float32")
    d, scale = data.store.sites[args.site].d, scaling_factor(data)
    sae = TopKSAE(d, nb_concepts=4 * d, top_k=16, device=args.device)

    def criterion(x, x_hat, pre_codes, codes, dictionary):  # noqa: ANN001, ANN202, ARG001
        return (x - x_hat).square().mean() * scale**2

    logs = train_sae(
        sae,
        data,
        criterion,
        torch.optim.Adam(sae.parameters(), lr=2e-3),
        nb_epochs=-(-args.steps // len(data)),
        device=args.device,
    )
    losses = logs["step_loss"]
    print(f"loss first {losses[0]:.5f} last {losses[-1]:.5f}")
    return 0 if losses[-1] < losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
