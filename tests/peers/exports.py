"""Exports in the packages that are to read them: `python exports.py STORE --as saelens|dictionary_learning`.

`--as make`, in an environment of ours, trains one SAE of each architecture for 50 steps on the store, writes every
export of each and, beside them, features and reconstructions of some 500 raw activations as our own classes compute
them. `--as saelens` and `--as dictionary_learning`, in those packages' environments, load the exports and compare;
saelens also reads each params.npz with the arithmetic of Gemma Scope's tutorial, and saves SAEs of its own, which
`load_any` has to read. Features and reconstructions must agree to 2e-6 of the largest, and so which features fire.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 2e-6
ARCHITECTURES = ("jumprelu", "topk", "batchtopk", "gated")
SITE = "resid_post.3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--as", dest="tool", choices=("make", "saelens", "dictionary_learning"), required=True)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    out = args.store.with_name("exports")
    if args.tool == "make":
        make(args.store, out, args.steps)
        return 0
    wrong = 0
    for architecture in ARCHITECTURES:
        folder = out / architecture
        truth = dict(np.load(folder / "truth.npz", allow_pickle=False))
        check = saelens if args.tool == "saelens" else dictionary_learning
        wrong += report(
            f"{args.tool} {architecture}", check(folder / args.tool, truth["x"]), (truth["f"], truth["xhat"])
        )
        if args.tool == "saelens" and (folder / "npz").exists():
            wrong += report(f"tutorial {architecture}", tutorial(folder, truth["x"]), (truth["f"], truth["xhat"]))
    if args.tool == "saelens":
        for name, found, expected in theirs(out / "theirs", truth["x"]):
            wrong += report(f"load_any {name}", found, expected)
    return 1 if wrong else 0


def report(what: str, found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> bool:
    """Print how far features and reconstructions are off; whether that is too far."""
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
    wrong = not max(errors) <= TOLERANCE
    l0 = (expected[0] > 0).sum(1).mean()
    says = f"features off by {errors[0]:.1e}, reconstructions by {errors[1]:.1e}"
    print(f"audit {what}: L0 {l0:.1f}, {says}{', WRONG' * wrong}")
    return wrong


def make(store: Path, out: Path, steps: int) -> None:
    """Train, export, and say what is right."""
    import torch

    import actstore
    from trainer.export import write_dictionary_learning, write_npz, write_saelens
    from trainer.files import SavedSAE
    from trainer.recipe import SHORT
    from trainer.sae import init_sae
    from trainer.train import train

    opened = actstore.open(store)
    stats = opened.stats(SITE)
    scale = stats.mean_sq_norm**0.5
    mean = torch.from_numpy(np.asarray(stats.mean / scale, np.float32))
    for architecture in ARCHITECTURES:
        recipe = SHORT.replaced(architecture=architecture, k=12, lr=2e-3, target_l0=12.0)
        if architecture != "jumprelu":
            recipe = recipe.without_target().replaced(sparsity_coefficient=0.02)
        sae = init_sae(len(mean), 4 * len(mean), recipe, mean=mean)
        with actstore.ActivationDataset(opened, sites=SITE, batch_size=recipe.batch_size, seed=0) as data:
            train(sae, data, steps=steps, scale=scale)
            x = next(iter(data)).float()
        saved = SavedSAE(sae, scale, SITE, {"store": opened.fingerprint, "seed": 0})
        folder = out / architecture
        about = {"model_name": "gemma-2-2b", "context_size": 128}
        write_saelens(saved, folder / "saelens", **about)
        write_dictionary_learning(saved, folder / "dictionary_learning", **about)
        if architecture != "topk":
            write_npz(saved, folder / "npz")
        # rows in which no latent is so near its threshold that rounding decides whether it fires
        near = [sae.encode(x * (1 + e) / scale) > 0 for e in (-3e-6, 0, 3e-6)]
        x = x[((near[0] == near[1]) & (near[1] == near[2])).all(1)][:512]
        f = sae.encode(x / scale)
        truth = {"x": x.numpy(), "f": (scale * f).numpy(), "xhat": (scale * sae.decode(f)).numpy()}
        np.savez(folder / "truth.npz", allow_pickle=False, **truth)


def saelens(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`SAE.load_from_disk`."""
    import torch
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post", sae.cfg.metadata
    with torch.no_grad():
        f = sae.encode(torch.from_numpy(x))
        return f.numpy(), sae.decode(f).numpy()


def theirs(out: Path, x: np.ndarray) -> Iterator[tuple[str, Any, Any]]:
    """SAEs that SAELens saves: what `load_any` makes of them, and what SAELens does."""
    import torch
    from sae_lens import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    from trainer.releases import load_any

    kinds: dict[str, Any] = {
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": 12}),
        "topk, rescaled": (TopKSAE, TopKSAEConfig, {"k": 12, "rescale_acts_by_decoder_norm": True}),
        "gated": (GatedSAE, GatedSAEConfig, {}),
    }
    for (name, (kind, config, extra)), bias in itertools.product(kinds.items(), (False, True)):
        torch.manual_seed(0)
        metadata = SAEMetadata(model_name="gemma-2-2b", hook_name="blocks.3.hook_resid_post")
        sae = kind(config(d_in=x.shape[1], d_sae=512, apply_b_dec_to_input=bias, metadata=metadata, **extra))
        for p in sae.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
        if name == "jumprelu":
            sae.threshold.data.abs_()
        sae.save_model(out / f"{name} {bias}")
        loaded, read = load_any(out / f"{name} {bias}"), torch.from_numpy(x)
        assert (loaded.site, loaded.scale) == ("resid_post.3", 1)
        with torch.no_grad():
            f = loaded.sae.encode(read)
            there = sae.encode(read)
            expected = (there.numpy(), sae.decode(there).numpy())
            yield f"{name}{', b_dec subtracted' * bias}", (f.numpy(), loaded.sae.decode(f).numpy()), expected


def dictionary_learning(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`load_dictionary`."""
    import torch
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), device="cpu")
    with torch.no_grad():
        f = sae.encode(torch.from_numpy(x))
        return f.numpy(), sae.decode(f).numpy()


def tutorial(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gemma Scope's tutorial: a module of five parameters, filled from params.npz."""
    import torch

    params = {k: torch.from_numpy(v) for k, v in np.load(folder / "npz" / "params.npz", allow_pickle=False).items()}
    pre = torch.from_numpy(x) @ params["W_enc"] + params["b_enc"]
    acts = (pre > params["threshold"]) * torch.nn.functional.relu(pre)
    return acts.numpy(), (acts @ params["W_dec"] + params["b_dec"]).numpy()


if __name__ == "__main__":
    sys.exit(main())
