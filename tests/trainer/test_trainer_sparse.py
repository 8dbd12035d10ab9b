"""The sparse step of wide SAEs: against the dense one and the float64 reference, bit by bit where that is promised."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import reference, sparse
from trainer.optim import UPDATES, second_moments, spread, update
from trainer.parts import ROWS
from trainer.recipe import Recipe
from trainer.sae import init_sae
from trainer.train import start, train_many

BASE = Recipe(bandwidth=0.1, threshold_init=0.3, lr=1e-3, lr_warmup_steps=0, sparsity_warmup_steps=0)
D, W, B = 16, 150, 40


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 64 latents, tiles of 16 rows, sparse from one latent on unless more than a third is kept."""
    monkeypatch.setattr("trainer.parts.BLOCK", 64)
    monkeypatch.setattr("trainer.parts.TILE_ELEMENTS", 1024)
    monkeypatch.setattr("trainer.parts.BFLOAT16_TILES", 1)
    monkeypatch.setattr(sparse, "LEAST_LATENTS", 1)
    keep_up_to(monkeypatch, 1 / 3)


def keep_up_to(monkeypatch, share):
    monkeypatch.setattr(sparse, "MOST_KEPT", dict.fromkeys(sparse.MOST_KEPT, share))


def random_sae(recipe=BASE, d=D, w=W, d_out=None, seed=0):
    sae = init_sae(d, w, recipe, seed=seed, d_out=d_out)
    rng = torch.Generator().manual_seed(seed)
    for name in ("W_enc", "b_enc", "b_dec", "threshold"):
        sae.parameters[name].add_(torch.randn(sae.parameters[name].shape, generator=rng), alpha=0.03)
    sae.constrain()
    return sae


def batch(n=B, d=D, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) / d**0.5


def dense(sae, *arguments):
    """The gradients and statistics of the dense path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LEAST_LATENTS", math.inf)
        gradients, statistics = sae.loss_and_gradients(*arguments)
    assert ROWS not in gradients
    return gradients, statistics


def assert_near(found, wanted, tolerance, floor=1e-9):
    """`floor` is the size of the terms, where sums may cancel."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name].double() - value.double()).abs().max() / (value.double().abs().max() + floor)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@st.composite
