"""What `trainer/triton_kernels.py` is for, with PyTorch's products around it: `Recipe.kernels = "triton"`.

The dense step has one pass over the pre-activations each way, a wide SAE's step does only the encoder's product densely
(as `trainer/sparse.py` on a CPU), and Adam reads and writes a row of weights once. The trade-off of the sparse step:
it waits for the device twice, to size what follows the encoder, so a CUDA graph can't hold it. A batch with too many
pairs, found out after the encoder, is done densely.
"""

import importlib
import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actstore.errors import ActstoreError
from trainer.fused import Latents
from trainer.parts import BLOCK, ROWS, SAE, copies, multiply
from trainer.recipe import Recipe
from trainer.sparse import Step

LEAST_LATENTS = 1 << 15
"""Below this width the dense path is taken: on paper, gathers pay from about here on (not measured)."""
MOST_KEPT = 1 / 512
"""The share of (token, latent) pairs above which a step is dense. On paper, an H100 takes as long for 8 d FLOP (790
TFLOP/s) of a dense pair as for 8 d bytes of bfloat16 (3.35 TB/s) of one that is kept at 1/236 (not measured)."""
TILE, LATENTS = 32, 128
"""Tokens and latents that a program of the pointwise kernels takes."""
INTERPRETED = "TRITON_INTERPRET"


class Pairs(NamedTuple):
    """Tokens and latents that have to do with each other, by token, then by block of latents, then by latent."""

    token: Int[Tensor, " pairs"]
    latent: Int[Tensor, " pairs"]
    z: Float[Tensor, " pairs"]
    """Pre-activations; NaN if the token is."""


def check(device: str) -> None:
    """Raise ActstoreError unless Triton kernels can run on this device."""
    if importlib.util.find_spec("triton") is None:
        text = "Triton is not installed: pip install 'actstore[triton]', or leave kernels at torch"
        raise ActstoreError(f"the kernels asked for are Triton's. {text}")
    if torch.device(device).type != "cuda" and not os.environ.get(INTERPRETED):
        text = f"the device is {device}. Take device cuda, or kernels torch"
        raise ActstoreError(f"Triton's kernels are for GPUs, {text} ({INTERPRETED}=1 interprets them, for tests)")


@cache
def kernels() -> Any:
    """The module of kernels, for which Triton must be there."""
    return importlib.import_module("trainer.triton_kernels")


