"""The JumpReLU sparse autoencoder and transcoder: float32 tensors, forward, and a hand-written backward.

The jump is not differentiable; its pseudo-derivatives are a kernel density estimate of the expected loss's
derivative (Rajamanoharan et al. 2024, arXiv 2407.14435, section 4). `trainer/reference.py` has the equations of every
variant that `trainer.recipe` names; the sparsity losses differ in the price of an active latent only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer import fused, gpu, sparse
from trainer.parallel import ALONE, Ranks
from trainer.parts import (
    ROWS,
    Decoded,
    StepStatistics,
    accumulate,
    affine,
    by_columns,
    combine,
    copies,
    decoder_backward,
    decoder_forward,
    multiply,
    on_cpu,
    tiles,
    unit_rows,
)
from trainer.recipe import Recipe


class _Sums(NamedTuple):
    """Sums over the batch, in place, that the thresholds' gradient and the losses are made of."""

    fired: Float[Tensor, " d_sae"]
    near: Float[Tensor, " d_sae"]
    """Pre-activations within half a bandwidth of the threshold."""
    near_df: Float[Tensor, " d_sae"]
    """The features' slopes there."""
    priced: Float[Tensor, " d_sae"]
    """The prices of an active latent there, where each token has its own."""
    below: Float[Tensor, " d_sae"]
    """The pre-activation loss's slope in theta."""
    d_norm: Float[Tensor, " d_sae"]
    """The penalties' slope in the length of the decoder's rows."""
    squares: Float[Tensor, ""]
    nested: Float[Tensor, ""]
    penalty: Float[Tensor, ""]


class _Weights(NamedTuple):
    """What a step reads of the parameters."""

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    theta: Float[Tensor, " d_sae"]
    norms: Float[Tensor, " d_sae"] | None
    """Lengths of the decoder's rows, where they are not 1."""


class _Tile(NamedTuple):
    """Some rows after the forward pass."""

    x: Float[Tensor, "tile d_model"]
    centred: Float[Tensor, "tile d_model"]
    z: Float[Tensor, "tile d_sae"]
    gate: Float[Tensor, "tile d_sae"]
    f: Float[Tensor, "tile d_sae"]
    decoded: Decoded
    l0: Float[Tensor, " tile"] | None
    """Active latents of each token, of all ranks; None where nothing asks for them."""


