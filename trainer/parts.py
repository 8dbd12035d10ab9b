"""What every architecture's step is made of: what the trainer asks of an SAE, tiles, products, the decoder's pass.

Gradients are written out instead of left to autograd: nothing is kept for a graph, no gradient of the input is
computed (the pre-encoder bias gets -(sum over the batch of dz) W_enc^T, one vector), and the batch goes through in
tiles whose pre-activations stay in cache, which on a CPU halves the time of a step. The trade-off is that a new
architecture brings its own backward; `trainer/reference.py` has the equations, and its tests compare.

Inside a step, slopes are those of batch * loss / 2, so that the squared error's is the residual itself.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.recipe import Recipe

TILE_ELEMENTS = 1 << 20
"""Pre-activations per tile, or per block of a wide tile, on a CPU: 4 MiB of float32. On a GPU the batch is one tile."""
BLOCK = 1 << 12
"""Latents per block of the encoder's product on a CPU. A tile of a wider SAE has as many rows as if it were as wide as
this: with fewer, a step would read the weights from memory too often for too few rows."""
BFLOAT16_TILES = 4
"""Tiles are this many times larger with bfloat16 copies: fewer, longer sums of the weights' gradients, each of which
is rounded to bfloat16 before it is added in float32."""
FLOAT32_RESULTS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether torch has products of bfloat16 matrices with a float32 result: from 2.8 on. Before that they are multiplied
as float32, of which TF32 keeps all bits of a bfloat16 factor."""

ROWS = "rows"
"""Beside gradients: which latents those of W_enc [d_model, touched] and W_dec [touched, d_out] are for, [touched],
ascending. The others have none. If it is absent they are for all."""


