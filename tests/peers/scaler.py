"""Compare `scaling_factor` with SAELens' own estimate: `python scaler.py URL --sites SITE...`, in SAELens' environment.

SAELens' is `sqrt(d) / E||x||` over the batches it is given, here a whole number of epochs, so that it is of all rows.
"""

import argparse
import sys

import torch
from sae_lens.training.activation_scaler import ActivationScaler

import actstore
from actstore.stream.adapters import endless, scaling_factor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--steps", type=int, help="not used")
    args = parser.parse_args()
    wrong = 0
    for site in args.sites:
        data = actstore.ActivationDataset(args.url, sites=site, batch_size=1024, dtype="float32")
        d, theirs = data.store.sites[site].d, ActivationScaler()
        theirs.estimate_scaling_factor(d, endless(data), 2 * len(data))
        ours = scaling_factor(data)
        norms = torch.cat([batch.double().norm(dim=1) for batch in data])
        expected = (1 + norms.var(unbiased=False) / norms.mean() ** 2).sqrt().item()
        ratio = theirs.scaling_factor / ours
        print(f"audit {site}: SAELens' factor {theirs.scaling_factor:.6f}, ours {ours:.6f}, ratio {ratio:.6f}", end="")
        print(f", expected {expected:.6f}")
        wrong += abs(ratio / expected - 1) > 1e-5
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
