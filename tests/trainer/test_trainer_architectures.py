"""Every architecture and variant: gradients against the float64 reference, what it exports as, what it recovers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from trainer import reference
from trainer.optim import FIRST, UPDATES, project, second_moments, update
from trainer.recipe import ANTHROPIC_2025, GEMMA_SCOPE, GEMMA_SCOPE_2, PRESETS, Recipe
from trainer.sae import as_jumprelu, init_sae, sae_of, shapes
from trainer.topk import kth_largest


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


D, W, B, OUT = 12, 40, 64, 10
BASE = Recipe(bandwidth=0.2, threshold_init=0.15, lr=1e-3, batch_size=B, k=5, aux_k=4)
FREE = {"unit_decoder": False, "pre_bias": False, "relu_before_jump": False}
VARIANTS = {
    "jumprelu": {},
    "per token": {"sparsity_loss": "l0_per_token", "target_l0": 5.0},
    "frequency": {"frequency_penalty": 0.3, "frequency_max": 0.2},
    "matryoshka": {"prefixes": 3},
    "gemma_scope_2": {"sparsity_loss": "l0_per_token", "target_l0": 5.0, "frequency_penalty": 0.3, "prefixes": 3},
    "tanh": {"sparsity_loss": "tanh"},
    "inputs": {"estimate_inputs": True},
    "inputs per token": {"estimate_inputs": True, "sparsity_loss": "l0_per_token", "target_l0": 5.0},
    "anthropic": {"sparsity_loss": "tanh", "pre_act_coefficient": 0.02, "estimate_inputs": True, **FREE},
    "topk": {"architecture": "topk"},
    "topk matryoshka": {"architecture": "topk", "prefixes": 2},
    "batchtopk": {"architecture": "batchtopk"},
    "batchtopk matryoshka": {"architecture": "batchtopk", "prefixes": 2},
    "gated": {"architecture": "gated"},
    "gated free": {"architecture": "gated", "unit_decoder": False},
}
TRANSCODERS = {
    "plain": {},
    "skip": {},
    "skip, matryoshka": {"prefixes": 3},
    "topk": {"architecture": "topk"},
    "gated": {"architecture": "gated"},
}


def recipe_of(change):
    return dataclasses.replace(BASE, **change)


def random_sae(recipe, d_out=None, seed=0):
    sae = init_sae(D, W, recipe, seed=seed, d_out=d_out)
    rng = torch.Generator().manual_seed(seed)
    for name, p in sae.parameters.items():
        if name != "W_dec" or not recipe.unit_decoder:
            p += 0.05 * p.abs().mean() + 0.03 * torch.randn(p.shape, generator=rng)
    sae.constrain()
    return sae


def batch(n=B, seed=1, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) / d**0.5


def expected(sae, x, coefficient, dead=None, y=None):
    w = {name: p.double().clone().requires_grad_() for name, p in sae.parameters.items()}
    loss = reference.loss(w, x.double(), sae.recipe, coefficient, dead, None if y is None else y.double())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in w.items()}


def assert_near(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name].double() - value).abs().max() / (value.abs().max() + 1e-12)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [1 << 20, 7 * W])
def test_gradients_match_reference(variant, tile, monkeypatch):
    monkeypatch.setattr("trainer.parts.TILE_ELEMENTS", tile)
    sae, x, dead = random_sae(recipe_of(VARIANTS[variant])), batch(), torch.arange(W) % 3 == 0
    loss, wanted = expected(sae, x, 0.02, dead)
    gradients, statistics = sae.loss_and_gradients(x, 0.02, dead)
    if sae.recipe.unit_decoder:  # what lengthens unit rows is projected away, and need not be computed
        for slope in (gradients["W_dec"], wanted["W_dec"]):
            project(sae.W_dec.to(slope.dtype), slope)
    assert_near(gradients, wanted)
    assert float(statistics.loss) == pytest.approx(loss, rel=1e-5)
    assert 0 < statistics.l0 < W
    assert float(statistics.fired.sum()) == pytest.approx(B * float(statistics.l0))


@pytest.mark.parametrize("variant", TRANSCODERS)
def test_transcoder_gradients_match_reference(variant):
    sae = random_sae(recipe_of(TRANSCODERS[variant]).for_transcoder(skip="skip" in variant), d_out=OUT)
    x, y, dead = batch(), batch(seed=2, d=OUT), torch.arange(W) % 3 == 0
    if "skip" in variant:
        sae.W_skip.add_(0.3)
    loss, wanted = expected(sae, x, 0.02, dead, y)
    gradients, statistics = sae.loss_and_gradients(x, 0.02, dead, y)
    assert_near(gradients, wanted)
    assert float(statistics.loss) == pytest.approx(loss, rel=1e-5)
    mse = (sae.decode(sae.encode(x), x) - y).square().sum(1).mean()
    assert float(statistics.mse) == pytest.approx(float(mse), rel=1e-5)


@pytest.mark.parametrize("variant", [{}, {"log_threshold": False}, {"pre_bias": False}, {"target_l0": 5.0}])
def test_the_two_references_agree(variant):
    sae, x = random_sae(recipe_of(variant)), batch()
    w = reference.Weights(**{name: p.double().numpy() for name, p in sae.parameters.items()})
    loss, by_autograd = expected(sae, x, 0.02)
    by_hand = reference.gradients(w, x.double().numpy(), sae.recipe, 0.02)
    assert loss == pytest.approx(reference.forward(w, x.double().numpy(), sae.recipe, 0.02).loss, rel=1e-12)
    for name, value in by_hand._asdict().items():
        assert np.allclose(by_autograd[name].numpy(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["l0", "l0_per_token", "tanh"])
@pytest.mark.parametrize("parameter", ["threshold", "b_enc"])
def test_pseudo_derivatives_are_kernel_density_estimates(loss, parameter):
    """Their mean is the derivative of the expected loss, smoothed by the kernel, in theta and, if asked, in the bias.

    Two latents, x ~ N(0, I): z = x + b, loss |x - w f|^2 plus the sparsity loss. Finite differences of the expected
    loss, averaged over shifts of the threshold by eps * (-1/2 .. 1/2), against the step's gradient over quantiles.
    """
    eps, w_dec, n, t = 0.05, 0.8, 400_000, 0.6
    recipe = Recipe(
        **{"bandwidth": eps, "log_threshold": False, "estimate_inputs": True, **FREE, "sparsity_loss": loss},
        target_l0=1.5 if loss == "l0_per_token" else None,
    )
    eye, zeros = torch.eye(2), torch.zeros(2)
    tensors = {"W_enc": eye, "W_dec": w_dec * eye, "b_enc": zeros, "b_dec": zeros, "threshold": torch.full((2,), t)}
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()
    x = torch.stack([quantiles, quantiles[torch.randperm(n, generator=torch.Generator().manual_seed(0))]], 1)
    found = sae_of(recipe, tensors).loss_and_gradients(x, 0.8)[0][parameter].mean()

    grid = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])

    def expected_loss(bias, theta):
        z = grid + bias
        gate = (z > theta).double()
        f, p = z * gate, float((gate * density).sum())
        own = float(((grid - w_dec * f).square() * density).sum())
        if loss == "l0":
            return own + 0.8 * p
        if loss == "tanh":
            return own + 0.8 * float((torch.tanh(4 * f * w_dec) * density).sum())
        # the other latent fires independently, with the probability at the unmoved threshold
        q = float(((grid > t).double() * density).sum())
        square = p * q * (2 - 1.5) ** 2 + (p * (1 - q) + q * (1 - p)) * (1 - 1.5) ** 2 + (1 - p) * (1 - q) * 1.5**2
        return own + 0.8 * 2 / 1.5 * square

    def smoothed(shift):
        bias, theta = (shift, t) if parameter == "b_enc" else (0.0, t + shift)
        return np.mean([expected_loss(bias, theta + eps * u) for u in np.linspace(-0.5, 0.5, 51)])

    h = 0.02
    derivative = (smoothed(h) - smoothed(-h)) / (2 * h)
    if loss == "tanh":  # not quadratic in f: the slopes at the jump's two ends make the chain rule's height, not tanh's
        chain, height = 3.2 * t * (1 + 1 / math.cosh(3.2 * t) ** 2) / 2, math.tanh(3.2 * t)
        push = 0.8 * (chain - height) * math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
        derivative += push if parameter == "b_enc" else -push
    assert abs(derivative) > 0.02
    assert float(found) == pytest.approx(derivative, abs=0.01 if loss == "l0_per_token" else 0.003)


@pytest.mark.parametrize("variant", ["batchtopk", "gated", "gated free", "anthropic"])
def test_as_jumprelu_computes_the_same(variant):
    sae, x = random_sae(recipe_of(VARIANTS[variant])), batch(500)
    for _ in range(3):
        sae.loss_and_gradients(x, 0.01)
    same = as_jumprelu(sae)
    f, g = sae.encode(x), same.encode(x)
    lengths = torch.ones(W) if sae.recipe.unit_decoder else sae.W_dec.norm(dim=1)
    assert 0.5 < (f > 0).float().sum(1).mean() < W - 1
    assert torch.allclose(g, f * lengths, atol=1e-5)
    assert torch.allclose(same.decode(g), sae.decode(f), atol=1e-5)
    assert torch.allclose(same.W_dec.norm(dim=1), torch.ones(W), atol=1e-5)
    assert same.theta.min() >= 0 and same.recipe.architecture == "jumprelu"


def test_what_is_a_jumprelu_already_and_what_can_not_be():
    sae = random_sae(BASE)
    assert as_jumprelu(sae) is sae
    with pytest.raises(ValueError, match="TopK"):
        as_jumprelu(random_sae(recipe_of({"architecture": "topk"})))


def test_batchtopk_keeps_its_average_and_its_running_threshold():
    sae = random_sae(recipe_of({"architecture": "batchtopk", "threshold_rate": 0.25}))
    smallest = []
    for seed in range(3):
        x = batch(seed=seed)
        z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu().flatten()
        smallest.append(float(z.sort(descending=True).values[5 * B - 1]))
        _, statistics = sae.loss_and_gradients(x, 0.0)
        assert float(statistics.l0) == 5
    running = smallest[0]
    for value in smallest[1:]:
        running += 0.25 * (value - running)
    (threshold,) = sae.buffers.values()
    assert threshold.dtype == torch.float64 and float(threshold) == pytest.approx(running, rel=1e-6)
    many = sae.encode(batch(5000, seed=9))
    assert (many > 0).float().sum(1).mean() == pytest.approx(5, rel=0.1)


def test_topk_keeps_k_positive_values_per_token():
    sae, x = random_sae(recipe_of({"architecture": "topk"})), batch(200)
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = sae.encode(x)
    assert torch.equal((f > 0).sum(1), (z > 0).sum(1).clamp(max=5))
    assert torch.allclose(f.sum(1), z.relu().sort(1, descending=True).values[:, :5].sum(1))


@pytest.mark.parametrize(("n", "k"), [(1000, 1), (1000, 3), (1000, 999), (1000, 1000), (100_000, 700)])
def test_kth_largest(n, k):
    z = torch.randn(n, generator=torch.Generator().manual_seed(k)).relu().view(10, -1)
    assert float(kth_largest(z, k)) == float(z.flatten().sort(descending=True).values[k - 1])


@pytest.mark.parametrize("change", [{"compute": "bfloat16"}, *({"architecture": a} for a in ("topk", "gated"))])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_activations_show_in_the_loss(change, value):
    x = batch()
    x[3, 2] = value
    _, statistics = random_sae(recipe_of(change)).loss_and_gradients(x, 0.02)
    assert not statistics.loss.isfinite()


def test_bad_activations_show_in_batchtopks_loss_and_spare_its_threshold():
    sae, x = random_sae(recipe_of({"architecture": "batchtopk", "k": 1})), batch(2000)
    x[3, 2] = math.nan
    _, statistics = sae.loss_and_gradients(x, 0.02)
    assert not statistics.loss.isfinite() and float(sae.threshold) == 0


def test_lazy_adam_is_adam():
    """Sparse features touch a part of the latents at a time; ends, and moments once caught up, are those of Adam."""
    narrow = dataclasses.replace(BASE, log_threshold=False, bandwidth=0.02, threshold_init=0.5, beta2=0.99)
    lazy_recipe = dataclasses.replace(narrow, lazy_adam=True)
    dense, lazy = random_sae(narrow), random_sae(lazy_recipe)
    state, lazy_state = second_moments(dense), second_moments(lazy)
    partly = 0
    for step in range(60):
        x = batch(4, seed=step)
        for sae, moments in ((dense, state), (lazy, lazy_state)):
            gradients, _ = sae.loss_and_gradients(x, 0.01)
            update(sae, gradients, moments, step=step, rate=0.003, recipe=sae.recipe)
        partly += bool((lazy_state[UPDATES] <= step).any()) and bool((lazy_state[UPDATES] == step + 1).any())
    assert partly > 50
    assert_near(lazy.parameters, {name: p.double() for name, p in dense.parameters.items()}, 2e-5)
    decay = 0.99 ** (60 - lazy_state.pop(UPDATES))
    lazy_state["W_enc"] *= decay
    lazy_state["W_dec"] *= decay[:, None]
    assert_near(lazy_state, {name: p.double() for name, p in state.items()}, 1e-4)


def test_adam_with_a_first_moment_is_torchs():
    recipe = dataclasses.replace(BASE, beta1=0.9, unit_decoder=False)
    sae = random_sae(recipe)
    leaves = {name: p.clone().requires_grad_() for name, p in sae.parameters.items()}
    adam = torch.optim.Adam(leaves.values(), lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    moments = second_moments(sae)
    assert FIRST + "W_enc" in moments
    for step in range(5):
        gradients, _ = sae.loss_and_gradients(batch(seed=step), 0.01)
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        update(sae, gradients, moments, step=step, rate=0.01, recipe=recipe)
        adam.step()
    assert_near(sae.parameters, {name: p.detach().double() for name, p in leaves.items()}, 1e-5)


@pytest.mark.parametrize("variant", ["jumprelu", "gemma_scope_2", "anthropic", "topk", "batchtopk", "gated"])
def test_bfloat16_products_give_nearly_the_same_gradients(variant):
    recipe = recipe_of(VARIANTS[variant])
    exact, rough = random_sae(recipe), random_sae(dataclasses.replace(recipe, compute="bfloat16"))
    x = batch(512)
    wanted, statistics = exact.loss_and_gradients(x, 0.02)
    found, rounded = rough.loss_and_gradients(x, 0.02)
    assert all(p.dtype == torch.float32 for p in (*found.values(), *rough.parameters.values()))
    assert float(rounded.mse) == pytest.approx(float(statistics.mse), rel=0.01)
    assert float(rounded.l0) == pytest.approx(float(statistics.l0), rel=0.01)
    for name, value in wanted.items():
        cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), dim=0)
        assert cosine > (0.9 if name == "threshold" else 0.99), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_those_that_shapes_names(variant):
    sae = random_sae(recipe_of(VARIANTS[variant]))
    named = sae.parameters | sae.buffers
    assert {name: tuple(p.shape) for name, p in named.items()} == shapes(sae.recipe, D, W)
    assert torch.equal(sae_of(sae.recipe, named).encode(batch()), sae.encode(batch()))


def test_presets_say_what_the_sources_say():
    changed = {
        "sparsity_loss": "l0_per_token",
        "target_l0": 50.0,
        "sparsity_warmup_steps": 50_000,
        "frequency_penalty": 0.1,
        "prefixes": 5,
    }
    assert dataclasses.replace(GEMMA_SCOPE, **changed) == GEMMA_SCOPE_2 == PRESETS["gemma_scope_2"]
    a = ANTHROPIC_2025
    assert (a.bandwidth, a.threshold_init, a.tanh_scale, a.pre_act_coefficient) == (2.0, 0.1, 4.0, 3e-6)
    assert (a.lr, a.beta1, a.beta2, a.batch_size, a.clip_norm) == (2e-4, 0.9, 0.999, 32_768, 1.0)
    assert a.learning_rate(79_999, 100_000) == 2e-4 and a.learning_rate(90_000, 100_000) == pytest.approx(1e-4)
    assert a.sparsity(50, 100) == pytest.approx(7.5) and a.scale(9.0 * 64, 64) == pytest.approx(3.0)
    assert GEMMA_SCOPE.scale(9.0, 64) == 3.0
    with pytest.raises(ValueError, match="how long"):
        a.sparsity(50)


def test_start_of_anthropics():
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(ANTHROPIC_2025, init_l0=16.0)
    sae = init_sae(32, 128, recipe, sample=x)
    assert torch.allclose(sae.W_enc, 32 / 128 * sae.W_dec.T) and sae.W_dec.abs().max() <= 32**-0.5
    assert torch.allclose((sae.encode(x) > 0).float().mean(0), torch.full((128,), 0.125), atol=0.002)
    with pytest.raises(ValueError, match="sample"):
        init_sae(32, 128, recipe)


def test_start_of_a_transcoder():
    recipe = dataclasses.replace(BASE, init_b_dec_to_mean=True).for_transcoder(skip=True)
    sae = init_sae(D, W, recipe, d_out=OUT, mean=torch.arange(OUT).float())
    assert tuple(sae.W_dec.shape) == (W, OUT) and torch.equal(sae.b_dec, torch.arange(OUT).float())
    assert torch.allclose(sae.W_enc.norm(dim=0), torch.ones(W)) and not sae.W_skip.any()
    square = init_sae(D, W, recipe, d_out=D, mean=torch.zeros(D))
    assert not torch.allclose(square.W_enc, square.W_dec.T)
    with pytest.raises(ValueError, match="needs x"):
        sae.decode(torch.zeros(1, W))
    with pytest.raises(ValueError, match="for_transcoder"):
        init_sae(D, W, BASE, d_out=OUT)
    with pytest.raises(ValueError, match="d_out"):
        init_sae(D, W, recipe, mean=torch.zeros(D))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lazy_adam": True, "beta1": 0.9}, "beta1"),
        ({"skip": True}, "pre_bias"),
        ({"skip": True, "pre_bias": False, "architecture": "topk"}, "skip is for jumprelu"),
        ({"sparsity_loss": "l0_per_token"}, "target_l0"),
        ({"pre_act_coefficient": 1e-3}, "relu_before_jump"),
        ({"estimate_inputs": True, "frequency_penalty": 1.0}, "estimate_inputs"),
        ({"architecture": "gated", "prefixes": 2}, "gated"),
        ({"k": 0}, "k is 0"),
        ({"threshold_rate": 2.0}, "threshold_rate"),
    ],
)
def test_conflicts_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(GEMMA_SCOPE, **change)


def test_fused_kernels_do_not_depend_on_the_number_of_threads():
    sae = random_sae(recipe_of({"compute": "bfloat16"}))
    one, _ = sae.loss_and_gradients(batch(), 0.02)
    torch.set_num_threads(2)
    two, _ = sae.loss_and_gradients(batch(), 0.02)
    assert torch.equal(one["threshold"], two["threshold"]) and torch.equal(one["b_enc"], two["b_enc"])


@pytest.mark.parametrize("change", [{"architecture": "topk", "k": 41}, {"target_l0": 41.0}])
def test_more_active_latents_than_there_are_is_refused(change):
    with pytest.raises(ValueError, match="41"):
        init_sae(D, W, recipe_of(change))
