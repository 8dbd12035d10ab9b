"""The JumpReLU sparse autoencoder: float32 tensors, forward, and a hand-written backward.

Gradients are the paper's (equations in `trainer/reference.py`), written out instead of left to autograd: nothing is
kept for a graph, no gradient of the input is computed (the pre-encoder bias gets -(sum over the batch of dz) W_enc^T,
one vector), and the batch goes through in tiles whose pre-activations stay in cache, which on a CPU halves the time
of a step. The trade-off is that a new architecture brings its own backward. What `trainer.train` asks of one:
`parameters`, `loss_and_gradients`, `constrain`, `encode` and `decode`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.recipe import Recipe

TILE_ELEMENTS = 1 << 20
"""Pre-activations per tile on a CPU: 4 MiB of float32. On a GPU the batch is one tile."""


class StepStatistics(NamedTuple):
    """What one step measured, on the SAE's device."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """Mean over the batch of ||x - xhat||^2, in units of E||x||^2 = 1."""
    l0: Float[Tensor, ""]
    fired: Float[Tensor, " d_sae"]
    """How often each latent fired in the batch."""


@dataclass
class JumpReLUSAE:
    """The five tensors, in the units of normalised activations, and the recipe that says how to read them."""

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"]
    """The trained parameter: theta, or log(theta) if `recipe.log_threshold`."""
    recipe: Recipe

    @property
    def theta(self) -> Float[Tensor, " d_sae"]:
        """The thresholds themselves."""
        return self.threshold.exp() if self.recipe.log_threshold else self.threshold

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name, not copied."""
        return {name: getattr(self, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of normalised activations."""
        z = self._pre_activations(x - self.b_dec if self.recipe.pre_bias else x)
        return z * (z > self.theta)

    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_model"]:
        """Reconstruction from feature activations."""
        return torch.addmm(self.b_dec, f, self.W_dec)

    def constrain(self) -> None:
        """Bring the parameters back to where they must be after an update: unit decoder rows, theta >= 0."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        if not self.recipe.log_threshold:
            self.threshold.clamp_(min=0)

    def loss_and_gradients(
        self, x: Float[Tensor, "batch d_model"], coefficient: float, dead: Bool[Tensor, " d_sae"] | None = None
    ) -> tuple[dict[str, Tensor], StepStatistics]:
        """One step's gradients, by parameter name, and statistics.

        `coefficient` is lambda at this step; `dead` marks the latents to revive, if the recipe revives any.
        """
        batch, recipe, theta = len(x), self.recipe, self.theta
        grad = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        near_df, near, fired = (torch.zeros_like(theta) for _ in range(3))
        squares = torch.zeros((), device=x.device)
        for tile in self._tiles(x):
            centred = tile - self.b_dec if recipe.pre_bias else tile
            z = self._pre_activations(centred)
            gate = torch.gt(z, theta, out=torch.empty_like(z))  # as 0.0 and 1.0: booleans are several times slower
            fired += gate.sum(0)
            f = z * gate
            residual = self.decode(f).sub_(tile)
            squares += residual.square().sum()
            grad["W_dec"].addmm_(f.T, residual)
            grad["b_dec"] += residual.sum(0)
            df = residual @ self.W_dec.T
            window = torch.lt(z.sub_(theta).abs_(), recipe.bandwidth / 2, out=torch.empty_like(z))
            near += window.sum(0)
            near_df += window.mul_(df).sum(0)
            dz = df.mul_(gate)
            grad["W_enc"].addmm_(centred.T, dz)
            grad["b_enc"] += dz.sum(0)
        for slope in grad.values():
            slope.mul_(2 / batch)
        if recipe.pre_bias:
            grad["b_dec"] -= self.W_enc @ grad["b_enc"]
        l0 = fired.sum() / batch
        sparsity, price = self._sparsity(l0, coefficient)
        d_theta = (theta * near_df * 2 + price * near) / (-recipe.bandwidth * batch)
        revival = torch.zeros((), device=x.device)
        if recipe.revival and dead is not None:
            d_theta += recipe.revival * dead
            grad["b_enc"] -= recipe.revival * dead
            revival = recipe.revival * ((theta - self.b_enc) * dead).sum()
        grad["threshold"] = d_theta * theta if recipe.log_threshold else d_theta
        mse = squares / batch
        return grad, StepStatistics(mse + sparsity + revival, mse, l0, fired)

    def _sparsity(self, l0: Float[Tensor, ""], coefficient: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The sparsity loss and its slope in L0: the price of one active latent."""
        target = self.recipe.target_l0
        if target is None:
            return coefficient * l0, torch.full_like(l0, coefficient)
        excess = l0 / target - 1
        return coefficient * target / 2 * excess.square(), coefficient * excess

    def _pre_activations(self, centred: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        z = torch.addmm(self.b_enc, centred, self.W_enc)
        return z.relu_() if self.recipe.relu_before_jump else z

    def _tiles(self, x: Float[Tensor, "batch d_model"]) -> Iterator[Float[Tensor, "tile d_model"]]:
        rows = len(x) if x.is_cuda else max(1, TILE_ELEMENTS // self.W_enc.shape[1])
        yield from x.split(rows)


def init_sae(
    d_model: int,
    d_sae: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    mean: Float[Tensor, " d_model"] | None = None,
    device: torch.device | str = "cpu",
) -> JumpReLUSAE:
    """A fresh SAE as Gemma Scope starts one (section 3.2): W_dec He-uniform then unit rows, W_enc its transpose.

    `mean` is the mean normalised activation; it is needed, and used, only if the recipe starts b_dec there. The
    weights depend on the seed and the sizes alone, not on the device.
    """
    if d_model < 1 or d_sae < 1:
        raise ValueError(f"an SAE needs d_model >= 1 and d_sae >= 1, got {d_model} and {d_sae}")
    bound = (6 / d_model) ** 0.5
    W_dec = torch.empty(d_sae, d_model).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    b_dec = torch.zeros(d_model)
    if recipe.init_b_dec_to_mean:
        if mean is None:
            raise ValueError("the recipe starts b_dec at the mean activation, but no mean was given")
        b_dec = mean.detach().to("cpu", torch.float32).clone()
    start = torch.full((d_sae,), recipe.threshold_init)
    tensors = (W_dec.T.contiguous(), W_dec, torch.zeros(d_sae), b_dec, start.log() if recipe.log_threshold else start)
    return JumpReLUSAE(*(t.to(device) for t in tensors), recipe=recipe)