@dataclass
class JumpReLUSAE:
    """The tensors, in the units of normalised activations, and the recipe that says how to read them."""

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    """The trained parameter: theta, or log(theta) if `recipe.log_threshold`."""
    recipe: Recipe
    W_skip: Float[Tensor, "d_model d_out"] | None = None
    """A transcoder's affine skip connection: x W_skip is added to the reconstruction."""
    ranks: Ranks = ALONE
    """The processes that share it (`trainer/parallel.py`): the tensors are then of this one's latents."""

    @property
    def theta(self) -> Float[Tensor, " d_sae"]:
        """The thresholds themselves."""
        return self.threshold.exp() if self.recipe.log_threshold else self.threshold

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name, not copied."""
        named = {name: getattr(self, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
        return named if self.W_skip is None else {**named, "W_skip": self.W_skip}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """None: everything is trained."""
        return {}

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of normalised activations."""
        z = self._pre_activations(x - self.b_dec if self.recipe.pre_bias else x, self.W_enc)
        return z * (z > self.theta)

    def decode(
        self, f: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_model"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction from feature activations; a skip connection reads `x` too. Raises ValueError without it."""
        xhat = torch.addmm(self.b_dec, f, self.W_dec)
        if self.W_skip is None:
            return xhat
        if x is None:
            raise ValueError("this transcoder has a skip connection: decode needs x as well as f")
        return xhat.addmm_(x, self.W_skip)

    def constrain(self, *, decoder: bool = True) -> None:
        """Bring the parameters back to where they must be after an update: unit decoder rows, theta >= 0."""
        if decoder and self.recipe.unit_decoder:
            unit_rows(self.W_dec)
        if not self.recipe.log_threshold:
            self.threshold.clamp_(min=0)

    def loss_and_gradients(
        self,
        x: Float[Tensor, "batch d_model"],
        coefficient: float,
        dead: Bool[Tensor, " d_sae"] | None = None,
        y: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[dict[str, Tensor], StepStatistics]:
        """One step's gradients, by parameter name, and statistics; of a wide SAE those of the latents in ROWS alone.

        `coefficient` is lambda at this step; `dead` marks the latents to revive, if the recipe revives any; `y` is
        what a transcoder reconstructs (None: x). Of ranks that share the SAE all take the same batch; loss, L0 and the
        gradients of what no latent owns are then the same on all.
        """
        batch, recipe, theta = len(x), self.recipe, self.theta
        plain = self._plain(x)
        norms = None if recipe.unit_decoder or plain else torch.linalg.vector_norm(self.W_dec, dim=1)
        sums = _Sums(
            *(torch.zeros_like(theta) for _ in range(6)), *(torch.zeros((), device=x.device) for _ in range(3))
        )
        counts = None
        grad = self._sparse_pass(sums, x, y) if plain else None
        if grad is None:
            grad = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            if plain and (self._triton or recipe.compute == "bfloat16"):
                self._fused_pass(grad, sums, x, y)
            else:
                counts = self._pass(_Weights(*copies(self), theta, norms), grad, sums, x, y, coefficient)
        rows = grad.pop(ROWS, None)
        fired, near, priced = sums.fired, sums.near, sums.priced
        for slope in grad.values():
            slope.mul_(2 / batch)
        if recipe.pre_bias:
            grad["b_dec"] -= combine(self.W_enc, grad["b_enc"])
        l0 = (fired if counts is None else counts).sum() / batch
        frequent, revival = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        cost, price = self._sparsity(l0, coefficient)
        if recipe.sparsity_loss == "l0":
            priced = price * near
        if recipe.frequency_penalty:
            excess = fired / batch - recipe.frequency_max
            frequent = recipe.frequency_penalty * excess.relu().sum()
            priced = priced + recipe.frequency_penalty * (excess > 0) * near
        d_theta = (theta * sums.near_df * 2 + priced) / (-recipe.bandwidth * batch)
        if recipe.pre_act_coefficient:
            d_theta += sums.below / batch
        if norms is not None:
            grad["W_dec"] += (sums.d_norm / (batch * norms))[:, None] * self.W_dec
        if recipe.revival and dead is not None:
            d_theta += recipe.revival * dead
            grad["b_enc"] -= recipe.revival * dead
            revival = recipe.revival * ((theta - self.b_enc) * dead).sum()
        grad["threshold"] = d_theta * theta if recipe.log_threshold else d_theta
        self._add_up(grad, [sums.squares, sums.penalty, frequent, revival])
        if rows is not None:
            grad[ROWS] = rows
        mse = sums.squares / batch
        sparsity = sums.penalty / batch
        if recipe.sparsity_loss == "l0":
            sparsity = sparsity + cost
        loss = mse + (sparsity + frequent) + revival
        if recipe.prefixes > 1:
            loss = loss + sums.nested / batch
        return grad, StepStatistics(loss, mse, l0, fired)

    def _pass(
        self,
        weights: _Weights,
        grad: dict[str, Tensor],
        sums: _Sums,
        x: Float[Tensor, "batch d_model"],
        y: Float[Tensor, "batch d_out"] | None,
        coefficient: float,
    ) -> Float[Tensor, " batch"] | None:
        """Add to `grad` (in half units) and `sums` what the batch has to say, tile by tile.

        Ranks that share the SAE do all tiles' forward passes before the first backward pass, with one all-reduce in
        between; the number of active latents of each token, which that brings, is returned.
        """
        forwards: Iterable[_Tile] = (self._forward(weights, sums, *tile) for tile in tiles(self, x, y))
        counts = None
        if self.ranks.world > 1:
            forwards, counts = self._reduced(list(forwards))
        for tile in forwards:
            self._backward(weights, grad, sums, tile, coefficient)
        return counts

    def _forward(
        self, weights: _Weights, sums: _Sums, x: Float[Tensor, "tile d_model"], y: Float[Tensor, "tile d_out"]
    ) -> _Tile:
        centred = x - self.b_dec if self.recipe.pre_bias else x
        z = self._pre_activations(centred, weights.W_enc)
        gate = torch.gt(z, weights.theta, out=torch.empty_like(z))  # as 0.0 and 1.0: booleans are several times slower
        sums.fired.add_(gate.sum(0))
        f = z * gate
        counted = self.ranks.world > 1 or self.recipe.sparsity_loss == "l0_per_token"
        decoded = decoder_forward(self, weights.W_dec, f, x, y, lead=self.ranks.lead)
        return _Tile(x, centred, z, gate, f, decoded, gate.sum(1) if counted else None)

    def _reduced(self, parts: list[_Tile]) -> tuple[Iterable[_Tile], Float[Tensor, " batch"]]:
        """The tiles with the residuals and counts of all ranks' latents, and the counts of the batch."""
        narrow = [tile.decoded.narrow for tile in parts]
        residuals = torch.cat([tile.decoded.residuals[0] for tile in parts])
        flat = torch.cat([residuals.flatten(), *(tile.l0 for tile in parts if tile.l0 is not None)])
        self.ranks.sum(flat)
        rows = [len(tile.x) for tile in parts]
        residuals, counts = flat[: residuals.numel()].view_as(residuals), flat[residuals.numel() :]
        found = zip(parts, narrow, residuals.split(rows), counts.split(rows), strict=True)
        return (tile._replace(decoded=Decoded(f, [r]), l0=n) for tile, f, r, n in found), counts

    def _backward(
        self, weights: _Weights, grad: dict[str, Tensor], sums: _Sums, tile: _Tile, coefficient: float
    ) -> None:
        """Use up a tile: its pre-activations and slopes are overwritten."""
        recipe, rows = self.recipe, self.ranks.share
        W_enc, W_dec, theta, norms = weights
        x, centred, z, gate, f, decoded, l0 = tile
        df, error, error_nested = decoder_backward(self, W_dec, grad, decoded, x, rows)
        sums.squares.add_(error)
        sums.nested.add_(error_nested)
        price = None
        if recipe.sparsity_loss == "tanh":
            scale = recipe.tanh_scale if norms is None else recipe.tanh_scale * norms
            saturated = (f * scale).tanh_()
            sums.penalty.add_(coefficient * saturated.sum())
            slope = saturated.square_().neg_().add_(1).mul_(coefficient * recipe.tanh_scale)
            sums.d_norm.add_((slope * f).sum(0))
            df += slope.mul_(0.5 if norms is None else norms / 2)
        elif recipe.sparsity_loss == "l0_per_token" and recipe.target_l0 is not None and l0 is not None:
            excess = l0 - recipe.target_l0
            sums.penalty.add_(coefficient * 2 / recipe.target_l0 * excess[rows].square().sum())
            price = coefficient * 4 / recipe.target_l0 * excess
        under = self._pre_act_loss(z, norms, sums) if recipe.pre_act_coefficient else None
        window = torch.lt(z.sub_(theta).abs_(), recipe.bandwidth / 2, out=torch.empty_like(z))
        sums.near.add_(window.sum(0))
        if price is not None:
            sums.priced.add_(price @ window)
        through = None
        if recipe.estimate_inputs:
            each = 0.0 if recipe.sparsity_loss == "tanh" else coefficient if price is None else price[:, None]
            through = window * (theta * df + each / 2) / recipe.bandwidth
        sums.near_df.add_(window.mul_(df).sum(0))
        dz = df.mul_(gate)
        for more in (under, through):
            if more is not None:
                dz += more
        accumulate(grad["W_enc"].T, dz, centred, W_enc)
        grad["b_enc"] += dz.sum(0)

    def _add_up(self, grad: dict[str, Tensor], scalars: list[Tensor]) -> None:
        """Replace what no latent owns, gradients and scalars, by the sums over the ranks that share the SAE."""
        if self.ranks.world == 1:
            return
        tensors = [grad[name] for name in ("b_dec", "W_skip") if name in grad] + scalars
        flat = self.ranks.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, found in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(found.view_as(tensor))

    def _pre_act_loss(
        self, z: Float[Tensor, "tile d_sae"], norms: Float[Tensor, " d_sae"] | None, sums: _Sums
    ) -> Float[Tensor, "tile d_sae"]:
        """Count the pre-activation loss in `sums`; returns its slope in z, in half units."""
        coefficient = self.recipe.pre_act_coefficient
        short = (self.theta - z).relu_()
        weight = coefficient if norms is None else coefficient * norms
        sums.penalty.add_((short.sum(0) * weight).sum())
        sums.d_norm.add_(coefficient * short.sum(0))
        under = short.sign_().mul_(weight)
        sums.below.add_(under.sum(0))
        return under.mul_(-0.5)

    def _plain(self, x: Float[Tensor, "batch d_model"]) -> bool:
        """Whether it is what `fused` and `sparse` can do on a CPU, and `gpu`, by one process."""
        here = self._triton or on_cpu(x)
        return here and self.recipe.priced_by_counts and self.ranks == ALONE

    @property
    def _triton(self) -> bool:
        return self.recipe.kernels == "triton"

    def _latents(self) -> fused.Latents:
        return fused.Latents(self.b_enc, self.theta, self.recipe.relu_before_jump, self.recipe.bandwidth / 2)

    def _sparse_pass(
        self, sums: _Sums, x: Float[Tensor, "batch d_model"], y: Float[Tensor, "batch d_out"] | None
    ) -> dict[str, Tensor] | None:
        """`_pass` over the pairs of token and latent that matter; None, and nothing done, if that would not pay."""
        module = gpu if self._triton else sparse
        step = module.step(self, self._latents(), x, x if y is None else y) if module.pays(self) else None
        if step is None:
            return None
        for name in ("fired", "near", "near_df", "squares"):
            getattr(sums, name).add_(getattr(step, name))
        return step.gradients

    def _fused_pass(
        self,
        grad: dict[str, Tensor],
        sums: _Sums,
        x: Float[Tensor, "batch d_model"],
        y: Float[Tensor, "batch d_out"] | None,
    ) -> None:
        """`_pass` with one sweep each way over the pre-activations."""
        W_enc, W_dec = copies(self)
        latents, pointwise = self._latents(), gpu if self._triton else fused
        three = torch.zeros(3, len(self.b_enc), device=x.device)
        for tile, target in tiles(self, x, y):
            centred = (tile - self.b_dec if self.recipe.pre_bias else tile).to(W_enc.dtype)
            z = by_columns(lambda block, centred=centred: multiply(centred, W_enc[:, block]), W_enc)
            f = torch.empty_like(z, dtype=W_dec.dtype)
            pointwise.forward(z, f, latents, sums.fired)
            residual = multiply(f, W_dec).float().add_(self.b_dec).sub_(target)
            sums.squares.add_(residual.square().sum())
            grad["b_dec"] += residual.sum(0)
            narrow = residual.to(W_dec.dtype)
            grad["W_dec"] += multiply(f.T, narrow)
            df = multiply(narrow, W_dec.T)
            pointwise.backward(z, df, latents, three)
            grad["W_enc"].T.add_(multiply(df.to(W_enc.dtype).T, centred))
        sums.near.add_(three[0])
        sums.near_df.add_(three[1])
        grad["b_enc"] += three[2]

    def _sparsity(self, l0: Float[Tensor, ""], coefficient: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss of the batch's mean L0 and its slope: the price of one active latent."""
        target = self.recipe.target_l0
        if target is None:
            return coefficient * l0, torch.full_like(l0, coefficient)
        excess = l0 / target - 1
        return coefficient * target / 2 * excess.square(), coefficient * excess

    def _pre_activations(
        self, centred: Float[Tensor, "batch d_model"], W_enc: Float[Tensor, "d_model d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        z = by_columns(lambda block: affine(self.b_enc[block], centred, W_enc[:, block]), W_enc)
        return z.relu_() if self.recipe.relu_before_jump else z