def cases(draw):
    change = {
        "compute": draw(st.sampled_from(["float32", "bfloat16"])),
        "relu_before_jump": draw(st.booleans()),
        "log_threshold": draw(st.booleans()),
        "target_l0": draw(st.sampled_from([None, 3.0])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.3])),
        "revival": draw(st.sampled_from([0.0, 0.02])),
        "unit_decoder": draw(st.booleans()),
    }
    w = draw(st.integers(3, 200))
    sizes = {"d": draw(st.integers(1, 20)), "w": w, "d_out": draw(st.sampled_from([None, 1, 9]))}
    change["pre_bias"] = sizes["d_out"] is None and draw(st.booleans())
    return change, sizes, draw(st.integers(1, 50)), draw(st.integers(0, 10**6))


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_sparse_is_dense_is_the_reference(case, monkeypatch):
    keep_up_to(monkeypatch, 1)
    change, sizes, n, seed = case
    recipe = dataclasses.replace(BASE, **change)
    sae, x = random_sae(recipe, **sizes, seed=seed), batch(n, sizes["d"], seed)
    y = batch(n, sizes["d_out"], seed + 1) if sizes["d_out"] else None
    dead = torch.arange(sizes["w"]) % 3 == 0
    gradients, statistics = sae.loss_and_gradients(x, 0.02, dead, y)
    assert torch.equal(gradients[ROWS], statistics.fired.nonzero().squeeze(1))
    found = spread(sae, gradients)
    wanted, expected = dense(sae, x, 0.02, dead, y)
    rough = recipe.compute == "bfloat16"
    assert torch.equal(statistics.fired, expected.fired)
    assert_near(found, wanted, 0.05 if rough else 2e-5, floor=0.1)
    assert float(statistics.loss) == pytest.approx(float(expected.loss), rel=0.02 if rough else 1e-5)
    if not rough:
        weights = {name: p.double().clone().requires_grad_() for name, p in sae.parameters.items()}
        loss = reference.loss(weights, x.double(), recipe, 0.02, dead, None if y is None else y.double())
        loss.backward()
        assert_near(found, {name: p.grad for name, p in weights.items()}, 2e-5, floor=0.1)
        assert float(statistics.loss) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_comparisons_are_strict(compute, monkeypatch):
    """z of 0.5 to 1.75, theta 1, window (0.5, 1.5): exact in either precision."""
    change = {"log_threshold": False, "bandwidth": 1.0, "threshold_init": 1.0, "compute": compute, "pre_bias": False}
    recipe = dataclasses.replace(BASE, **change)
    sae = init_sae(2, 1, recipe)
    sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([[z, 0.0] for z in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)])
    step = sparse.step(sae, sae._latents(), x, x)
    assert step is None  # more than a third
    keep_up_to(monkeypatch, 1)
    step = sparse.step(sae, sae._latents(), x, x)
    assert step.fired.tolist() == [3] and step.near.tolist() == [3]
    found, wanted = sae.loss_and_gradients(x, 1e6)[0], dense(sae, x, 1e6)[0]
    assert_near(spread(sae, found), wanted, 0.01 if compute == "bfloat16" else 1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("relu", [True, False])
def test_the_same_latents_are_active_and_in_the_window(compute, relu):
    """At a price that drowns the rest, the thresholds' gradient counts the window's pre-activations."""
    recipe = dataclasses.replace(BASE, compute=compute, relu_before_jump=relu, log_threshold=False, bandwidth=0.02)
    sae, x = random_sae(recipe, w=5000), batch(200)
    (found, statistics), (wanted, expected) = sae.loss_and_gradients(x, 1e7), dense(sae, x, 1e7)
    assert ROWS in found and torch.equal(statistics.fired, expected.fired)
    near, near_dense = (-g["threshold"] * 0.02 * len(x) / 1e7 for g in (found, wanted))
    assert near.sum() > 1000
    assert torch.equal(near.round(), near_dense.round()) and (near - near.round()).abs().max() < 1e-3


@pytest.mark.parametrize("recipe", [BASE, dataclasses.replace(BASE, lazy_adam=True, clip_norm=1.0)])
def test_no_latent_active(recipe):
    sae, x = random_sae(recipe), batch()
    sae.threshold.fill_(5.0)
    before = {name: p.clone() for name, p in sae.parameters.items()}
    gradients, statistics = sae.loss_and_gradients(x, 0.02)
    assert len(gradients[ROWS]) == 0 and not statistics.fired.any()
    assert_near(spread(sae, gradients), dense(sae, x, 0.02)[0], 1e-5)
    update(sae, gradients, second_moments(sae), step=0, rate=0.01, recipe=recipe)
    assert torch.equal(sae.W_enc, before["W_enc"]) and not torch.equal(sae.b_dec, before["b_dec"])


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_too_many_pairs_are_left_to_the_dense_path(compute):
    sae, x = random_sae(dataclasses.replace(BASE, compute=compute)), batch()
    sae.threshold.fill_(-9.0)
    gradients, statistics = sae.loss_and_gradients(x, 0.02)
    assert statistics.l0 > W / 3 and ROWS not in gradients
    assert_same(gradients, dense(sae, x, 0.02)[0])


@pytest.mark.parametrize("change", [{"sparsity_loss": "tanh"}, {"estimate_inputs": True}, {"prefixes": 2}])
def test_recipes_with_other_prices_are_dense(change):
    sae = random_sae(dataclasses.replace(BASE, **change))
    assert ROWS not in sae.loss_and_gradients(batch(), 0.02)[0]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("d_out", [None, 9])
def test_bad_activations_show_in_the_loss(compute, path, d_out):
    recipe = dataclasses.replace(BASE, compute=compute, pre_bias=d_out is None)
    sae, x, y = random_sae(recipe, d_out=d_out), batch(), batch(d=d_out) if d_out else None
    x[3, 2] = math.nan
    gradients, statistics = (sae.loss_and_gradients if path == "sparse" else lambda *a: dense(sae, *a))(
        x, 0.02, None, y
    )
    assert (ROWS in gradients) == (path == "sparse")
    assert not statistics.loss.isfinite()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_nothing_depends_on_the_number_of_threads(compute):
    sae, x = random_sae(dataclasses.replace(BASE, compute=compute), w=3000), batch(200)
    before = torch.get_num_threads()
    try:
        found = {}
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            gradients, statistics = sae.loss_and_gradients(x, 0.02)
            assert ROWS in gradients
            found[threads] = gradients | statistics._asdict()
            assert_same(found[threads], found[1])
    finally:
        torch.set_num_threads(before)


CHANGES = ({}, {"clip_norm": 0.05}, {"unit_decoder": False})


@pytest.mark.parametrize(
    ("change", "lazy"), [*((c, lazy) for c in CHANGES for lazy in (False, True)), ({"beta1": 0.9}, False)]
)
def test_training_is_dense_adams_through_switches(change, lazy):
    """Every third batch is large, and dense; parameters and moments are those of a run that always is."""
    recipe = dataclasses.replace(BASE, beta2=0.99, log_threshold=False, threshold_init=0.6, bandwidth=0.02, **change)
    ours, plain = random_sae(dataclasses.replace(recipe, lazy_adam=lazy)), random_sae(recipe)
    moments, expected, taken, behind = second_moments(ours), second_moments(plain), [], 0
    for step in range(30):
        x = batch(6, seed=step) * (30 if step % 3 == 2 else 1)
        gradients, _ = ours.loss_and_gradients(x, 0.01)
        taken.append(ROWS in gradients)
        update(ours, gradients, moments, step=step, rate=1e-3, recipe=ours.recipe)
        behind += lazy and bool((moments[UPDATES] <= step).any())
        update(plain, dense(plain, x, 0.01)[0], expected, step=step, rate=1e-3, recipe=recipe)
    assert taken == [step % 3 != 2 for step in range(30)]
    if lazy:
        assert behind > 15
        decay = 0.99 ** (30 - moments.pop(UPDATES))
        moments["W_enc"] *= decay
        moments["W_dec"] *= decay[:, None]
    assert_near(ours.parameters, plain.parameters, 2e-5)
    assert_near(moments, expected, 1e-4)


@pytest.mark.parametrize("lazy", [False, True])
def test_runs_are_bitwise_alone_together_and_resumed(lazy):
    recipe = dataclasses.replace(BASE, lazy_adam=lazy, dead_after_tokens=100, revival=0.01, target_l0=3.0)

    def fresh(seed):
        return start(str(seed), random_sae(recipe, seed=seed), 8)

    def feed(runs, steps, first=0):
        for step in range(first, steps):
            for run in runs:
                run.step(batch(seed=step), None, step, 8)

    together, alone, halfway, resumed = [fresh(0), fresh(1)], fresh(1), fresh(1), fresh(1)
    train_many(together, (batch(seed=step) for step in range(8)), steps=8, scale=1.0)
    feed([alone], 8)
    assert ROWS in alone.sae.loss_and_gradients(batch(), 0.02)[0]
    feed([halfway], 4)
    for name, tensor in resumed.state.items():
        tensor.copy_(halfway.state[name])
    feed([resumed], 8, first=4)
    for run in (together[1], resumed):
        state, wanted = ({k: v for k, v in r.state.items() if k != "window_l0"} for r in (run, alone))
        assert_same(state, wanted)
