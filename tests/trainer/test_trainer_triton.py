"""Triton's kernels, under Triton's interpreter: against the float64 reference and the paths in PyTorch and numba.

What an interpreter can't show: speed, and whether a GPU does the same. That they compile for one is tested too. The
interpreter cuts float32 to bfloat16 where GPUs round, hence the tolerance for bfloat16.
"""

import dataclasses
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_trainer_sparse import BASE, assert_near, assert_same, batch, cases, random_sae

from actstore.errors import ActstoreError
from trainer import gpu, reference, sparse
from trainer.optim import second_moments, spread, update
from trainer.parts import ROWS
from trainer.recipe import PRESETS, Recipe
from trainer.train import start, train_many

TRITON = dataclasses.replace(BASE, kernels="triton")
W, B = 150, 40


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 64 latents; interpreted; dense unless a test says otherwise."""
    monkeypatch.setenv(gpu.INTERPRETED, "1")
    monkeypatch.setattr(gpu, "BLOCK", 64)
    monkeypatch.setattr("trainer.parts.BLOCK", 64)
    monkeypatch.setattr(gpu, "LEAST_LATENTS", math.inf)


def sparsely(monkeypatch, share=1.0):
    monkeypatch.setattr(gpu, "LEAST_LATENTS", 1)
    monkeypatch.setattr(gpu, "MOST_KEPT", share)


def by_torch(sae):
    """The same tensors for PyTorch's dense path."""
    return dataclasses.replace(sae, recipe=dataclasses.replace(sae.recipe, kernels="torch"))


def dense(sae, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LEAST_LATENTS", math.inf)
        return by_torch(sae).loss_and_gradients(*arguments)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_triton_is_torch_is_the_reference(path, case, monkeypatch):
    if path == "sparse":
        sparsely(monkeypatch)
    change, sizes, n, seed = case
    recipe, n = dataclasses.replace(TRITON, **change), min(n, 6)  # every operation of every pair is interpreted
    sae, x = random_sae(recipe, **sizes, seed=seed), batch(n, sizes["d"], seed)
    y = batch(n, sizes["d_out"], seed + 1) if sizes["d_out"] else None
    dead = torch.arange(sizes["w"]) % 3 == 0
    gradients, statistics = sae.loss_and_gradients(x, 0.02, dead, y)
    assert (ROWS in gradients) == (path == "sparse")
    found = spread(sae, gradients)
    wanted, expected = dense(sae, x, 0.02, dead, y)
    rough = recipe.compute == "bfloat16"
    assert torch.equal(statistics.fired, expected.fired)
    assert_near(found, wanted, 0.2 if rough else 2e-5, floor=0.1)
    assert float(statistics.loss) == pytest.approx(float(expected.loss), rel=0.05 if rough else 1e-5)
    if not rough:
        weights = {name: p.double().clone().requires_grad_() for name, p in sae.parameters.items()}
        loss = reference.loss(weights, x.double(), recipe, 0.02, dead, None if y is None else y.double())
        loss.backward()
        assert_near(found, {name: p.grad for name, p in weights.items()}, 2e-5, floor=0.1)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_comparisons_are_strict(path, compute, monkeypatch):
    """z of 0.5 to 1.75, theta 1, window (0.5, 1.5): exact in either precision."""
    if path == "sparse":
        sparsely(monkeypatch)
    change = {"log_threshold": False, "bandwidth": 1.0, "threshold_init": 1.0, "compute": compute, "pre_bias": False}
    sae = random_sae(dataclasses.replace(TRITON, **change), d=2, w=1)
    sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
    sae.b_enc.zero_()
    sae.threshold.fill_(1.0)
    x = torch.tensor([[z, 0.0] for z in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)])
    found, statistics = sae.loss_and_gradients(x, 1e6)
    assert statistics.fired.tolist() == [3]
    assert float(found["threshold"]) == pytest.approx(-1e6 * 3 / len(x), rel=1e-4)  # three in the window


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_nan_shows_in_the_loss(path, monkeypatch):
    if path == "sparse":
        sparsely(monkeypatch)
    sae, x = random_sae(TRITON), batch(6)
    x[3, 2] = torch.nan
    assert sae.loss_and_gradients(x, 0.02)[1].loss.isnan()