class StepStatistics(NamedTuple):
    """What one step measured, on the SAE's device."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """Mean over the batch of ||y - xhat||^2 (y is x but for a transcoder), in units of E||y||^2 = 1."""
    l0: Float[Tensor, ""]
    fired: Float[Tensor, " d_sae"]
    """How often each latent fired in the batch."""


@runtime_checkable
class SAE(Protocol):
    """What `trainer` asks of an architecture. All tensors are in the units of normalised activations."""

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    recipe: Recipe

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name, not copied."""
        ...

    @property
    def buffers(self) -> dict[str, Tensor]:
        """State that a step changes and no optimiser does, by name, not copied."""
        ...

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of normalised activations."""
        ...

    def decode(
        self, f: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_model"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction from feature activations; a skip connection reads `x` too."""
        ...

    def constrain(self, *, decoder: bool = True) -> None:
        """Bring the parameters back to where they must be after an update; the decoder's rows, unless they are."""
        ...

    def loss_and_gradients(
        self,
        x: Float[Tensor, "batch d_model"],
        coefficient: float,
        dead: Bool[Tensor, " d_sae"] | None = None,
        y: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[dict[str, Tensor], StepStatistics]:
        """One step's gradients, by parameter name, and statistics.

        `coefficient` is lambda at this step, `dead` marks the latents that count as dead, `y` is what a transcoder
        reconstructs (None: x).
        """
        ...


class Decoded(NamedTuple):
    """A tile's features and what the decoder makes of them."""

    narrow: Float[Tensor, "tile d_sae"]
    """The features as they were multiplied."""
    residuals: list[Float[Tensor, "tile d_out"]]
    """xhat - y for each prefix, the whole last."""


class Slopes(NamedTuple):
    """What the decoder's backward pass over a tile returns."""

    df: Float[Tensor, "tile d_sae"]
    """Slope of half the squared error (of all prefixes) in f."""
    squares: Float[Tensor, ""]
    """Squared error, summed over the tile."""
    nested: Float[Tensor, ""]
    """The same, summed over the proper prefixes of a Matryoshka SAE."""


def on_cpu(tensor: Tensor) -> bool:
    """Whether to do what pays on a CPU. Every other device counts as a GPU, also `meta`, where tests run its path."""
    return tensor.device.type == "cpu"


def tiles(
    sae: SAE, x: Float[Tensor, "batch d_model"], y: Float[Tensor, "batch d_out"] | None
) -> Iterator[tuple[Float[Tensor, "tile d_model"], Float[Tensor, "tile d_out"]]]:
    """The batch and what it is to become, some rows at a time."""
    rows = rows_at_once(sae) if on_cpu(x) else len(x)
    yield from zip(x.split(rows), (x if y is None else y).split(rows), strict=True)


def rows_at_once(sae: SAE) -> int:
    """Rows per tile on a CPU."""
    elements = TILE_ELEMENTS * (BFLOAT16_TILES if sae.recipe.compute == "bfloat16" else 1)
    return max(1, elements // min(sae.W_enc.shape[1], BLOCK))


def columns(W_enc: Float[Tensor, "d_model d_sae"]) -> list[slice]:
    """The blocks of latents that the encoder's product comes in: the dense and the sparse path make the same calls."""
    size = BLOCK if on_cpu(W_enc) else W_enc.shape[1]
    return [slice(a, a + size) for a in range(0, W_enc.shape[1], size)]


def by_columns(
    product: Callable[[slice], Float[Tensor, "rows block"]], W_enc: Float[Tensor, "d_model d_sae"]
) -> Float[Tensor, "rows d_sae"]:
    """The encoder's product, from that of each block."""
    first, *more = columns(W_enc)
    return torch.cat([product(block) for block in (first, *more)], 1) if more else product(first)


def copies(sae: SAE) -> tuple[Float[Tensor, "d_model d_sae"], Float[Tensor, "d_sae d_out"]]:
    """W_enc and W_dec as this step multiplies by them: themselves, or bfloat16 copies."""
    if sae.recipe.compute == "float32":
        return sae.W_enc, sae.W_dec
    return sae.W_enc.bfloat16(), sae.W_dec.bfloat16()


def multiply(a: Float[Tensor, "rows m"], b: Float[Tensor, "m n"]) -> Float[Tensor, "rows n"]:
    """`a b` of two matrices of one precision, summed in float32: on a GPU the result is float32, on a CPU like them.

    A pre-activation that is rounded to bfloat16 misses the thresholds' kernel window: near 0.4 bfloat16 moves in steps
    of 0.002, twice the published bandwidth. A CPU has no such product, so its pre-activations are rounded.
    """
    if on_cpu(a) or a.dtype == torch.float32:
        return a @ b
    if FLOAT32_RESULTS:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def combine(W_enc: Float[Tensor, "d_model d_sae"], weights: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_model"]:
    """`W_enc weights`: what the pre-encoder bias gets from the slopes of b_enc.

    On a CPU the sum goes block by block, because MKL splits a matrix-vector product by threads and its last bits then
    depend on their number (seen with torch 2.13 on an Intel Xeon with AMX).
    """
    if not on_cpu(W_enc):
        return W_enc @ weights
    blocks = [(W_enc[:, block] * weights[block]).sum(1) for block in columns(W_enc)]
    return torch.stack(blocks).sum(0)


def affine(
    bias: Float[Tensor, " n"] | Float[Tensor, "rows n"], a: Float[Tensor, "rows m"], W: Float[Tensor, "m n"]
) -> Float[Tensor, "rows n"]:
    """`bias + a W` in float32, multiplied in W's precision."""
    if W.dtype == torch.float32:
        return torch.addmm(bias, a, W)
    return multiply(a.to(W.dtype), W).float().add_(bias)


def times(a: Float[Tensor, "rows m"], W: Float[Tensor, "m n"]) -> Float[Tensor, "rows n"]:
    """`a W` in float32, multiplied in W's precision."""
    return multiply(a.to(W.dtype), W).float()


def accumulate(
    total: Float[Tensor, "m n"], a: Float[Tensor, "rows m"], b: Float[Tensor, "rows n"], like: Tensor, scale: float = 1
) -> None:
    """Add `scale * a^T b`, multiplied in the precision of `like`, to a float32 total."""
    if like.dtype == torch.float32:
        total.addmm_(a.T, b, alpha=scale)
    else:
        total.add_(multiply(a.to(like.dtype).T, b.to(like.dtype)), alpha=scale)


def prefix_edges(d_sae: int, prefixes: int) -> list[int]:
    """0 and the sizes of the nested dictionaries: the whole, half of it, a quarter, ..."""
    return sorted({0, *(max(1, d_sae >> level) for level in range(prefixes))})


def decoder_forward(
    sae: SAE,
    W_dec: Float[Tensor, "d_sae d_out"],
    f: Float[Tensor, "tile d_sae"],
    x: Float[Tensor, "tile d_model"],
    y: Float[Tensor, "tile d_out"],
    *,
    lead: bool = True,
) -> Decoded:
    """Decode f. Of the ranks that share an SAE, only the lead adds b_dec, the skip connection and -y."""
    blocks = _blocks(sae, f)
    narrow = f.to(W_dec.dtype)
    residual = affine(sae.b_dec if lead else torch.zeros_like(sae.b_dec), narrow[:, blocks[0]], W_dec[blocks[0]])
    if lead:
        if "W_skip" in sae.parameters:
            residual.addmm_(x, sae.parameters["W_skip"])
        residual.sub_(y)
    residuals = [residual]
    for block in blocks[1:]:
        residuals.append(affine(residuals[-1], narrow[:, block], W_dec[block]))
    return Decoded(narrow, residuals)


def decoder_backward(
    sae: SAE,
    W_dec: Float[Tensor, "d_sae d_out"],
    gradients: dict[str, Tensor],
    decoded: Decoded,
    x: Float[Tensor, "tile d_model"],
    rows: slice = slice(None),
) -> Slopes:
    """Add the slopes of W_dec, b_dec and W_skip to `gradients`, and return the slope of f.

    With nested prefixes the latents come in blocks; a block takes part in its own prefix and all longer ones, so its
    slope comes from the sum of those residuals, at no further product. Ranks that share an SAE have all residuals, and
    divide what does not belong to latents by `rows`.
    """
    narrow, residuals = decoded
    blocks = _blocks(sae, narrow)
    squares = [r[rows].square().sum() for r in residuals]
    slope = residuals[-1]
    df: list[Tensor] = []
    for i in reversed(range(len(blocks))):
        accumulate(gradients["W_dec"][blocks[i]], narrow[:, blocks[i]], slope, W_dec)
        df.insert(0, times(slope, W_dec[blocks[i]].T))
        if i:
            slope = slope + residuals[i - 1]
    gradients["b_dec"] += slope[rows].sum(0)
    if "W_skip" in gradients:
        gradients["W_skip"].addmm_(x[rows].T, slope[rows])
    nested = sum(squares[:-1], torch.zeros_like(squares[0]))
    return Slopes(df[0] if len(df) == 1 else torch.cat(df, 1), squares[-1], nested)


def _blocks(sae: SAE, f: Float[Tensor, "tile d_sae"]) -> list[slice]:
    """The latents that each prefix adds to the one before."""
    return [slice(a, b) for a, b in pairwise(prefix_edges(f.shape[1], sae.recipe.prefixes))]


def unit_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> None:
    """Bring each latent's decoder direction to length 1, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))


def keep_largest(z: Float[Tensor, "rows d_sae"], k: int) -> Float[Tensor, "rows d_sae"]:
    """The k largest values of each row, zeros elsewhere."""
    values, index = z.topk(min(k, z.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(z).scatter_(1, index, values)
