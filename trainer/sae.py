"""One constructor for every architecture, from sizes or from saved tensors, and what each becomes as a JumpReLU.

`trainer/parts.py` says what the trainer asks of an SAE; `jumprelu.py`, `topk.py` and `gated.py` are the architectures.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.gated import GatedSAE
from trainer.jumprelu import JumpReLUSAE
from trainer.parallel import ALONE, Ranks
from trainer.parts import SAE, StepStatistics
from trainer.recipe import Recipe
from trainer.topk import TopKSAE

__all__ = [
    "SAE",
    "GatedSAE",
    "JumpReLUSAE",
    "StepStatistics",
    "TopKSAE",
    "as_jumprelu",
    "init_sae",
    "ranks_of",
    "sae_of",
    "shapes",
]

BLOCK = 1024
"""Rows of a matrix that are drawn at a time."""

ARCHITECTURES: dict[str, type[JumpReLUSAE] | type[TopKSAE] | type[GatedSAE]] = {
    "jumprelu": JumpReLUSAE,
    "topk": TopKSAE,
    "batchtopk": TopKSAE,
    "gated": GatedSAE,
}


def init_sae(
    d_model: int,
    d_sae: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    mean: Float[Tensor, " d_out"] | None = None,
    device: torch.device | str = "cpu",
    d_out: int | None = None,
    sample: Float[Tensor, "sample d_model"] | None = None,
    ranks: Ranks = ALONE,
) -> SAE:
    """A fresh SAE as Gemma Scope starts one (section 3.2): W_dec He-uniform then unit rows, W_enc its transpose.

    With `d_out` it is a transcoder: its encoder is drawn for itself (Gemma Scope, appendix C, which says no more than
    that it is not W_dec^T; unit columns of the decoder's distribution are ours), the skip connection, if the recipe
    has one, starts at 0. `mean` is the mean of what is reconstructed, normalised; it is needed, and used, only if the
    recipe starts b_dec there, and `sample`, some normalised activations, only if the recipe starts b_enc from data.
    In memory W_enc lies latent by latent, like W_dec, so that an update of some latents reads and writes whole rows.
    The weights depend on the seed and the sizes alone, not on the device. Of `ranks` that share a JumpReLU SAE each
    gets its part of the same weights, and never holds more. Raises ValueError for what is missing.
    """
    if min(d_model, d_sae, d_out or 1) < 1:
        raise ValueError(f"an SAE needs d_model, d_sae and d_out >= 1, got {d_model}, {d_sae} and {d_out}")
    active = recipe.k if recipe.architecture in {"topk", "batchtopk"} else recipe.target_l0
    if active is not None and active > d_sae:
        raise ValueError(f"the recipe wants {active} active latents, the SAE has {d_sae}")
    if d_out is None and recipe.skip:
        raise ValueError("the recipe has a skip connection, which only a transcoder can have: give d_out")
    if d_out is not None and recipe.pre_bias:
        raise ValueError("a transcoder has no pre-encoder bias: take `recipe.for_transcoder()`")
    rng = torch.Generator().manual_seed(seed)
    own = ranks.latents(d_sae)
    W_dec = _rows(d_sae, d_out or d_model, recipe, rng, own)
    W_enc = W_dec.clone().T if d_out is None else _rows(d_sae, d_model, recipe, rng, own).T
    if recipe.decoder_init == "uniform":
        W_enc *= d_model / d_sae
    b_dec = torch.zeros(W_dec.shape[1])
    if recipe.init_b_dec_to_mean:
        if mean is None:
            raise ValueError("the recipe starts b_dec at the mean activation, but no mean was given")
        b_dec = mean.detach().to("cpu", torch.float32).clone()
    zeros, start = torch.zeros(len(W_dec)), torch.full((len(W_dec),), recipe.threshold_init)
    if recipe.init_l0 is not None:
        if sample is None:
            raise ValueError("the recipe starts b_enc from data, but no sample of activations was given")
        z = (sample.detach().to("cpu", torch.float32) - (b_dec if recipe.pre_bias else 0)) @ W_enc
        zeros = start - z.quantile(max(0.0, 1 - recipe.init_l0 / d_sae), dim=0)
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    if recipe.architecture == "gated":
        tensors |= {name: torch.zeros(d_sae) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        tensors["b_enc"] = zeros
    if recipe.architecture == "jumprelu":
        tensors["threshold"] = start.log() if recipe.log_threshold else start
    elif recipe.architecture == "batchtopk":
        tensors["threshold"] = torch.zeros((), dtype=torch.float64)
    if recipe.skip:
        tensors["W_skip"] = torch.zeros(d_model, W_dec.shape[1])
    sae = sae_of(recipe, {name: tensor.to(device) for name, tensor in tensors.items()})
    return replace(sae, ranks=ranks) if isinstance(sae, JumpReLUSAE) else sae


def _rows(rows: int, d: int, recipe: Recipe, rng: torch.Generator, own: slice) -> Float[Tensor, "own d"]:
    """The `own` ones of decoder rows as the recipe draws them: He-uniform at length 1, or uniform in +-1/sqrt(d)."""
    bound = (6 / d) ** 0.5 if recipe.decoder_init == "he_unit" else d**-0.5
    W = torch.empty(own.stop - own.start, d)
    for start in range(0, rows, BLOCK):  # all are drawn, since each comes after those before it
        block = torch.empty(min(BLOCK, rows - start), d).uniform_(-bound, bound, generator=rng)
        first, end = max(start, own.start), min(start + len(block), own.stop)
        if first < end:
            W[first - own.start : end - own.start] = block[first - start : end - start]
    return W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True)) if recipe.decoder_init == "he_unit" else W


def ranks_of(sae: SAE) -> Ranks:
    """The processes that share the SAE."""
    return sae.ranks if isinstance(sae, JumpReLUSAE) else ALONE


def sae_of(recipe: Recipe, tensors: Mapping[str, Tensor]) -> SAE:
    """The SAE that has these tensors, parameters and buffers by name; they are not copied."""
    make: Any = ARCHITECTURES[recipe.architecture]
    return make(**tensors, recipe=recipe)


def shapes(recipe: Recipe, d_model: int, d_sae: int, d_out: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters and buffers that `sae_of` wants, by name; `d_out` for a transcoder."""
    out = d_out or d_model
    found: dict[str, tuple[int, ...]] = {"W_enc": (d_model, d_sae), "W_dec": (d_sae, out), "b_dec": (out,)}
    if recipe.architecture == "gated":
        return found | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (d_sae,))
    found |= {"b_enc": (d_sae,)}
    if recipe.architecture == "jumprelu":
        found |= {"threshold": (d_sae,)}
    elif recipe.architecture == "batchtopk":
        found |= {"threshold": ()}
    return found | ({"W_skip": (d_model, out)} if recipe.skip else {})


