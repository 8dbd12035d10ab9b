"""TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv 2412.06410), with AuxK.

f keeps the k largest positive pre-activations of each token, or the batch * k largest of a batch. The loss is the
squared error and, for dead latents, AuxK: the error that is left, held fixed, is reconstructed from the `aux_k` largest
pre-activations of dead latents. There is no sparsity loss, so the coefficient of a step is not used.

BatchTopK keeps a running mean of the smallest value that fired, in float64; outside of training that is its threshold,
so that a token's features do not depend on its batch, and the SAE is a JumpReLU (`trainer.sae.as_jumprelu`).
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from trainer.parts import (
    StepStatistics,
    accumulate,
    affine,
    combine,
    copies,
    decoder_backward,
    decoder_forward,
    keep_largest,
    on_cpu,
    tiles,
    times,
    unit_rows,
)
from trainer.recipe import Recipe


def _no_threshold() -> Float64[Tensor, ""]:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class TopKSAE:
    """The tensors, in the units of normalised activations, and the recipe that says how to read them."""

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    recipe: Recipe
    threshold: Float64[Tensor, ""] = field(default_factory=_no_threshold)
    """BatchTopK: running mean of the smallest value that fired; 0 before the first step."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name, not copied."""
        return {name: getattr(self, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """BatchTopK's running threshold."""
        return {"threshold": self.threshold} if self.recipe.architecture == "batchtopk" else {}

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of normalised activations: the k largest, or those above BatchTopK's threshold."""
        z = self._pre_activations(x - self.b_dec if self.recipe.pre_bias else x, self.W_enc)
        if self.recipe.architecture == "batchtopk":
            return z * (z > self.threshold.float())
        return keep_largest(z, self.recipe.k)

    def decode(
        self, f: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_model"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction from feature activations; `x` is not used."""
        del x
        return torch.addmm(self.b_dec, f, self.W_dec)

    def constrain(self, *, decoder: bool = True) -> None:
        """Bring the decoder's rows back to length 1."""
        if decoder and self.recipe.unit_decoder:
            unit_rows(self.W_dec)

    def loss_and_gradients(
        self,
        x: Float[Tensor, "batch d_model"],
        coefficient: float,
        dead: Bool[Tensor, " d_sae"] | None = None,
        y: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[dict[str, Tensor], StepStatistics]:
        """One step's gradients and statistics, as `trainer.parts.SAE` says; moves BatchTopK's running threshold."""
        del coefficient
        batch, recipe = len(x), self.recipe
        W_enc, W_dec = copies(self)
        grad = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        fired = torch.zeros_like(self.b_enc)
        squares, nested, auxiliary = (torch.zeros((), device=x.device) for _ in range(3))
        # asking the device whether any latent is dead would wait for it; on a CPU it saves two products
        revive = recipe.aux_coefficient > 0 and dead is not None and (not on_cpu(dead) or bool(dead.any()))
        whole = self._encode_batch(x, W_enc, y) if recipe.architecture == "batchtopk" else None
        start = 0
        for tile, target in tiles(self, x, y):
            centred = tile - self.b_dec if recipe.pre_bias else tile
            if whole is None:
                z = self._pre_activations(centred, W_enc)
                f = keep_largest(z, recipe.k)
            else:
                z, cutoff = whole[0][start : start + len(tile)], whole[1]
                f = z * (z >= cutoff)
            start += len(tile)
            gate = f.sign()
            fired += gate.sum(0)
            decoded = decoder_forward(self, W_dec, f, tile, target)
            df, error, error_nested = decoder_backward(self, W_dec, grad, decoded, tile)
            squares += error
            nested += error_nested
            dz = df.mul_(gate)
            if revive and dead is not None:
                spare = keep_largest(z * dead, recipe.aux_k)
                left = affine(decoded.residuals[-1], spare, W_dec)
                auxiliary += recipe.aux_coefficient * left.square().sum()
                accumulate(grad["W_dec"], spare, left, W_dec, recipe.aux_coefficient)
                dz += times(left, W_dec.T).mul_(spare.sign_()).mul_(recipe.aux_coefficient)
            accumulate(grad["W_enc"].T, dz, centred, W_enc)
            grad["b_enc"] += dz.sum(0)
        for slope in grad.values():
            slope.mul_(2 / batch)
        if recipe.pre_bias:
            grad["b_dec"] -= combine(self.W_enc, grad["b_enc"])
        mse = squares / batch
        return grad, StepStatistics(mse + (nested + auxiliary) / batch, mse, fired.sum() / batch, fired)

    def _encode_batch(
        self,
        x: Float[Tensor, "batch d_model"],
        W_enc: Float[Tensor, "d_model d_sae"],
        y: Float[Tensor, "batch d_out"] | None,
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, ""]]:
        """The whole batch's pre-activations and the smallest that fires; moves the running threshold to it."""
        shift = self.b_dec if self.recipe.pre_bias else torch.zeros((), device=x.device)
        z = torch.cat([self._pre_activations(tile - shift, W_enc) for tile, _ in tiles(self, x, y)])
        cutoff = kth_largest(z, min(len(x) * self.recipe.k, z.numel()))
        cutoff = cutoff.clamp(min=torch.finfo(z.dtype).tiny)  # fewer positive values than that: all of them fire
        smallest = torch.where(z >= cutoff, z, torch.inf).amin().double()
        moved = torch.lerp(self.threshold, smallest, self.recipe.threshold_rate)
        moved = torch.where(self.threshold == 0, smallest, moved)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
        return z, cutoff

    def _pre_activations(
        self, centred: Float[Tensor, "batch d_model"], W_enc: Float[Tensor, "d_model d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        return affine(self.b_enc, centred, W_enc).relu_()


def kth_largest(z: Float[Tensor, "batch d_sae"], k: int) -> Float[Tensor, ""]:
    """The k-th largest of all values.

    On a CPU the largest of each of many groups of values bound it from below, so that a small part is left to sort.
    """
    flat = z.flatten()
    if on_cpu(z):
        # at least k values are >= the smallest of the k largest group maxima, if there are that many groups
        size = max(1, len(flat) // (4 * k))
        groups = flat[: len(flat) // size * size].view(-1, size).amax(1)
        if size > 1:
            kept = flat[flat >= groups.topk(k, sorted=False).values.amin()]
            flat = kept if len(kept) >= k else flat  # fewer only where there are NaN, which the loss must show
    return flat.topk(k, sorted=False).values.amin()
