"""One training step in plain float64, equation by equation: what every fast path is tested against.

Two halves that check each other. `forward`, `gradients` and `step` are Gemma Scope's JumpReLU in numpy, without
automatic differentiation. `loss` has every architecture and variant as its paper prints the loss, in torch float64:
autograd differentiates it, and the jumps' pseudo-derivatives are all that is put in by hand. No tricks, no speed. The
notation is the papers' (arXiv 2407.14435 and 2408.05147):

    z = W_enc^T (x - b_dec) + b_enc                       pre-activations; relu(z) if the recipe says so
    f = JumpReLU_theta(z) = z * H(z - theta)              H(0) = 0: the comparison is strict
    xhat = W_dec^T f + b_dec
    L = mean over the batch of [ ||x - xhat||^2 + lambda * sum_i H(z_i - theta_i) ]

(and two terms that are not the papers': the L0 target's and, for dead latents, revival * (theta_i - b_enc_i)),
with the pseudo-derivatives, K(u) = 1 for |u| < 1/2 and 0 elsewhere,

    d JumpReLU_theta(z) / d theta = -(theta / eps) K((z - theta) / eps)       d JumpReLU_theta(z) / dz = H(z - theta)
    d H(z - theta) / d theta      = -(1 / eps)     K((z - theta) / eps)       d H(z - theta) / dz      = 0
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64
from numpy import ndarray
from torch import Tensor

from trainer.recipe import Recipe


class Weights(NamedTuple):
    """The five arrays; also used for their gradients and for Adam's second moments."""

    W_enc: Float64[ndarray, "d_model d_sae"]
    W_dec: Float64[ndarray, "d_sae d_model"]
    b_enc: Float64[ndarray, " d_sae"]
    b_dec: Float64[ndarray, " d_model"]
    threshold: Float64[ndarray, " d_sae"]
    """theta, or log(theta) if the recipe trains that."""


class Forward(NamedTuple):
    """Everything one forward pass computes."""

    z: Float64[ndarray, "batch d_sae"]
    gate: Bool[ndarray, "batch d_sae"]
    f: Float64[ndarray, "batch d_sae"]
    xhat: Float64[ndarray, "batch d_model"]
    l0: float
    loss: float


def theta(w: Weights, recipe: Recipe) -> Float64[ndarray, " d_sae"]:
    """The thresholds themselves."""
    return np.exp(w.threshold) if recipe.log_threshold else w.threshold


def forward(
    w: Weights,
    x: Float64[ndarray, "batch d_model"],
    recipe: Recipe,
    coefficient: float,
    dead: Bool[ndarray, " d_sae"] | float = 0.0,
) -> Forward:
    """Reconstruction and loss; `coefficient` is lambda at this step."""
    z = (x - w.b_dec if recipe.pre_bias else x) @ w.W_enc + w.b_enc
    z = np.maximum(z, 0) if recipe.relu_before_jump else z
    gate = z > theta(w, recipe)
    f = z * gate
    xhat = f @ w.W_dec + w.b_dec
    l0 = gate.sum(1).mean()
    target = recipe.target_l0
    sparsity = coefficient * l0 if target is None else coefficient * target / 2 * (l0 / target - 1) ** 2
    revival = recipe.revival * ((theta(w, recipe) - w.b_enc) * dead).sum()
    return Forward(z, gate, f, xhat, float(l0), float(((x - xhat) ** 2).sum(1).mean() + sparsity + revival))


