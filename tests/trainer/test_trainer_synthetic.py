"""Known features of a synthetic world, recovered by every architecture; bfloat16 products; the scores themselves."""

import dataclasses
import itertools

import numpy as np
import pytest
import synthetic
import torch

from trainer.recipe import SHORT
from trainer.sae import init_sae
from trainer.train import train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_matching_is_the_best_of_all(rows):
    similarity = np.random.default_rng(rows).random((rows, 6))
    best = max(sum(similarity[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(6), rows))
    pair = synthetic.match(similarity)
    assert len(set(pair)) == rows and similarity[np.arange(rows), pair].sum() == pytest.approx(best)


@pytest.fixture(scope="module")
def known():
    """A world of 256 features and activations of it, to train on and held out, scaled to E||x||^2 = 1."""
    world = synthetic.world(256, 48, l0=12, roots=6)
    (x, _), (held_out, fires) = world.draw(50_000, 1), world.draw(20_000, 2)
    scale = float(x.square().sum(1).mean().sqrt())
    assert float(fires[:, :64].sum(1).double().mean()) == pytest.approx(3, abs=0.5)
    return world, x / scale, held_out / scale, fires


def found_in(known, change, steps=1500):
    world, x, held_out, fires = known

    def batches():
        rng = torch.Generator().manual_seed(0)
        while True:
            yield x[torch.randint(len(x), (256,), generator=rng)]

    sae = init_sae(48, 64, dataclasses.replace(SHORT, batch_size=256, k=3, aux_k=16, **change), mean=x.mean(0))
    train(sae, batches(), steps=steps, scale=1.0)
    f = sae.encode(held_out)
    fvu = float((sae.decode(f) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum())
    return {**synthetic.scores(f, sae.W_dec, fires, world.features), "fvu": fvu}


@pytest.fixture(scope="module")
def jumprelu(known):
    return found_in(known, TO_L0["jumprelu"])


TO_L0 = {
    "jumprelu": {"target_l0": 3.0, "sparsity_coefficient": 2.0},
    "topk": {"architecture": "topk", "target_l0": None},
    "batchtopk": {"architecture": "batchtopk", "target_l0": None},
    "matryoshka": {"architecture": "batchtopk", "target_l0": None, "prefixes": 3},
    "gated": {"architecture": "gated", "target_l0": None, "sparsity_coefficient": 0.55},
}


def test_known_features_are_recovered_and_in_the_published_order(known, jumprelu):
    """A quarter of the features are to be found; `benchmarks/trainer_synthetic.py` has the larger world.

    Published (SynthSAEBench): Matryoshka above BatchTopK, which JumpReLU equals; TopK and Gated are not in it.
    """
    found = {"jumprelu": jumprelu}
    found |= {name: found_in(known, change) for name, change in TO_L0.items() if name != "jumprelu"}
    f1, mcc = ({name: figures[key] for name, figures in found.items()} for key in ("f1", "mcc"))
    assert all(figures["l0"] == pytest.approx(3, rel=0.2) for figures in found.values())
    assert min(mcc.values()) > 0.75 and min(f1.values()) > 0.5
    assert f1["jumprelu"] > f1["batchtopk"] - 0.02 and mcc["jumprelu"] > mcc["batchtopk"] - 0.02
    assert f1["matryoshka"] > f1["batchtopk"] - 0.02 and f1["batchtopk"] > f1["topk"]
    assert mcc["matryoshka"] > mcc["batchtopk"] > mcc["topk"]


def test_bfloat16_products_end_where_float32_does(known, jumprelu):
    rough = found_in(known, {**TO_L0["jumprelu"], "compute": "bfloat16"})
    assert rough["fvu"] == pytest.approx(jumprelu["fvu"], rel=0.01)
    assert rough["l0"] == pytest.approx(jumprelu["l0"], rel=0.02)
