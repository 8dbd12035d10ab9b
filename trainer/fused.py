"""JumpReLU's pointwise work on a CPU with bfloat16 products, one pass each way.

Between bfloat16 products, torch would read and write each pre-activation a dozen times, in float32. These two kernels
read the products' bfloat16, compute in float32 and write bfloat16: 10 bytes per pre-activation and step. Each thread
takes a band of latents, so that the sums over a batch do not depend on the number of threads.
"""

import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from actstore.store.format.bits import bf16_bits, wide


class Latents(NamedTuple):
    """What the kernels read of each latent."""

    b_enc: Float[Tensor, " d_sae"]
    theta: Float[Tensor, " d_sae"]
    relu: bool
    """Whether ReLU comes before the jump."""
    half: float
    """Half the bandwidth."""


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A numba kernel without the GIL; tests wrap the functions of this package, and numba wants what is inside."""
    if function is None:
        return partial(compiled, **options)
    return numba.njit(nogil=True, cache=True, **options)(inspect.unwrap(function))


@compiled(inline="always")
def pre_activation(bits: Any, bias: np.float32, floor: np.float32) -> np.float32:
    """The encoder's product, as bits of bfloat16 or float32, plus its bias, at least `floor`; NaN stays NaN."""
    raw = np.float32(wide(bits)) + bias
    return floor if raw < floor else raw  # noqa: FURB136  numba vectorises this one, and max drops NaN


@compiled
def _forward(
    z: NDArray[np.uint16],
    f: NDArray[np.uint16],
    bias: NDArray[np.float32],
    theta: NDArray[np.float32],
    floor: np.float32,
    fired: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    zero, one = np.float32(0), np.float32(1)
    b, t, count = bias[first:last], theta[first:last], fired[first:last]
    for i in range(z.shape[0]):
        z_row, f_row = z[i, first:last], f[i, first:last]
        for j in range(last - first):
            value = pre_activation(z_row[j], b[j], floor)
            on = value > t[j]
            count[j] += one if on else zero
            f_row[j] = bf16_bits(zero if value <= t[j] else value)  # NaN stays, and shows in the loss


@compiled
def _backward(
    z: NDArray[np.uint16],
    df: NDArray[np.uint16],
    bias: NDArray[np.float32],
    theta: NDArray[np.float32],
    floor: np.float32,
    half: np.float32,
    sums: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    zero, one = np.float32(0), np.float32(1)
    b, t = bias[first:last], theta[first:last]
    near, near_df, total = sums[0, first:last], sums[1, first:last], sums[2, first:last]
    for i in range(z.shape[0]):
        z_row, df_row = z[i, first:last], df[i, first:last]
        for j in range(last - first):
            value = pre_activation(z_row[j], b[j], floor)
            slope = np.float32(wide(df_row[j]))
            inside, on = abs(value - t[j]) < half, value > t[j]
            near[j] += one if inside else zero
            near_df[j] += slope if inside else zero
            total[j] += slope if on else zero
            df_row[j] = df_row[j] if on else np.uint16(0)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), thread_name_prefix="fused")


def bits(t: Tensor) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """The bits of bfloat16 or float32, not copied."""
    return t.view(torch.uint16 if t.dtype == torch.bfloat16 else torch.uint32).numpy()


def forward(
    z: Float[Tensor, "tile d_sae"], f: Float[Tensor, "tile d_sae"], latents: Latents, fired: Float[Tensor, " d_sae"]
) -> None:
    """Write the features of `z + b_enc`, z the encoder's product, to `f`, both bfloat16.

    Adds to `fired` how often each latent fired.
    """
    floor = np.float32(0 if latents.relu else -np.inf)
    arguments = (bits(z), bits(f), latents.b_enc.numpy(), latents.theta.numpy(), floor, fired.numpy())
    each(lambda a, b: _forward(*arguments, a, b), z.shape[1])


def backward(
    z: Float[Tensor, "tile d_sae"],
    df: Float[Tensor, "tile d_sae"],
    latents: Latents,
    sums: Float[Tensor, "3 d_sae"],
) -> None:
    """Turn `df` into dz in place, both bfloat16; adds to `sums`: latents near their threshold, df over those, dz."""
    floor = np.float32(0 if latents.relu else -np.inf)
    arguments = (bits(z), bits(df), latents.b_enc.numpy(), latents.theta.numpy(), floor, np.float32(latents.half))
    each(lambda a, b: _backward(*arguments, sums.numpy(), a, b), z.shape[1])


def each(work: Callable[[int, int], object], n: int) -> None:
    """Run `work(first, last)` on bands of n latents or tokens, one for each of torch's threads, this one among them."""
    threads = torch.get_num_threads()
    edges = [n * i // threads for i in range(threads + 1)]
    others = [_threads().submit(work, a, b) for a, b in pairwise(edges[1:])]
    work(edges[0], edges[1])
    for other in others:
        other.result()