@pytest.mark.parametrize("change", [{}, {"lazy_adam": True, "clip_norm": 1.0}])
@pytest.mark.parametrize("n", [1, 5])
def test_no_latent_active(n, change, monkeypatch):
    sparsely(monkeypatch)
    sae, x = random_sae(dataclasses.replace(TRITON, **change)), batch(n)
    sae.threshold.fill_(5.0)
    before, moments = {name: p.clone() for name, p in sae.parameters.items()}, second_moments(sae)
    gradients, statistics = sae.loss_and_gradients(x, 0.02)
    assert len(gradients[ROWS]) == 0 and not statistics.fired.any() and statistics.loss.isfinite()
    update(sae, gradients, moments, step=0, rate=1e-3, recipe=sae.recipe)
    assert torch.equal(sae.W_enc, before["W_enc"]) and torch.equal(sae.W_dec, before["W_dec"])
    assert not torch.equal(sae.b_dec, before["b_dec"])


def test_a_batch_with_too_many_pairs_is_done_densely(monkeypatch):
    """The pairs that do not fit are not written; the step is the dense one bit for bit."""
    sae, x = random_sae(TRITON), batch()
    wanted, expected = sae.loss_and_gradients(x, 0.02)
    kept = int(expected.fired.sum())
    sparsely(monkeypatch, 0.5 * kept / (B * W))
    found, statistics = sae.loss_and_gradients(x, 0.02)
    assert kept > 100
    assert_same(found, wanted)
    assert torch.equal(statistics.fired, expected.fired)


def test_pairs_are_those_of_the_cpu(monkeypatch):
    """Bit for bit, in the same order, on tiles and blocks that do not divide."""
    sparsely(monkeypatch)
    monkeypatch.setattr(sparse, "MOST_KEPT", dict.fromkeys(sparse.MOST_KEPT, 1))
    sae, x = random_sae(TRITON), batch(45)
    wanted = sparse.pairs(sae, sae._latents(), x - sae.b_dec)
    found = gpu.pairs(sae.W_enc, sae._latents(), x - sae.b_dec)
    assert len(found.z) > 100
    for name in found._fields:
        assert found._asdict()[name].tolist() == getattr(wanted, name).tolist(), name


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("dense", {}),
        ("dense", {"unit_decoder": False}),
        ("sparse", {"clip_norm": 0.1}),
        ("sparse", {"lazy_adam": True}),
    ],
)
def test_updates_are_those_of_torch(path, change, monkeypatch):
    if path == "sparse":
        sparsely(monkeypatch)
    sae = random_sae(dataclasses.replace(TRITON, **change))
    other = by_torch(random_sae(sae.recipe))
    (moments, moments_other), before = (second_moments(sae), second_moments(other)), sae.W_dec.clone()
    for step in range(2):
        gradients, _ = sae.loss_and_gradients(batch(6, seed=step), 0.02)
        same = {name: slope.clone(memory_format=torch.preserve_format) for name, slope in gradients.items()}
        update(sae, gradients, moments, step=step, rate=1e-3, recipe=sae.recipe)
        update(other, same, moments_other, step=step, rate=1e-3, recipe=other.recipe)
    assert (sae.W_dec - before).abs().max() > 1e-4
    assert_near(sae.parameters, other.parameters, 1e-6)
    assert_near(moments, moments_other, 1e-6, floor=1e-12)
    if sae.recipe.unit_decoder:
        assert torch.allclose(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(W), atol=1e-6)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_training_ends_where_torch_ends(path, monkeypatch):
    if path == "sparse":
        sparsely(monkeypatch)
    batches, results = [batch(6, seed=i) for i in range(3)], []
    for sae in (random_sae(TRITON), by_torch(random_sae(TRITON))):
        run = start("sae", sae, 3)
        train_many([run], batches, steps=3, scale=1.0)
        results.append(run.state)
    moved = (results[0]["parameters/W_dec"] - random_sae(TRITON).W_dec).abs().max()
    for name, tensor in results[1].items():
        assert (results[0][name] - tensor).abs().max() < 1e-2 * moved + 1e-4 * tensor.abs().max(), name


