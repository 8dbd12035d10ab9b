"""Gradients, one step and twenty steps against the float64 reference; the recipe's constants; the estimator itself."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from trainer import reference
from trainer.optim import clip, project, second_moments, update
from trainer.recipe import GEMMA_SCOPE, PRESETS, SHORT, Recipe
from trainer.sae import JumpReLUSAE, init_sae


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


D, W, B = 12, 40, 64
WIDE = Recipe(bandwidth=0.2, threshold_init=0.15, lr=1e-3, lr_warmup_steps=10, sparsity_warmup_steps=5, batch_size=B)
VARIANTS = {
    "gemma_scope": WIDE,
    "direct": dataclasses.replace(WIDE, log_threshold=False),
    "no_bias": dataclasses.replace(WIDE, pre_bias=False),
    "no_relu": dataclasses.replace(WIDE, relu_before_jump=False, threshold_init=0.02),
    "target": dataclasses.replace(WIDE, target_l0=5.0, log_threshold=False, sparsity_coefficient=0.05),
    "decay": dataclasses.replace(WIDE, lr_decay_fraction=0.5),
    "clip": dataclasses.replace(WIDE, clip_norm=0.1),
}


def random_sae(recipe: Recipe, seed: int = 0) -> JumpReLUSAE:
    sae = init_sae(D, W, recipe, seed=seed, mean=torch.zeros(D))
    rng = torch.Generator().manual_seed(seed)
    for name, p in sae.parameters.items():
        if name != "W_dec":
            p += 0.05 * p.abs().mean() + 0.03 * torch.randn(p.shape, generator=rng)
    sae.constrain()
    return sae


def batches(n: int, seed: int = 1) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=rng) / D**0.5 for _ in range(n)]


def weights(sae: JumpReLUSAE) -> reference.Weights:
    return reference.Weights(**{name: p.double().numpy().copy() for name, p in sae.parameters.items()})


def assert_near(found: dict[str, torch.Tensor], expected: reference.Weights, tolerance: float) -> None:
    for name, value in expected._asdict().items():
        error = np.abs(found[name].double().numpy() - value).max() / (np.abs(value).max() + 1e-12)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [1 << 20, 7 * W])
def test_gradients_match_reference(variant, tile, monkeypatch):
    monkeypatch.setattr("trainer.parts.TILE_ELEMENTS", tile)
    recipe, (x,) = VARIANTS[variant], batches(1)
    sae = random_sae(recipe)
    before = weights(sae)
    gradients, statistics = sae.loss_and_gradients(x, 0.01)
    expected = reference.forward(before, x.double().numpy(), recipe, 0.01)
    assert expected.gate.any() and not expected.gate.all()
    assert_near(gradients, reference.gradients(before, x.double().numpy(), recipe, 0.01), 1e-5)
    assert float(statistics.loss) == pytest.approx(expected.loss, rel=1e-5)
    assert float(statistics.l0) == pytest.approx(expected.l0)
    assert torch.equal(statistics.fired, torch.from_numpy(expected.gate.sum(0)).float())
    assert np.allclose(sae.encode(x).numpy(), expected.f, atol=1e-6)
    assert np.allclose(sae.decode(sae.encode(x)).numpy(), expected.xhat, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [1, 20])
def test_steps_match_reference(variant, steps):
    recipe = VARIANTS[variant]
    sae = random_sae(recipe)
    w = weights(sae)
    v = reference.Weights(*(np.zeros_like(p) for p in w))
    moments = second_moments(sae)
    for number, x in enumerate(batches(steps)):
        w, v = reference.step(w, v, x.double().numpy(), recipe, number, 20)
        gradients, _ = sae.loss_and_gradients(x, recipe.sparsity(number))
        update(sae, gradients, moments, step=number, rate=recipe.learning_rate(number, 20), recipe=recipe)
    assert_near(sae.parameters, w, 2e-4)
    assert_near(moments, v, 1e-3)


@pytest.mark.parametrize("variant", ["gemma_scope", "direct"])
def test_revival_matches_reference(variant):
    recipe, (x,) = dataclasses.replace(VARIANTS[variant], revival=0.02), batches(1)
    sae, dead = random_sae(recipe), torch.arange(W) % 3 == 0
    before = weights(sae)
    gradients, statistics = sae.loss_and_gradients(x, 0.01, dead)
    arguments = (before, x.double().numpy(), recipe, 0.01, dead.numpy())
    assert_near(gradients, reference.gradients(*arguments), 1e-5)
    assert float(statistics.loss) == pytest.approx(reference.forward(*arguments).loss, rel=1e-5)


def test_smooth_gradients_match_autograd():
    """Away from the jump the loss is differentiable; autograd must agree on every weight but the threshold."""
    recipe, (x,) = dataclasses.replace(WIDE, bandwidth=1e-9), batches(1)
    sae = random_sae(recipe)
    leaves = {name: p.double().requires_grad_() for name, p in sae.parameters.items() if name != "threshold"}
    z = (x.double() - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
    xhat = (z * (z > sae.theta)) @ leaves["W_dec"] + leaves["b_dec"]
    (x - xhat).square().sum(1).mean().backward()
    found = reference.gradients(weights(sae), x.double().numpy(), recipe, 0.0)
    for name, leaf in leaves.items():
        assert np.allclose(getattr(found, name), leaf.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("price", [0.05, 0.5])
@pytest.mark.parametrize("t", [0.4, 0.9])
def test_threshold_gradient_is_a_kernel_density_estimate(price, t):
    """JR section 4: the pseudo-gradient's mean is the derivative of the expected loss, smoothed by the kernel.

    One latent, x = z ~ N(0, 1), loss (x - w x H(x - t))^2 + price H(x - t). Finite differences of the expected loss,
    averaged over the rectangle t +- eps/2, against the reference's batch gradient over many draws.
    """
    eps, w_dec, n = 0.05, 0.8, 2_000_000
    recipe = Recipe(bandwidth=eps, log_threshold=False, pre_bias=False, relu_before_jump=False)
    one = np.ones((1, 1))
    w = reference.Weights(one, w_dec * one, np.zeros(1), np.zeros(1), np.array([t]))
    found = reference.gradients(w, np.random.default_rng(0).standard_normal((n, 1)), recipe, price).threshold[0]

    grid = np.linspace(-8, 8, 160_001)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])

    def expected_loss(theta: float) -> float:
        gate = grid > theta
        return float((((grid - w_dec * grid * gate) ** 2 + price * gate) * density).sum())

    def smoothed(theta: float) -> float:
        return float(np.mean([expected_loss(theta + eps * u) for u in np.linspace(-0.5, 0.5, 101)]))

    derivative = (smoothed(t + 0.01) - smoothed(t - 0.01)) / 0.02
    assert abs(derivative) > 0.02
    # sampling error about 0.002, bias of order eps^2
    assert found == pytest.approx(derivative, abs=0.006)


def test_constants_are_gemma_scopes():
    assert PRESETS["gemma_scope"] is GEMMA_SCOPE and PRESETS["short"] is SHORT
    assert dataclasses.asdict(GEMMA_SCOPE) == {
        "architecture": "jumprelu",
        "skip": False,
        "unit_mean_square": True,
        "compute": "float32",
        "kernels": "torch",
        "bandwidth": 0.001,
        "lr": 7e-5,
        "lr_warmup_steps": 1_000,
        "lr_warmup_start": 0.1,
        "lr_decay_fraction": 0.0,
        "beta1": 0.0,
        "beta2": 0.999,
        "adam_eps": 1e-8,
        "lazy_adam": False,
        "unit_decoder": True,
        "decoder_init": "he_unit",
        "init_l0": None,
        "clip_norm": None,
        "batch_size": 4_096,
        "sparsity_coefficient": 6e-4,
        "sparsity_warmup_steps": 10_000,
        "sparsity_warmup_fraction": 0.0,
        "sparsity_loss": "l0",
        "target_l0": None,
        "tanh_scale": 4.0,
        "pre_act_coefficient": 0.0,
        "estimate_inputs": False,
        "frequency_penalty": 0.0,
        "frequency_max": 0.1,
        "prefixes": 1,
        "k": 50,
        "aux_k": 256,
        "aux_coefficient": 1 / 32,
        "threshold_rate": 0.01,
        "threshold_init": 0.001,
        "log_threshold": True,
        "pre_bias": True,
        "relu_before_jump": True,
        "init_b_dec_to_mean": False,
        "dead_after_tokens": 10_000_000,
        "revival": 0.0,
    }


def test_schedules():
    r = GEMMA_SCOPE
    assert r.learning_rate(0, 10**6) == pytest.approx(7e-6)
    assert r.learning_rate(500, 10**6) == pytest.approx(7e-5 * 0.55)
    assert r.learning_rate(1000, 10**6) == r.learning_rate(999_999, 10**6) == 7e-5
    assert (r.sparsity(0), r.sparsity(5_000), r.sparsity(10_000), r.sparsity(10**6)) == (0, 3e-4, 6e-4, 6e-4)
    decayed = dataclasses.replace(r, lr_decay_fraction=0.5)
    assert decayed.learning_rate(5_000, 10_000) == 7e-5
    assert decayed.learning_rate(7_500, 10_000) == pytest.approx(3.5e-5)


def test_start_is_gemma_scopes():
    sae = init_sae(64, 512, GEMMA_SCOPE, seed=3)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(512))
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert torch.allclose(sae.theta, torch.full((512,), 0.001))
    assert all(p.dtype == torch.float32 for p in sae.parameters.values())
    assert torch.equal(sae.W_dec, init_sae(64, 512, GEMMA_SCOPE, seed=3).W_dec)
    assert not torch.equal(sae.W_dec, init_sae(64, 512, GEMMA_SCOPE, seed=4).W_dec)


def test_order_is_project_adam_renormalise():
    """The parallel part of the decoder gradient must reach neither Adam's moments nor the rows' length."""
    sae = random_sae(WIDE)
    moments = second_moments(sae)
    gradients = {name: torch.zeros_like(p) for name, p in sae.parameters.items()}
    gradients["W_dec"] = 3.0 * sae.W_dec.clone()
    before = sae.W_dec.clone()
    update(sae, gradients, moments, step=0, rate=0.1, recipe=WIDE)
    assert moments["W_dec"].max() < 1e-12
    gradients = {name: torch.ones_like(p) for name, p in sae.parameters.items()}
    update(sae, gradients, moments, step=1, rate=0.1, recipe=WIDE)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(W), atol=1e-6)
    assert not torch.allclose(sae.W_dec, before, atol=1e-3)


def test_clipping_bounds_the_joint_norm_and_leaves_small_gradients_alone():
    def joint(gradients):
        return sum(g.double().square().sum() for g in gradients.values()).sqrt()

    large = {"a": torch.full((3, 4), 2.0), "b": torch.full((5,), -1.0)}
    direction = {k: g / joint(large) for k, g in large.items()}
    clip(large, 0.5)
    torch.testing.assert_close(joint(large), torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close({k: g / joint(large) for k, g in large.items()}, direction, check_dtype=False)
    small = {"a": torch.full((2,), 0.1)}
    clip(small, 0.5)
    assert torch.equal(small["a"], torch.full((2,), 0.1))
    none = {"a": torch.zeros(2)}
    clip(none, 0.5)
    assert torch.equal(none["a"], torch.zeros(2))


def test_projection_is_orthogonal():
    sae, gradient = random_sae(WIDE), torch.randn(W, D)
    original = gradient.clone()
    project(sae.W_dec, gradient)
    assert (gradient * sae.W_dec).sum(1).abs().max() < 1e-5
    difference = original - gradient
    assert torch.allclose(difference, (difference * sae.W_dec).sum(1, keepdim=True) * sae.W_dec, atol=1e-5)


def test_direct_threshold_stays_nonnegative_and_moves():
    recipe = dataclasses.replace(WIDE, log_threshold=False, threshold_init=0.01)
    sae = random_sae(recipe)
    gradients = {name: torch.zeros_like(p) for name, p in sae.parameters.items()}
    gradients["threshold"] = torch.ones(W)
    update(sae, gradients, second_moments(sae), step=0, rate=1.0, recipe=recipe)
    assert torch.equal(sae.theta, torch.zeros(W))


@pytest.mark.parametrize(
    "change",
    [{"beta1": 1.0}, {"bandwidth": 0.0}, {"lr": float("nan")}, {"target_l0": -1.0}, {"lr_decay_fraction": 2.0}],
)
def test_bad_constants_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(GEMMA_SCOPE, **change)
