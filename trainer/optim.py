"""Adam between the decoder's projection and renormalisation, as Gemma Scope updates; dense, or by latent.

The order is the published one (arXiv 2408.05147, section 3.2): remove from each decoder row's gradient the part along
the row, take the Adam step, bring the rows back to unit length. With beta1 = 0 the first moment is the gradient, so
it is not stored: 8 bytes per parameter instead of 12.

With beta1 = 0 a latent without a gradient does not move either, and its second moments only decay. So where it is
known which latents have one (`trainer.parts.ROWS`), only their rows are updated, and the other moments multiplied by
beta2. `lazy_adam` leaves those alone too and multiplies beta2^n in when the latent next has a gradient, n the updates
missed. The vectors are small and always updated whole.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer import gpu
from trainer.parallel import ALONE, LATENT_AXIS, Ranks
from trainer.parts import ROWS, SAE, on_cpu, unit_rows
from trainer.recipe import Recipe

FIRST = "first."
"""What the names of first moments begin with, if there are any."""
UPDATES = "updates"
"""Lazy Adam: the number of updates that the second moments of each latent's rows have been brought up to, [d_sae]."""
MATRICES = ("W_enc", "W_dec")
"""The parameters that have a row for each latent, W_enc when seen with the latents along the first axis."""
CHUNK = 1 << 16
"""Elements of a matrix's rows that are updated at a time, so that they stay in cache: 256 KiB of float32."""


def second_moments(sae: SAE) -> dict[str, Tensor]:
    """Adam's state before the first step: second moments by parameter, and what else the recipe needs."""
    state = {name: torch.zeros_like(p) for name, p in sae.parameters.items()}
    if sae.recipe.beta1:
        state |= {FIRST + name: torch.zeros_like(p) for name, p in sae.parameters.items()}
    if sae.recipe.lazy_adam:
        state[UPDATES] = torch.zeros(sae.W_enc.shape[1], dtype=torch.int64, device=sae.W_enc.device)
    return state


def project(W_dec: Tensor, gradient: Tensor) -> None:
    """Remove in place from each row of the decoder gradient its component along that (unit) decoder row."""
    gradient.addcmul_((gradient * W_dec).sum(1, keepdim=True), W_dec, value=-1)


def clip(gradients: dict[str, Tensor], most: float, ranks: Ranks = ALONE) -> None:
    """Scale all gradients in place so that their joint norm is at most `most`; the device is not waited for.

    Of ranks that share an SAE each has the gradients of its latents, and the lead counts those that all have.
    """
    counted = {name: float(ranks.lead or name in LATENT_AXIS) for name in gradients}
    norm = ranks.sum(torch.stack([g.square().sum() * counted[name] for name, g in gradients.items()])).sum().sqrt()
    factor = (most / norm).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor)


def update(
    sae: SAE,
    gradients: dict[str, Tensor],
    moments: dict[str, Tensor],
    *,
    step: int,
    rate: float,
    recipe: Recipe,
    ranks: Ranks = ALONE,
) -> None:
    """One update of the parameters and moments in place; `step` counts from 0. The gradients are used up.

    `ranks` are the processes that share the SAE.
    """
    if recipe.beta1 and ROWS in gradients:
        gradients = spread(sae, gradients)
    rows = gradients.pop(ROWS, None)
    if recipe.clip_norm is not None:
        clip(gradients, recipe.clip_norm, ranks)
    if rows is None and recipe.lazy_adam:
        rows = touched(gradients).nonzero().squeeze(1)
        gradients |= {name: _by_latent(name, gradients[name])[rows] for name in MATRICES}
        gradients["W_enc"] = gradients["W_enc"].T
    by_rows = rows is not None or recipe.kernels == "triton"
    if recipe.unit_decoder and not by_rows:
        project(sae.W_dec, gradients["W_dec"])
    for name, parameter in sae.parameters.items():
        if not by_rows or name not in MATRICES:
            first = moments.get(FIRST + name)
            _adam(parameter, gradients[name], moments[name], first, step, rate, recipe, recipe.beta2)
    if by_rows:
        _update_rows(sae, gradients, moments, rows, step=step, rate=rate, recipe=recipe)
    sae.constrain(decoder=not by_rows)


