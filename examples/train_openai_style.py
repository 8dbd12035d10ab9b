"""Feed a training loop in the style of OpenAI's sparse_autoencoder from one site of a store.

python examples/train_openai_style.py URL --site resid_post.12

That package is not on PyPI. What its loop takes is an iterator of [B, d] tensors, run until it ends, and a sample of
the data for initialisation; the small loop here takes the same.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

import actstore
from actstore.stream.adapters import endless


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--site", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    settings = {"sites": args.site, "batch_size": args.batch_size, "dtype": "float32"}
    sample = next(endless(actstore.ActivationDataset(args.url, **settings, seed=1)))
    data = actstore.ActivationDataset(args.url, **settings)
    train_acts_iter = islice(endless(data), args.steps)
    ae = TopK(sample, d_sae=4 * sample.shape[1], k=16).to(args.device)
    losses = training_loop(ae, train_acts_iter, lr=2e-3)
    print(f"loss first {losses[0]:.5f} last {losses[-1]:.5f}")
    return 0 if losses[-1] < losses[0] else 1


class TopK(nn.Module):
    """A TopK autoencoder, its bias and scale from a sample [n, d]."""

    def __init__(self, sample: Tensor, *, d_sae: int, k: int) -> None:
        """Latents from unit directions at random."""
        super().__init__()
        self.k, self.scale = k, sample.square().sum(1).mean().sqrt().item()
        self.bias = nn.Parameter(sample.mean(0) / self.scale)
        self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(d_sae, sample.shape[1]), dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())

    def loss(self, x: Tensor) -> Tensor:
        """Mean squared error of x [B, d] over that of the batch's mean."""
        x = x / self.scale
        top = ((x - self.bias) @ self.encoder.T).topk(self.k)
        latents = torch.zeros(len(x), len(self.decoder), device=x.device).scatter(1, top.indices, top.values.relu())
        error = x - latents @ self.decoder - self.bias
        return error.square().mean() / (x - x.mean(0)).square().mean()


def training_loop(ae: TopK, train_acts_iter: Iterator[Tensor], *, lr: float) -> list[float]:
    """Train until the iterator ends; the loss of each step."""
    optimizer, losses = torch.optim.Adam(ae.parameters(), lr=lr), []
    for acts in train_acts_iter:
        loss = ae.loss(acts.to(ae.bias.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.exit(main())
