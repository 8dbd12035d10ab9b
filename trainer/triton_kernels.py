# pyright: basic
# ruff: noqa: ANN001, ANN201  Triton's types are those of its own language
"""The step's pointwise work, sums over pairs and row updates on a GPU, in Triton: `--kernels triton`.

They do what `trainer/fused.py` and `trainer/sparse.py` do on a CPU, with the same comparisons. No atomics: every sum
has its order, so a step gives the same bits again. They are tested against the float64 reference under Triton's
interpreter, and compile for NVIDIA's compute capabilities 8.0 and 9.0 (`tests/test_trainer_triton.py`); no GPU has
run them yet, which is why PyTorch's operations are the default.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel; tests wrap the functions of this package, and Triton wants what is inside."""
    return triton.jit(inspect.unwrap(function))


@kernel
def pre_activation(z, bias, floor):
    """The encoder's product plus its bias, at least `floor`; NaN stays NaN."""
    raw = z.to(tl.float32) + bias
    return tl.where(raw < floor, floor, raw)


@kernel
def gate_forward(z, f, bias, theta, fired, rows, width, floor, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Features of some rows and latents; how often each fired there goes to `fired` [tiles, width]."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = j < width
    mask = (i < rows)[:, None] & here[None, :]
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    t = tl.load(theta + j, here, other=0.0)[None, :]
    value = pre_activation(tl.load(z + at, mask, other=0.0), tl.load(bias + j, here, other=0.0)[None, :], floor)
    tl.store(f + at, tl.where(value <= t, 0.0, value).to(f.dtype.element_ty), mask)  # NaN stays, and shows in the loss
    on = (value > t) & mask
    tl.store(fired + tl.program_id(0) * width + j, tl.sum(on.to(tl.float32), 0), here)


@kernel
def gate_backward(z, df, bias, theta, sums, rows, width, floor, half, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Turn df into dz; to `sums` [tiles, 3, width] go the counts near the threshold, df over those, and dz."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = j < width
    mask = (i < rows)[:, None] & here[None, :]
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    t = tl.load(theta + j, here, other=0.0)[None, :]
    value = pre_activation(tl.load(z + at, mask, other=0.0), tl.load(bias + j, here, other=0.0)[None, :], floor)
    slope = tl.load(df + at, mask, other=0.0)
    on, near = (value > t) & mask, (tl.abs(value - t) < half) & mask
    dz = tl.where(on, slope.to(tl.float32), 0.0)
    tl.store(df + at, dz.to(df.dtype.element_ty), mask)
    place = sums + tl.program_id(0) * 3 * width + j
    tl.store(place, tl.sum(near.to(tl.float32), 0), here)
    tl.store(place + width, tl.sum(tl.where(near, slope.to(tl.float32), 0.0), 0), here)
    tl.store(place + 2 * width, tl.sum(dz, 0), here)


@kernel
def pick(
    z, bias, theta, offset, count, token, latent, value_of, rows, width, first, floor, half, room,
    WRITE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs of some rows with a block of latents that begins at `first`: active, in the kernel's window, or NaN.

    First how many each row has, to `count`; then, with WRITE, the pairs themselves, each row's from its `offset` on,
    as far as there is room.
    """
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = i < rows
    place = tl.load(offset + i, there, other=0) if WRITE else tl.zeros([TILE], tl.int64)
    for a in range(0, width, BLOCK):
        j = a + tl.arange(0, BLOCK)
        here = j < width
        mask = there[:, None] & here[None, :]
        t = tl.load(theta + j, here, other=0.0)[None, :]
        raw = tl.load(z + i.to(tl.int64)[:, None] * width + j[None, :], mask, other=0.0)
        value = pre_activation(raw, tl.load(bias + j, here, other=0.0)[None, :], floor)
        hit = (((value <= t) == 0) | (tl.abs(value - t) < half)) & mask
        number = hit.to(tl.int32)
        if WRITE:
            at = place[:, None] + tl.cumsum(number, 1) - number
            fits = hit & (at < room)
            tl.store(token + at, tl.broadcast_to(i[:, None], (TILE, BLOCK)), fits)
            tl.store(latent + at, tl.broadcast_to(first + j[None, :], (TILE, BLOCK)), fits)
            tl.store(value_of + at, value, fits)
        place += tl.sum(number, 1)
    if WRITE == 0:
        tl.store(count + i, place, there)


@kernel
def decode(
    start, latent, z, theta, W_dec, b_dec, y, residual, narrow, squares, df, d,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: reconstruction minus target (also as the products read it), its square, each pair's slope."""
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < d
    r = tl.load(b_dec + i, mask, other=0.0)
    first, last = tl.load(start + t), tl.load(start + t + 1)
    for p in range(first, last):
        row, value = tl.load(latent + p).to(tl.int64), tl.load(z + p)
        f = tl.where(value <= tl.load(theta + row), 0.0, value)
        r += f * tl.load(W_dec + row * d + i, mask, other=0.0).to(tl.float32)
    r -= tl.load(y + t * d + i, mask, other=0.0)
    r = tl.where(mask, r, 0.0)
    tl.store(residual + t * d + i, r, mask)
    tl.store(narrow + t * d + i, r.to(narrow.dtype.element_ty), mask)
    tl.store(squares + t, tl.sum(r * r, 0))
    for p in range(first, last):
        row = tl.load(latent + p).to(tl.int64)
        tl.store(df + p, tl.sum(r * tl.load(W_dec + row * d + i, mask, other=0.0).to(tl.float32), 0))


@kernel
def accumulate(
    rows, start, order, token, z, df, theta, x, r, dW_enc, dW_dec, sums, half, n, d_model, d_out,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One latent: the gradients of its two rows over its tokens in ascending order.

    To `sums` [4, n] go how often it fired and was near its threshold, df over the latter, and dz.
    """
    k, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(rows + k)
    t, in_x, in_y = tl.load(theta + row), i < d_model, i < d_out
    encoder, decoder = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    fired, near, near_df, total = 0.0, 0.0, 0.0, 0.0
    for p in range(tl.load(start + row), tl.load(start + row + 1)):
        pair = tl.load(order + p)
        at, value, slope = tl.load(token + pair).to(tl.int64), tl.load(z + pair), tl.load(df + pair)
        f, dz = tl.where(value <= t, 0.0, value), tl.where(value > t, slope, 0.0)
        close = tl.abs(value - t) < half
        decoder += f * tl.load(r + at * d_out + i, in_y, other=0.0).to(tl.float32)
        encoder += dz * tl.load(x + at * d_model + i, in_x, other=0.0).to(tl.float32)
        fired += tl.where(value > t, 1.0, 0.0)
        near += tl.where(close, 1.0, 0.0)
        near_df += tl.where(close, slope, 0.0)
        total += dz
    tl.store(dW_enc + k * d_model + i, encoder, in_x)
    tl.store(dW_dec + k * d_out + i, decoder, in_y)
    tl.store(sums + k, fired)
    tl.store(sums + n + k, near)
    tl.store(sums + 2 * n + k, near_df)
    tl.store(sums + 3 * n + k, total)


@kernel
def adam_row(
    parameter, gradient, second, rows, decay, gain, correction, rate, eps, d,
    SOME: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One latent's row, with beta1 = 0: projection, Adam, renormalisation; the first and last for UNIT rows alone.

    With SOME, gradient n is that of row `rows[n]`, whose second moments still decay by `decay[n]`; else of row n, and
    all decay by `decay[0]`.
    """
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < d
    if SOME:
        row, left = tl.load(rows + n), tl.load(decay + n)
    else:
        row, left = n, tl.load(decay)
    w = tl.load(parameter + row * d + i, mask, other=0.0)
    g = tl.load(gradient + n * d + i, mask, other=0.0)
    v = tl.load(second + row * d + i, mask, other=0.0)
    if UNIT:
        g -= w * tl.sum(g * w, 0)
    v = v * left + g * g * gain
    w -= rate * g / (tl.sqrt_rn(v / correction) + eps)
    if UNIT:
        w = w / tl.sqrt_rn(tl.sum(w * w, 0))
    tl.store(parameter + row * d + i, w, mask)
    tl.store(second + row * d + i, v, mask)
