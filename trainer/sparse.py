"""A step of a wide JumpReLU SAE on a CPU from the latents that matter to each token, 2dw + 8dk FLOP instead of 10dw.

Only the encoder's product is dense. It comes in blocks, and while a block is in cache the pairs (token, latent) are
picked out that are active or inside the kernel's window, where the threshold's gradient needs the feature's slope.
The decoder, that slope and the weights' gradients are sums over the pairs alone. The blocks and the comparisons are
those of the dense step, so the same latents fire, bit for bit; the sums have the same terms and another rounding:
here f, the residual and the decoder stay float32 whatever the recipe multiplies in.

A step with too many pairs is left to the dense path. The choice depends on that batch alone, there is no state. Each
sum is one thread's, over tokens or latents in ascending order: nothing depends on the number of threads.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from trainer.fused import Latents, bits, compiled, each, pre_activation
from trainer.parts import ROWS, SAE, affine, columns, rows_at_once

LEAST_LATENTS = 1 << 11
"""Below this width the dense path is taken. Sparse may pay there, too: `benchmarks/trainer_sparse.py` has 4,608 on."""
MOST_KEPT = {"float32": 1 / 16, "bfloat16": 1 / 32}
"""The share of all (token, latent) pairs above which a step is done by the dense path, by what that multiplies in.
At 9% and 4% the two are equally fast (`benchmarks/trainer_sparse.py --l0`); what is found out too late costs about a
fifth of a dense step at most."""
STRIDE = 32
"""Latents that are looked at together before each is looked at for itself: most of the time none of them matters."""

SUMS = {"reassoc", "contract"}
"""What LLVM may do to sums, so that it can use vectors: add in another order, and round a product and a sum once."""


class Step(NamedTuple):
    """What a sparse step found; slopes are those of batch * loss / 2."""

    gradients: dict[str, Tensor]
    """W_enc [d_model, touched] and W_dec [touched, d_out] of the latents in ROWS, b_enc and b_dec."""
    fired: Float[Tensor, " d_sae"]
    near: Float[Tensor, " d_sae"]
    """Pre-activations within half a bandwidth of the threshold."""
    near_df: Float[Tensor, " d_sae"]
    """The features' slopes there."""
    squares: Float[Tensor, ""]


class Pairs(NamedTuple):
    """Tokens and latents that have to do with each other, by token, then by latent."""

    token: Int[np.ndarray, " pairs"]
    latent: Int[np.ndarray, " pairs"]
    z: Float[np.ndarray, " pairs"]
    """Pre-activations; NaN if the token is."""
    start: Int[np.ndarray, " tokens_and_one"]
    """Where each token's pairs begin."""


def pays(sae: SAE) -> bool:
    """Whether to look for pairs at all: from some width on. `pairs` decides for each batch."""
    return sae.W_enc.shape[1] >= LEAST_LATENTS


def step(sae: SAE, latents: Latents, x: Float[Tensor, "batch d_model"], y: Float[Tensor, "batch d_out"]) -> Step | None:
    """The slopes of the squared error and the counts that the prices need, or None if the dense path is to do it."""
    centred = x - sae.b_dec if sae.recipe.pre_bias else x
    found = pairs(sae, latents, centred)
    if found is None:
        return None
    theta = latents.theta.numpy()[found.latent]
    on, near = found.z > theta, np.abs(found.z - theta) < np.float32(latents.half)
    f = np.where(found.z <= theta, np.float32(0), found.z)  # NaN stays, and shows in the loss
    residual, squares, df = np.empty(y.shape, np.float32), np.empty(len(y), np.float32), np.empty_like(f)
    decoder = (found.start, found.latent, f, sae.W_dec.numpy(), sae.b_dec.numpy(), y.numpy())
    each(lambda a, b: _decode(*decoder, residual, squares, df, a, b), len(y))
    d_sae, dz = len(latents.theta), df * on
    fired, close, close_df, d_enc = (
        torch.from_numpy(np.bincount(found.latent, what, d_sae)).float() for what in (on, near, df * near, dz)
    )
    rows = fired.nonzero().squeeze(1)
    start, order = np.zeros(d_sae + 1, np.int64), np.empty(len(f), np.int64)
    _sort(found.latent, start, order)
    dW_enc, dW_dec = (np.empty((len(rows), d), np.float32) for d in (x.shape[1], y.shape[1]))
    slopes = (rows.numpy(), start, order, found.token, f, dz, centred.numpy(), residual)
    each(lambda a, b: _accumulate(*slopes, dW_enc, dW_dec, a, b), len(rows))
    gradients = {"W_enc": torch.from_numpy(dW_enc).T, "W_dec": torch.from_numpy(dW_dec), "b_enc": d_enc}
    gradients |= {"b_dec": torch.from_numpy(residual.sum(0)), ROWS: rows}
    return Step(gradients, fired, close, close_df, torch.tensor(squares.sum()))


def pairs(sae: SAE, latents: Latents, centred: Float[Tensor, "batch d_model"]) -> Pairs | None:
    """The encoder: pairs that are active or in the window, or None as soon as there are too many of them."""
    narrow = sae.recipe.compute == "bfloat16"
    inputs, d_sae = centred.bfloat16() if narrow else centred, sae.W_enc.shape[1]
    rows, room = rows_at_once(sae), MOST_KEPT[sae.recipe.compute] * len(centred) * d_sae
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
    for block in columns(sae.W_enc):
        W = sae.W_enc[:, block].bfloat16() if narrow else sae.W_enc[:, block]
        here = Latents(latents.b_enc[block], latents.theta[block], latents.relu, latents.half)
        for first in range(0, len(centred), rows):
            tile = inputs[first : first + rows]
            if narrow:
                part = _pick(tile @ W, here, first, block.start)
            else:
                z, nothing = affine(here.b_enc, tile, W), torch.zeros_like(here.b_enc)
                part = _pick(z, here._replace(b_enc=nothing), first, block.start)
            room -= len(part[0])
            if room < 0:
                return None
            parts.append(part)
    token, latent, z = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    start, order = np.zeros(len(centred) + 1, np.int64), np.empty(len(z), np.int64)
    _sort(token, start, order)
    return Pairs(token[order], latent[order], z[order], start)


