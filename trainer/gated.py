"""The Gated SAE (Rajamanoharan et al. 2024a, arXiv 2404.16014) with the RI-L1 penalty that Gemma Scope compares with.

One encoder matrix serves two paths, which latents fire and how strongly:

    pi = W_enc^T (x - b_dec),   f = H(pi + b_gate) * relu(exp(r_mag) pi + b_mag)

The step has no derivative, so the gate learns from two more terms: the penalty lambda * sum_i relu(pi + b_gate)_i
||W_dec,i||, and the error of reconstructing x from relu(pi + b_gate) by a frozen copy of the decoder. Those two more
products make its step 7 products long where the others take 5. A trained one is a JumpReLU SAE exactly (its appendix;
`trainer.sae.as_jumprelu`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.parts import (
    StepStatistics,
    accumulate,
    affine,
    combine,
    copies,
    decoder_backward,
    decoder_forward,
    tiles,
    times,
    unit_rows,
)
from trainer.recipe import Recipe


@dataclass
class GatedSAE:
    """The tensors, in the units of normalised activations, and the recipe that says how to read them."""

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_gate: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]
    r_mag: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    recipe: Recipe

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name, not copied."""
        return {name: getattr(self, name) for name in ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec")}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """None: everything is trained."""
        return {}

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of normalised activations."""
        pi = (x - self.b_dec if self.recipe.pre_bias else x) @ self.W_enc
        return (pi * self.r_mag.exp() + self.b_mag).relu_() * (pi + self.b_gate > 0)

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
        """One step's gradients and statistics, as `trainer.parts.SAE` says; dead latents are left alone."""
        del dead
        batch, recipe, stretch = len(x), self.recipe, self.r_mag.exp()
        W_enc, W_dec = copies(self)
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        grad = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        fired, open_ = torch.zeros_like(self.r_mag), torch.zeros_like(self.r_mag)
        squares, frozen = (torch.zeros((), device=x.device) for _ in range(2))
        for tile, target in tiles(self, x, y):
            centred = tile - self.b_dec if recipe.pre_bias else tile
            pi = times(centred, W_enc)
            over = (pi + self.b_gate).relu_()
            gate = over.sign()
            f = torch.addcmul(self.b_mag, pi, stretch).relu_().mul_(gate)
            firing = f.sign()
            fired += firing.sum(0)
            df, error, _ = decoder_backward(self, W_dec, grad, decoder_forward(self, W_dec, f, tile, target), tile)
            squares += error
            d_mag = df.mul_(firing)
            grad["b_mag"] += d_mag.sum(0)
            grad["r_mag"] += (d_mag * pi).sum(0) * stretch
            # the gate's own terms; the decoder is held fixed in the second reconstruction
            left = affine(self.b_dec, over, W_dec).sub_(target)
            frozen += left.square().sum()
            open_ += over.sum(0)
            d_gate = times(left, W_dec.T).add_(norms * (coefficient / 2)).mul_(gate)
            grad["b_gate"] += d_gate.sum(0)
            accumulate(grad["W_enc"].T, d_gate.addcmul_(d_mag, stretch), centred, W_enc)
        grad["W_dec"] += (coefficient / 2 * open_ / norms)[:, None] * self.W_dec
        for slope in grad.values():
            slope.mul_(2 / batch)
        if recipe.pre_bias:
            grad["b_dec"] -= combine(self.W_enc, grad["b_gate"] + stretch * grad["b_mag"])
        mse = squares / batch
        loss = mse + frozen / batch + coefficient * (open_ * norms).sum() / batch
        return grad, StepStatistics(loss, mse, fired.sum() / batch, fired)