def as_jumprelu(sae: SAE) -> JumpReLUSAE:
    """The JumpReLU SAE that computes the same features and reconstructions, with unit decoder rows and theta >= 0.

    BatchTopK: its running threshold, for every latent. Gated: pi + b_gate > 0 says that exp(r_mag) pi + b_mag exceeds
    b_mag - exp(r_mag) b_gate, which is the threshold. Decoder rows that the recipe leaves free are scaled to length 1,
    and what they were goes to the encoder and the threshold, so features are then f ||W_dec||. TopK has none (a
    feature depends on the token's others): raises ValueError. New tensors, unless nothing had to change.
    """
    recipe = replace(sae.recipe, architecture="jumprelu", log_threshold=False, unit_decoder=True)
    if isinstance(sae, JumpReLUSAE):
        if sae.recipe.unit_decoder:
            return sae
        parts, b_enc, theta, stretch = sae, sae.b_enc, sae.theta, torch.ones_like(sae.b_enc)
    elif isinstance(sae, TopKSAE) and sae.recipe.architecture == "batchtopk":
        parts, b_enc, stretch = sae, sae.b_enc, torch.ones_like(sae.b_enc)
        theta = sae.threshold.float().expand_as(b_enc)
    elif isinstance(sae, GatedSAE):
        parts, b_enc, stretch = sae, sae.b_mag, sae.r_mag.exp()
        theta = sae.b_mag - stretch * sae.b_gate
    else:
        raise ValueError("a TopK SAE has no threshold, so it is no JumpReLU; BatchTopK is the one that exports as one")
    norms = torch.ones_like(b_enc) if sae.recipe.unit_decoder else torch.linalg.vector_norm(parts.W_dec, dim=1)
    return JumpReLUSAE(
        W_enc=parts.W_enc * (stretch * norms),
        W_dec=parts.W_dec / norms[:, None],
        b_enc=b_enc * norms,
        b_dec=parts.b_dec.clone(),
        threshold=(theta * norms).clamp(min=0),
        recipe=recipe,
        W_skip=parts.W_skip if isinstance(parts, JumpReLUSAE) else None,
    )