def _pick(
    z: Float[Tensor, "tile block"], latents: Latents, first_token: int, first_latent: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """The pairs of one block, by token: token, latent and pre-activation."""
    slots, values = torch.empty(z.shape, dtype=torch.int32).numpy(), torch.empty(z.shape).numpy()
    count, floor = np.empty(len(z), np.int64), np.float32(0 if latents.relu else -np.inf)
    constants = (latents.b_enc.numpy(), latents.theta.numpy(), floor, np.float32(latents.half))
    each(lambda a, b: _hits(bits(z), *constants, slots, values, count, a, b), len(z))
    total = int(count.sum())
    token, latent, value = np.empty(total, np.int32), np.empty(total, np.int32), np.empty(total, np.float32)
    _flatten(slots, values, count, first_token, first_latent, token, latent, value)
    return token, latent, value


@compiled(inline="always")
def _matters(value: np.float32, theta: np.float32, half: np.float32) -> np.bool_:
    """Active, or inside the window, or NaN."""
    return (not value <= theta) | (abs(value - theta) < half)


@compiled
def _hits(
    z: NDArray[np.uint16] | NDArray[np.uint32],
    bias: NDArray[np.float32],
    theta: NDArray[np.float32],
    floor: np.float32,
    half: np.float32,
    slots: NDArray[np.int32],
    values: NDArray[np.float32],
    count: NDArray[np.int64],
    first: int,
    last: int,
) -> None:
    width = z.shape[1]
    for i in range(first, last):
        n = 0
        for a in range(0, width, STRIDE):
            b, found = min(a + STRIDE, width), np.int32(0)
            row, c, t = z[i, a:b], bias[a:b], theta[a:b]  # indices from 0 on let LLVM use vectors
            for j in range(b - a):
                found += np.int32(_matters(pre_activation(row[j], c[j], floor), t[j], half))
            if found:
                for j in range(b - a):
                    value = pre_activation(row[j], c[j], floor)
                    if _matters(value, t[j], half):
                        slots[i, n], values[i, n] = a + j, value
                        n += 1
        count[i] = n


@compiled
def _flatten(
    slots: NDArray[np.int32],
    values: NDArray[np.float32],
    count: NDArray[np.int64],
    first_token: int,
    first_latent: int,
    token: NDArray[np.int32],
    latent: NDArray[np.int32],
    z: NDArray[np.float32],
) -> None:
    n = 0
    for i in range(len(count)):
        for k in range(count[i]):
            token[n], latent[n], z[n] = first_token + i, first_latent + slots[i, k], values[i, k]
            n += 1


@compiled
def _sort(keys: NDArray[np.int32], start: NDArray[np.int64], order: NDArray[np.int64]) -> None:
    """Counting sort, stable: `order` sorts the keys, and those equal to k are at start[k] to start[k + 1] (zeros)."""
    for key in keys:
        start[key + 1] += 1
    for k in range(1, len(start)):
        start[k] += start[k - 1]
    place = start[:-1].copy()
    for i in range(len(keys)):
        order[place[keys[i]]] = i
        place[keys[i]] += 1


@compiled(fastmath=SUMS)
def _decode(
    start: NDArray[np.int64],
    latent: NDArray[np.int32],
    f: NDArray[np.float32],
    W_dec: NDArray[np.float32],
    b_dec: NDArray[np.float32],
    y: NDArray[np.float32],
    residual: NDArray[np.float32],
    squares: NDArray[np.float32],
    df: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Reconstruction minus target, its square, and the slope of each pair's feature, token by token."""
    for t in range(first, last):
        r, square = residual[t], np.float32(0)
        r[:] = b_dec
        for p in range(start[t], start[t + 1]):
            row, value = W_dec[latent[p]], f[p]
            if value != 0:
                for i in range(len(r)):
                    r[i] += value * row[i]
        for i in range(len(r)):
            r[i] -= y[t, i]
            square += r[i] * r[i]
        squares[t] = square
        for p in range(start[t], start[t + 1]):
            row, slope = W_dec[latent[p]], np.float32(0)
            for i in range(len(r)):
                slope += r[i] * row[i]
            df[p] = slope


@compiled(fastmath=SUMS)
def _accumulate(
    rows: NDArray[np.int64],
    start: NDArray[np.int64],
    order: NDArray[np.int64],
    token: NDArray[np.int32],
    f: NDArray[np.float32],
    dz: NDArray[np.float32],
    x: NDArray[np.float32],
    residual: NDArray[np.float32],
    dW_enc: NDArray[np.float32],
    dW_dec: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """The weights' gradients, latent by latent, tokens in ascending order."""
    for n in range(first, last):
        encoder, decoder = dW_enc[n], dW_dec[n]
        encoder[:] = 0
        decoder[:] = 0
        for p in range(start[rows[n]], start[rows[n] + 1]):
            pair = order[p]
            t = token[pair]
            for i in range(len(decoder)):
                decoder[i] += f[pair] * residual[t, i]
            for i in range(len(encoder)):
                encoder[i] += dz[pair] * x[t, i]
