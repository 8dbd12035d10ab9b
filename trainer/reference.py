"""One training step in plain float64, equation by equation: what every fast path is tested against.

No automatic differentiation, no tricks, no speed. The notation is the papers' (arXiv 2407.14435 and 2408.05147):

    z = W_enc^T (x - b_dec) + b_enc                       pre-activations; relu(z) if the recipe says so
    f = JumpReLU_theta(z) = z * H(z - theta)              H(0) = 0: the comparison is strict
    xhat = W_dec^T f + b_dec
    L = mean over the batch of [ ||x - xhat||^2 + lambda * sum_i H(z_i - theta_i) ]

(and two terms that are not the papers': the L0 target's and, for dead latents, revival * (theta_i - b_enc_i)),
with the pseudo-derivatives, K(u) = 1 for |u| < 1/2 and 0 elsewhere,

    d JumpReLU_theta(z) / d theta = -(theta / eps) K((z - theta) / eps)       d JumpReLU_theta(z) / dz = H(z - theta)
    d H(z - theta) / d theta      = -(1 / eps)     K((z - theta) / eps)       d H(z - theta) / dz      = 0
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

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