def gradients(
    w: Weights,
    x: Float64[ndarray, "batch d_model"],
    recipe: Recipe,
    coefficient: float,
    dead: Bool[ndarray, " d_sae"] | float = 0.0,
) -> Weights:
    """The (pseudo-)gradient of the loss in every weight."""
    batch, eps, t = len(x), recipe.bandwidth, theta(w, recipe)
    z, gate, f, xhat, l0, _ = forward(w, x, recipe, coefficient)
    kernel = np.abs((z - t) / eps) < 0.5
    d_xhat = 2 * (xhat - x) / batch
    d_f = d_xhat @ w.W_dec.T
    d_step = coefficient / batch * (1.0 if recipe.target_l0 is None else l0 / recipe.target_l0 - 1)
    d_z = d_f * gate  # H(z - theta) > 0 implies z > 0, where ReLU's derivative is 1
    d_theta = (d_f * -(t / eps) * kernel + d_step * -(1 / eps) * kernel).sum(0) + recipe.revival * dead
    d_input = d_z @ w.W_enc.T
    return Weights(
        W_enc=(x - w.b_dec if recipe.pre_bias else x).T @ d_z,
        W_dec=f.T @ d_xhat,
        b_enc=d_z.sum(0) - recipe.revival * dead,
        b_dec=d_xhat.sum(0) - (d_input.sum(0) if recipe.pre_bias else 0),
        threshold=d_theta * t if recipe.log_threshold else d_theta,
    )


def unit_rows(W: Float64[ndarray, "d_sae d_model"]) -> Float64[ndarray, "d_sae d_model"]:
    """Each latent's decoder direction at length 1."""
    return W / np.linalg.norm(W, axis=1, keepdims=True)


def step(
    w: Weights, v: Weights, x: Float64[ndarray, "batch d_model"], recipe: Recipe, number: int, steps: int
) -> tuple[Weights, Weights]:
    """Step `number` (from 0) of `steps`: gradients, projection, Adam, renormalisation; returns weights and moments."""
    g = gradients(w, x, recipe, recipe.sparsity(number))
    if recipe.clip_norm is not None:
        norm = np.sqrt(sum((part**2).sum() for part in g))
        g = Weights(*(part * min(1.0, recipe.clip_norm / norm) for part in g))
    direction = unit_rows(w.W_dec)
    g = g._replace(W_dec=g.W_dec - (g.W_dec * direction).sum(1, keepdims=True) * direction)
    v = Weights(*(recipe.beta2 * old + (1 - recipe.beta2) * new**2 for old, new in zip(v, g, strict=True)))
    rate, correction = recipe.learning_rate(number, steps), 1 - recipe.beta2 ** (number + 1)
    moved = [
        p - rate * slope / (np.sqrt(second / correction) + recipe.adam_eps)
        for p, slope, second in zip(w, g, v, strict=True)
    ]
    w = Weights(*moved)
    w = w._replace(W_dec=unit_rows(w.W_dec))
    return (w if recipe.log_threshold else w._replace(threshold=np.maximum(w.threshold, 0))), v


class _Jump(torch.autograd.Function):
    """value * H(z - theta): JumpReLU for value = z, the step H for value = 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, recipe: Recipe, step: bool) -> Tensor:  # noqa: FBT001  torch's
        """Strict: nothing at z = theta."""
        ctx.save_for_backward(z, theta)
        ctx.recipe, ctx.step = recipe, step
        return (z > theta).double() * (1 if step else z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The module docstring's; with `estimate_inputs` the kernel's term reaches z too, with the sign changed."""
        (slope,), (z, theta), eps = grad_outputs, ctx.saved_tensors, ctx.recipe.bandwidth
        height = (torch.ones_like(theta) if ctx.step else theta) / eps
        kernel = height * (((z - theta) / eps).abs() < 0.5)
        d_z = torch.zeros_like(z) if ctx.step else (z > theta).double()
        if ctx.recipe.estimate_inputs:
            d_z = d_z + kernel
        return slope * d_z, (slope * -kernel).sum(0), None, None


