"""Write a trained SAE so that other tools load it: Gemma Scope's params.npz, or a SAELens directory.

Both take raw activations: the scale C and the pre-encoder bias are folded away (Gemma Scope's appendix on folding).
Training sees x / C, so

    W_enc' = W_enc    b_enc' = C b_enc - C W_enc^T b_dec    b_dec' = C b_dec    theta' = C theta    W_dec' = W_dec

and the loaders compute f = relu(z) * (z > theta'), xhat = W_dec'^T f + b_dec'. Features come out in raw units, C times
those of training. The fold is done in float64 and rounded once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray
from safetensors.numpy import save_file

from actstore.errors import ActstoreError
from trainer.config import ExportConfig
from trainer.files import NAMES, SavedSAE, load_sae, model_of, shapes, write_atomically, write_json

Params = Mapping[str, Float32[ndarray, "..."]]
"""W_enc [d_model, d_sae], W_dec [d_sae, d_model], b_enc, b_dec, threshold; float32, raw activations in and out."""

SAELENS_VERSION = "6.54.12"
"""The SAELens release whose loader this layout was read from; from 6.0.0 on it takes the config as written."""

SAELENS_HOOKS = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.attn.hook_z",
    "mlp_in": "blocks.{}.ln2.hook_normalized",
}


def fold(saved: SavedSAE) -> dict[str, Float32[ndarray, "..."]]:
    """The five arrays of an SAE that takes raw activations, has no pre-encoder bias and no normalisation."""
    sae, C = saved.sae, saved.scale
    tensors = {**sae.parameters, "threshold": sae.theta.clamp(min=0)}
    p = {name: tensor.detach().cpu().double().numpy() for name, tensor in tensors.items()}
    shift = p["b_dec"] @ p["W_enc"] if sae.recipe.pre_bias else 0
    p |= {"b_enc": C * (p["b_enc"] - shift), "b_dec": C * p["b_dec"], "threshold": C * p["threshold"]}
    return {name: np.ascontiguousarray(p[name], np.float32) for name in NAMES}


def reconstruct(params: Params, x: Float[ndarray, "batch d_model"]) -> Float[ndarray, "batch d_model"]:
    """What every loader of these files computes, in numpy."""
    z = x @ params["W_enc"] + params["b_enc"]
    f = np.maximum(z, 0) * (z > params["threshold"])
    return f @ params["W_dec"] + params["b_dec"]


def write_npz(saved: SavedSAE, out: Path) -> Path:
    """Write `out/params.npz` as Gemma Scope releases them, and return its path."""
    path, params = out / "params.npz", fold(saved)
    write_atomically(path, lambda temporary: np.savez(temporary, allow_pickle=False, **params))
    return path


def load_params(path: Path) -> dict[str, Float32[ndarray, "..."]]:
    """Read and check a params.npz, this trainer's or Gemma Scope's own; nothing pickled is accepted."""
    try:
        with np.load(path, allow_pickle=False) as file:
            params = {name.replace("w_", "W_"): file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ActstoreError(f"{path} can't be read as params.npz: {error}") from None
    if missing := [name for name in NAMES if name not in params]:
        raise ActstoreError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(params)}")
    d_model, d_sae = params["W_enc"].shape
    for name, shape in shapes(d_model, d_sae).items():
        if params[name].shape != shape or params[name].dtype != np.float32:
            raise ActstoreError(f"{path}: {name} is {params[name].dtype} {params[name].shape}, want float32 {shape}")
    return {name: params[name] for name in NAMES}


def write_saelens(saved: SavedSAE, out: Path, *, model_name: str, context_size: int) -> Path:
    """Write a directory that SAELens' `SAE.load_from_disk` opens (read off version 6.54.12), and return it.

    `load_from_disk` never rescales, so the fold is complete and `normalize_activations` is "none"; without
    `sae_lens_version` in the metadata it would take the file for an old one and subtract b_dec from the input.
    """
    kind, _, layer = saved.site.partition(".")
    if kind not in SAELENS_HOOKS:
        raise ActstoreError(f"SAELens has no hook name for site {saved.site!r}; export it as npz")
    d_model, d_sae = saved.sae.W_enc.shape
    config: dict[str, Any] = {
        "architecture": "jumprelu",
        "d_in": d_model,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if kind == "attn_out" else "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": model_name,
            "hook_name": SAELENS_HOOKS[kind].format(layer),
            "hook_head_index": None,
            "context_size": context_size,
            "prepend_bos": True,
            "dataset_path": None,
            "model_from_pretrained_kwargs": {},
            "actstore": {"site": saved.site, "scale": saved.scale, "store": saved.config.get("store")},
        },
    }
    params = fold(saved)
    write_atomically(out / "sae_weights.safetensors", lambda temporary: save_file(params, temporary))
    write_json(out / "cfg.json", config)
    return out


def export(config: ExportConfig) -> Path:
    """Write the SAE in `config.sae` to `config.out`; returns what was written."""
    saved = load_sae(config.sae)
    if config.format == "npz":
        return write_npz(saved, config.out)
    context = config.context_size or saved.config.get("provenance", {}).get("tokens", {}).get("seq_len")
    if not context:
        raise ValueError("the store does not say how long its sequences were; give --context-size")
    return write_saelens(saved, config.out, model_name=config.model_name or model_of(saved), context_size=int(context))
