"""Adam without a first moment, between the decoder's projection and renormalisation, as Gemma Scope updates.

The order is the published one (arXiv 2408.05147, section 3.2): remove from each decoder row's gradient the part along
the row, take the Adam step, bring the rows back to unit length. With beta1 = 0 the first moment is the gradient, so
it is not stored: 8 bytes per parameter instead of 12.
"""

import torch
from torch import Tensor

from trainer.recipe import Recipe
from trainer.sae import JumpReLUSAE


def second_moments(sae: JumpReLUSAE) -> dict[str, Tensor]:
    """Adam's state before the first step."""
    return {name: torch.zeros_like(p) for name, p in sae.parameters.items()}


def project(W_dec: Tensor, gradient: Tensor) -> None:
    """Remove in place from each row of the decoder gradient its component along that (unit) decoder row."""
    gradient.addcmul_((gradient * W_dec).sum(1, keepdim=True), W_dec, value=-1)


def clip(gradients: dict[str, Tensor], most: float) -> None:
    """Scale all gradients in place so that their joint norm is at most `most`; the device is not waited for."""
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    factor = (most / norm).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor)


def update(
    sae: JumpReLUSAE,
    gradients: dict[str, Tensor],
    moments: dict[str, Tensor],
    *,
    step: int,
    rate: float,
    recipe: Recipe,
) -> None:
    """One update of the parameters and moments in place; `step` counts from 0. The gradients are used up."""
    if recipe.clip_norm is not None:
        clip(gradients, recipe.clip_norm)
    project(sae.W_dec, gradients["W_dec"])
    correction = 1 - recipe.beta2 ** (step + 1)
    for name, parameter in sae.parameters.items():
        gradient, second = gradients[name], moments[name]
        second.mul_(recipe.beta2).addcmul_(gradient, gradient, value=1 - recipe.beta2)
        scale = (second / correction).sqrt_().add_(recipe.adam_eps)
        parameter.addcdiv_(gradient, scale, value=-rate)
    sae.constrain()