def run(name: str, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument."""
    warps = max(4, min(16, constants["BLOCK"] // 512))  # at most 16 elements of a row in a thread's registers
    with torch.cuda.device_of(arguments[0]):
        getattr(kernels(), name)[programs](*arguments, **constants, num_warps=warps)


def forward(
    z: Float[Tensor, "batch d_sae"], f: Float[Tensor, "batch d_sae"], latents: Latents, fired: Float[Tensor, " d_sae"]
) -> None:
    """Write the features of `z + b_enc`, z the encoder's product, to `f`, in its precision.

    Adds to `fired` how often each latent fired.
    """
    grid = _grid(z)
    counts = torch.empty(grid[0], z.shape[1], device=z.device)
    arguments = (z, f, latents.b_enc, latents.theta, counts, *z.shape, _floor(latents))
    run("gate_forward", grid, *arguments, TILE=TILE, BLOCK=LATENTS)
    fired += counts.sum(0)


def backward(
    z: Float[Tensor, "batch d_sae"],
    df: Float[Tensor, "batch d_sae"],
    latents: Latents,
    sums: Float[Tensor, "3 d_sae"],
) -> None:
    """Turn `df` into dz in place; adds to `sums`: latents near their threshold, df over those, dz."""
    grid = _grid(z)
    parts = torch.empty(grid[0], 3, z.shape[1], device=z.device)
    arguments = (z, df, latents.b_enc, latents.theta, parts, *z.shape, _floor(latents), latents.half)
    run("gate_backward", grid, *arguments, TILE=TILE, BLOCK=LATENTS)
    sums += parts.sum(0)


def _grid(z: Float[Tensor, "batch d_sae"]) -> tuple[int, int]:
    return -(-len(z) // TILE), -(-z.shape[1] // LATENTS)


def _floor(latents: Latents) -> float:
    return 0.0 if latents.relu else -torch.inf


def pays(sae: SAE) -> bool:
    """Whether to look for pairs at all: from some width on. `pairs` decides for each batch."""
    return sae.W_enc.shape[1] >= LEAST_LATENTS


def step(sae: SAE, latents: Latents, x: Float[Tensor, "batch d_model"], y: Float[Tensor, "batch d_out"]) -> Step | None:
    """The slopes of the squared error and the counts that the prices need, or None if the dense path is to do it.

    Among the rows of gradients are also those, zero, of latents that came near their threshold and never fired.
    """
    W_enc, W_dec = copies(sae)
    centred, y = (x - sae.b_dec if sae.recipe.pre_bias else x).to(W_enc.dtype).contiguous(), y.contiguous()
    found = pairs(W_enc, latents, centred)
    if found is None:
        return None
    (batch, d_model), d_out, d_sae = x.shape, y.shape[1], W_enc.shape[1]
    by_token, by_latent = _begins(found.token, batch), found.latent.sort(stable=True)
    begins = _begins(by_latent.values, d_sae)
    residual, narrow = torch.empty_like(y), torch.empty_like(y, dtype=W_dec.dtype)
    squares, df = torch.empty(batch, device=x.device), torch.empty_like(found.z)
    arguments = (by_token, found.latent, found.z, latents.theta, W_dec, sae.b_dec, y, residual, narrow, squares, df)
    run("decode", (batch,), *arguments, d_out, BLOCK=_power(d_out))
    rows = begins.diff().nonzero().squeeze(1)
    dW_enc, dW_dec = (torch.empty(len(rows), d, device=x.device) for d in (d_model, d_out))
    sums = torch.zeros(4, d_sae, device=x.device)
    if len(rows):
        some = torch.empty(4, len(rows), device=x.device)
        slopes = (rows, begins, by_latent.indices, found.token, found.z, df, latents.theta, centred, narrow)
        sizes = (latents.half, len(rows), d_model, d_out)
        run("accumulate", (len(rows),), *slopes, dW_enc, dW_dec, some, *sizes, BLOCK=_power(max(d_model, d_out)))
        sums[:, rows] = some
    fired, near, near_df, d_enc = sums
    gradients = {"W_enc": dW_enc.T, "W_dec": dW_dec, "b_enc": d_enc, "b_dec": residual.sum(0), ROWS: rows}
    return Step(gradients, fired, near, near_df, squares.sum())


def pairs(
    W_enc: Float[Tensor, "d_model d_sae"], latents: Latents, centred: Float[Tensor, "batch d_model"]
) -> Pairs | None:
    """The encoder, a block of latents at a time: pairs that are active or in the window, or None if too many."""
    batch, d_sae, device = len(centred), W_enc.shape[1], centred.device
    room = int(MOST_KEPT * batch * d_sae)
    token, latent = (torch.empty(room, dtype=torch.int32, device=device) for _ in range(2))
    z, count = torch.empty(room, device=device), torch.empty(batch, dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, d_sae, BLOCK):
        block = slice(first, first + BLOCK)
        product = multiply(centred, W_enc[:, block])
        into = (product, latents.b_enc[block], latents.theta[block])
        sizes = (batch, product.shape[1], first, _floor(latents), latents.half, room)
        how, grid = {"TILE": 16, "BLOCK": LATENTS}, (-(-batch // 16),)
        run("pick", grid, *into, count, count, token, latent, z, *sizes, WRITE=False, **how)
        offset = count.cumsum(0) - count + total
        run("pick", grid, *into, offset, count, token, latent, z, *sizes, WRITE=True, **how)
        total += count.sum()
    kept = int(total)
    if kept > room:
        return None
    order = token[:kept].sort(stable=True)
    return Pairs(order.values, latent[:kept][order.indices], z[:kept][order.indices])


def _begins(keys: Int[Tensor, " pairs"], n: int) -> Int[Tensor, " n_and_one"]:
    """Where each of the keys 0 to n - 1 begins among the sorted ones."""
    return torch.searchsorted(keys, torch.arange(n + 1, dtype=keys.dtype, device=keys.device))


def _power(d: int) -> int:
    """The power of two from d on: rows of a kernel's block."""
    return 1 << (d - 1).bit_length()


def update_rows(
    parameter: Float[Tensor, "d_sae d"],
    gradient: Float[Tensor, "touched d"],
    second: Float[Tensor, "d_sae d"],
    rows: Int[Tensor, " touched"] | None,
    decay: Float[Tensor, " decays"],
    *,
    step: int,
    rate: float,
    recipe: Recipe,
    unit: bool,
) -> None:
    """Adam with beta1 = 0 in place, between projection and renormalisation if the rows are `unit` ones.

    `gradient` is that of `rows`, each with its own `decay` of second moments, or of all, which share one.
    """
    _same_layout(parameter, gradient, second)
    if not len(gradient):
        return
    d, correction = parameter.shape[1], 1 - recipe.beta2 ** (step + 1)
    tensors = (parameter, gradient, second, decay if rows is None else rows, decay)
    numbers = (1 - recipe.beta2, correction, rate, recipe.adam_eps, d)
    how = {"SOME": rows is not None, "UNIT": unit, "BLOCK": _power(d)}
    run("adam_row", (len(gradient),), *tensors, *numbers, **how)


def _same_layout(*matrices: Tensor) -> None:
    assert all(m.is_contiguous() for m in matrices), [m.stride() for m in matrices]