def _adam(
    parameter: Tensor,
    gradient: Tensor,
    second: Tensor,
    first: Tensor | None,
    step: int,
    rate: float,
    recipe: Recipe,
    decay: float | Tensor,
) -> None:
    """Adam's update of one tensor, or of part of one, in place; `decay` is what the second moments still decay by."""
    second.mul_(decay).addcmul_(gradient, gradient, value=1 - recipe.beta2)
    scale = (second / (1 - recipe.beta2 ** (step + 1))).sqrt_().add_(recipe.adam_eps)
    if first is not None:
        gradient = first.lerp_(gradient, 1 - recipe.beta1) / (1 - recipe.beta1 ** (step + 1))
    parameter.addcdiv_(gradient, scale, value=-rate)


def _by_latent(name: str, matrix: Tensor) -> Float[Tensor, "latents d"]:
    return matrix.T if name == "W_enc" else matrix


def touched(gradients: dict[str, Tensor]) -> Bool[Tensor, " d_sae"]:
    """The latents whose rows have a gradient that is not zero."""
    largest = [torch.linalg.vector_norm(_by_latent(n, gradients[n]), ord=torch.inf, dim=1) for n in MATRICES]
    return (largest[0] != 0) | (largest[1] != 0)


def spread(sae: SAE, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with zeros in place of the rows that they do not have; those that have all as they are."""
    if ROWS not in gradients:
        return gradients
    whole = {name: slope for name, slope in gradients.items() if name != ROWS}
    for name in MATRICES:
        whole[name] = torch.zeros_like(getattr(sae, name))
        _by_latent(name, whole[name])[gradients[ROWS]] = _by_latent(name, gradients[name])
    return whole


def _update_rows(
    sae: SAE,
    gradients: dict[str, Tensor],
    moments: dict[str, Tensor],
    rows: Int[Tensor, " touched"] | None,
    *,
    step: int,
    rate: float,
    recipe: Recipe,
) -> None:
    """Projection, Adam and renormalisation of some latents' rows, which `gradients` are for, or of all."""
    if rows is None:
        decay = torch.full((1,), recipe.beta2, device=sae.W_enc.device)
    elif recipe.lazy_adam:
        decay = _decay(step + 1 - moments[UPDATES][rows], recipe)
        moments[UPDATES][rows] = step + 1
    else:
        decay = torch.ones(len(rows), device=rows.device)
        for name in MATRICES:
            moments[name].mul_(recipe.beta2)
    for name in MATRICES:
        own, slope, second = (_by_latent(name, t) for t in (getattr(sae, name), gradients[name], moments[name]))
        unit = name == "W_dec" and recipe.unit_decoder
        if recipe.kernels == "triton":
            gpu.update_rows(own, slope, second, rows, decay, step=step, rate=rate, recipe=recipe, unit=unit)
        elif rows is not None:
            _in_chunks(own, slope, second, rows, decay, step=step, rate=rate, recipe=recipe, unit=unit)


def _in_chunks(
    parameters: Float[Tensor, "d_sae d"],
    slopes: Float[Tensor, "touched d"],
    seconds: Float[Tensor, "d_sae d"],
    rows: Int[Tensor, " touched"],
    decay: Float[Tensor, " touched"],
    *,
    step: int,
    rate: float,
    recipe: Recipe,
    unit: bool,
) -> None:
    size = max(1, CHUNK // parameters.shape[1] if on_cpu(rows) else len(rows))
    for part, slope, left in zip(rows.split(size), slopes.split(size), decay.split(size), strict=True):
        parameter, second = parameters.index_select(0, part), seconds.index_select(0, part)
        if unit:
            project(parameter, slope)
        _adam(parameter, slope, second, None, step, rate, recipe, left[:, None])
        if unit:
            unit_rows(parameter)
        parameters.index_copy_(0, part, parameter)  # twice as fast as indexing
        seconds.index_copy_(0, part, second)


def _decay(updates: Int[Tensor, " latents"], recipe: Recipe) -> Float[Tensor, " latents"]:
    """beta2 to the power of the updates."""
    return torch.pow(torch.full((), recipe.beta2, dtype=torch.float64, device=updates.device), updates).float()
