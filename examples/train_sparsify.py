"""Train EleutherAI sparsify's `SparseCoder` on one site of a store.

python examples/train_sparsify.py URL --site resid_post.12

sparsify's own Trainer wants tokens and a model, to compute activations itself; its SparseCoder takes activations.
"""

import argparse
import sys
from itertools import islice

import torch
from sparsify import SparseCoder, SparseCoderConfig

import actstore
from actstore.stream.adapters import endless


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--site", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="folder for the SAE")
    args = parser.parse_args()
    torch.manual_seed(0)

    data = actstore.ActivationDataset(args.url, sites=args.site, batch_size=args.batch_size, dtype="float32")
    stats = data.store.stats(args.site)
    sae = SparseCoder(len(stats.mean), SparseCoderConfig(expansion_factor=4, k=16), device=args.device)
    sae.b_dec.data = torch.from_numpy(stats.mean).to(sae.b_dec)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    losses = []
    for x in islice(endless(data), args.steps):
        loss = sae(x.to(args.device)).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()
        losses.append(loss.item())
    if args.out:
        sae.save_to_disk(args.out)
    print(f"loss first {losses[0]:.5f} last {losses[-1]:.5f}")
    return 0 if losses[-1] < losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