def test_what_they_are_not_for_is_refused(monkeypatch):
    """Other recipes, and machines where they would not run."""
    refused = [{"architecture": "topk"}, {"beta1": 0.9}, {"prefixes": 3}, {"skip": True, "pre_bias": False}]
    for change in refused:
        with pytest.raises(ValueError, match="kernels triton are for jumprelu"):
            dataclasses.replace(TRITON, **change)
    for name in ("gemma_scope_2", "anthropic_2025"):
        with pytest.raises(ValueError, match="kernels triton are"):
            dataclasses.replace(PRESETS[name], kernels="triton")
    assert Recipe(kernels="triton").priced_by_counts
    gpu.check("cpu")
    monkeypatch.delenv(gpu.INTERPRETED)
    gpu.check("cuda:1")
    with pytest.raises(ActstoreError, match=r"the device is cpu. Take device cuda, or kernels torch"):
        gpu.check("cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ActstoreError, match=r"pip install 'actstore\[triton\]'"):
        gpu.check("cuda")


@pytest.mark.parametrize(
    ("capabilities", "narrow"),
    [((90,), ("*bf16",)), pytest.param((80, 90), ("*bf16", "*fp32"), marks=pytest.mark.slow)],
)
def test_the_kernels_compile_for_gpus(capabilities, narrow):
    """For compute capabilities 8.0 (A100) and 9.0 (H100), at the sizes of Gemma 2 9B, with Triton's own assembler."""
    code = f"CAPABILITIES, NARROW = {capabilities}, {narrow}\n" + textwrap.dedent("""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from trainer import triton_kernels

        POINTERS = {"z": "F", "f": "X", "df": "F", "narrow": "X", "W_dec": "X", "x": "X", "r": "X"}
        POINTERS |= dict.fromkeys(("token", "latent"), "*i32")
        POINTERS |= dict.fromkeys(("offset", "count", "start", "order", "rows"), "*i64")
        INTEGERS = ("width", "first", "room", "d", "n", "d_model", "d_out")
        NUMBERS = ("floor", "half", "gain", "correction", "rate", "eps")
        SIZES = {"TILE": 32, "BLOCK": 128}
        WIDE = {"BLOCK": 4096}
        CASES = [("gate_forward", SIZES, {"rows": "i32"}), ("gate_backward", SIZES, {"rows": "i32"})]
        CASES += [("pick", {**SIZES, "TILE": 16, "WRITE": write}, {"rows": "i32"}) for write in (False, True)]
        CASES += [("decode", WIDE, {}), ("accumulate", WIDE, {})]
        CASES += [("adam_row", {**WIDE, "SOME": some, "UNIT": unit}, {}) for some in (0, 1) for unit in (0, 1)]

        def kind(name, special, narrow):
            found = special.get(name) or POINTERS.get(name, "*fp32")
            if name in INTEGERS:
                found = "i32"
            if name in NUMBERS:
                found = "fp32"
            return {"X": narrow, "F": "*fp32"}.get(found, found)

        for capability in CAPABILITIES:
            for name, constants, special in CASES:
                for narrow in NARROW:
                    kernel = getattr(triton_kernels, name)
                    names = [n for n in kernel.arg_names if n not in constants]
                    signature = {n: kind(n, special, narrow) for n in names} | dict.fromkeys(constants, "constexpr")
                    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
                    source = ASTSource(kernel, signature, places)
                    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
                    assert made.asm["cubin"], name
                    print(capability, name, narrow)
    """)
    environment = {k: v for k, v in os.environ.items() if k != gpu.INTERPRETED}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 10 * len(capabilities) * len(narrow)