def loss(
    w: dict[str, Float64[Tensor, "..."]],
    x: Float64[Tensor, "batch d_model"],
    recipe: Recipe,
    coefficient: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
    y: Float64[Tensor, "batch d_out"] | None = None,
) -> Float64[Tensor, ""]:
    """The loss that an architecture and recipe train on, for autograd; `y` is what a transcoder reconstructs."""
    y = x if y is None else y
    centred = x - w["b_dec"] if recipe.pre_bias else x
    if recipe.architecture == "gated":
        return _gated_loss(w, centred, y, coefficient)
    z = centred @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1)
    if recipe.architecture == "jumprelu":
        f, penalty = _jumprelu(w, z, norms, recipe, coefficient, dead)
    else:
        z = z.relu()
        rows = z if recipe.architecture == "topk" else z.reshape(1, -1)
        k = recipe.k * len(z) // len(rows)
        cutoff = rows.sort(dim=1, descending=True).values[:, k - 1 : k]
        f, penalty = (rows * (rows >= cutoff)).reshape(z.shape), torch.zeros(())
    width, error = len(norms), torch.zeros((), dtype=torch.float64)
    xhat = torch.zeros_like(y)
    for level in range(recipe.prefixes - 1, -1, -1):  # the squared errors of the nested dictionaries, the whole last
        size = width // 2**level
        xhat = f[:, :size] @ w["W_dec"][:size] + w["b_dec"] + (x @ w["W_skip"] if "W_skip" in w else 0)
        error = error + (y - xhat).square().sum(1).mean()
    if recipe.architecture != "jumprelu" and dead is not None:
        spare = z * dead
        kth = spare.sort(dim=1, descending=True).values[:, recipe.aux_k - 1 : recipe.aux_k]
        e, ehat = (y - xhat).detach(), (spare * (spare >= kth)) @ w["W_dec"]
        penalty = penalty + recipe.aux_coefficient * (e - ehat).square().sum(1).mean()
    return error + penalty


def _jumprelu(
    w: dict[str, Tensor], z: Tensor, norms: Tensor, recipe: Recipe, coefficient: float, dead: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features, and everything in the loss but the squared error."""
    theta = w["threshold"].exp() if recipe.log_threshold else w["threshold"]
    jumps = z.relu() if recipe.relu_before_jump else z
    f, active = _Jump.apply(jumps, theta, recipe, False), _Jump.apply(jumps, theta, recipe, True)  # noqa: FBT003
    assert isinstance(f, Tensor)
    assert isinstance(active, Tensor)
    l0, target = active.sum(1), recipe.target_l0
    if recipe.sparsity_loss == "tanh":
        penalty = coefficient * torch.tanh(recipe.tanh_scale * f * norms).sum(1).mean()
    elif target is None:
        penalty = coefficient * l0.mean()
    elif recipe.sparsity_loss == "l0_per_token":
        penalty = (coefficient * (2 / target) * (l0 - target) ** 2).mean()
    else:
        penalty = coefficient * target / 2 * (l0.mean() / target - 1) ** 2
    penalty = penalty + recipe.pre_act_coefficient * ((theta - z).relu() * norms).sum(1).mean()
    penalty = penalty + recipe.frequency_penalty * (active.mean(0) - recipe.frequency_max).relu().sum()
    if dead is not None:
        penalty = penalty + recipe.revival * ((theta - w["b_enc"]) * dead).sum()
    return f, penalty


def _gated_loss(w: dict[str, Tensor], centred: Tensor, y: Tensor, coefficient: float) -> Tensor:
    """Rajamanoharan et al. 2024a's loss with the RI-L1 penalty: error, penalty, error by the frozen decoder."""
    pi = centred @ w["W_enc"]
    gate = pi + w["b_gate"]
    f = (gate > 0) * (pi * w["r_mag"].exp() + w["b_mag"]).relu()
    error = (y - f @ w["W_dec"] - w["b_dec"]).square().sum(1).mean()
    frozen = (y - gate.relu() @ w["W_dec"].detach() - w["b_dec"].detach()).square().sum(1).mean()
    return error + coefficient * (gate.relu() * w["W_dec"].norm(dim=1)).sum(1).mean() + frozen
