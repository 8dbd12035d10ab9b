"""Write trained SAEs so that other tools load them.

| format | files | read by | architectures |
|---|---|---|---|
| npz | params.npz | Gemma Scope's tutorial | JumpReLU; BatchTopK and Gated as JumpReLU |
| gemma_scope | layer_20/width_16k/average_l0_71/params.npz; README.md | the same, from the Hub | the same |
| saelens | cfg.json, sae_weights.safetensors | SAELens' `SAE.load_from_disk` | the same and TopK |
| dictionary_learning | ae.pt, config.json | its `load_dictionary` | the same and TopK |

All take raw activations: the scale C and the pre-encoder bias are folded away (Gemma Scope's appendix on folding).
Training sees x / C, so

    W_enc' = W_enc    b_enc' = C b_enc - C W_enc^T b_dec    b_dec' = C b_dec    theta' = C theta    W_dec' = W_dec

and the loaders compute f = relu(z) * (z > theta'), xhat = W_dec'^T f + b_dec'. Features come out in raw units, C times
those of training. A decoder whose rows were not held at length 1 is brought to it, which multiplies the features by the
lengths. The fold is done in float64 and rounded once.
"""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray

from actstore.errors import ActstoreError
from trainer.card import Released, folders_of, model_card
from trainer.config import ExportConfig
from trainer.files import CONFIG, SavedSAE, load_sae, model_of, write_atomically, write_json, write_tensors
from trainer.releases import PARAMS, load_params
from trainer.sae import as_jumprelu

__all__ = ["export", "fold", "load_params", "reconstruct", "write_release", "write_saelens"]

Params = Mapping[str, Float32[ndarray, "..."]]
"""W_enc [d_model, d_sae], W_dec [d_sae, d_model], b_enc, b_dec, threshold; float32, raw activations in and out."""

SAELENS_VERSION = "6.54.12"
"""The SAELens release whose loader this layout was read from; from 6.0.0 on it takes the config as written."""

SAELENS_HOOKS = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.attn.hook_z",
}
"""mlp_in has none: TransformerLens' `ln2.hook_normalized` comes before the norm's gain."""

DICTIONARY_CLASSES = {
    "jumprelu": ("JumpReluTrainer", "JumpReluAutoEncoder"),
    "topk": ("TopKTrainer", "AutoEncoderTopK"),
}


def fold(saved: SavedSAE) -> dict[str, Float32[ndarray, "..."]]:
    """The arrays of an SAE that takes raw activations, has no pre-encoder bias and no normalisation.

    Five for what is a JumpReLU SAE, and for TopK the same without `threshold`. Raises ActstoreError for transcoders.
    """
    C, sae, d_model = saved.scale, saved.sae, saved.sae.W_enc.shape[0]
    if "W_skip" in sae.parameters or sae.W_dec.shape[1] != d_model or saved.config.get("target"):
        raise ActstoreError(f"the SAE on {saved.site} is a transcoder, for which there is no export yet")
    held = {**sae.parameters, **sae.buffers}
    exact: Any = replace(sae, **{name: tensor.detach().cpu().double() for name, tensor in held.items()})  # pyright: ignore[reportArgumentType]
    if sae.recipe.architecture != "topk":
        exact = as_jumprelu(exact)
    p: dict[str, ndarray] = {name: getattr(exact, name).numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    shift = p["b_dec"] @ p["W_enc"] if exact.recipe.pre_bias else 0
    p |= {"b_enc": C * (p["b_enc"] - shift), "b_dec": C * p["b_dec"]}
    if sae.recipe.architecture != "topk":
        p["threshold"] = C * exact.theta.clamp(min=0).numpy()
    return {name: np.ascontiguousarray(array, np.float32) for name, array in p.items()}


def reconstruct(params: Params, x: Float[ndarray, "batch d_model"]) -> Float[ndarray, "batch d_model"]:
    """What every loader of these files computes, in numpy."""
    z = x @ params["W_enc"] + params["b_enc"]
    f = np.maximum(z, 0) * (z > params["threshold"])
    return f @ params["W_dec"] + params["b_dec"]


def write_npz(saved: SavedSAE, out: Path) -> Path:
    """Write `out/params.npz` as Gemma Scope releases them, and return its path."""
    _check_npz(saved)
    path, params = out / PARAMS, fold(saved)
    write_atomically(path, lambda temporary: np.savez(temporary, allow_pickle=False, **params))
    return path


def _check_npz(saved: SavedSAE) -> None:
    if saved.sae.recipe.architecture == "topk":
        raise ActstoreError("params.npz has no place for TopK, which JumpReLU can't express; export it for SAELens")


def write_release(released: list[Released], out: Path, *, license_id: str | None = None) -> Path:
    """Write SAEs in Gemma Scope's layout with a model card, and return `out`, which can be uploaded as it is.

    Beside each params.npz lies a config.json with the site, the recipe, the provenance and the figures. Sites of
    several kinds get a folder each. Raises ActstoreError, before anything is written, where two SAEs would get the same
    folder and for what has no place in params.npz.
    """
    for item in released:
        _check_npz(item.saved)
    places = folders_of(released)
    for item, folder in zip(released, places, strict=True):
        saved = item.saved
        d_model, d_sae = saved.sae.W_enc.shape
        facts = {"format": "gemma_scope", "site": saved.site, "d_model": d_model, "d_sae": d_sae}
        kept = {name: saved.config[name] for name in ("recipe", "seed", "steps", "rows") if name in saved.config}
        kept |= {name: saved.config[name] for name in ("store", "provenance") if name in saved.config}
        write_npz(saved, out / folder)
        write_json(out / folder / CONFIG, {**facts, **kept, "trained_scale": saved.scale, "figures": item.figures})
    card = model_card(released, places, license_id)
    write_atomically(out / "README.md", lambda temporary: temporary.write_text(card, encoding="utf-8"))
    return out


def write_saelens(saved: SavedSAE, out: Path, *, model_name: str, context_size: int) -> Path:
    """Write a directory that SAELens' `SAE.load_from_disk` opens (read off version 6.54.12), and return it.

    `load_from_disk` never rescales, so the fold is complete and `normalize_activations` is "none"; without
    `sae_lens_version` in the metadata it would take the file for an old one and subtract b_dec from the input.
    """
    kind, _, layer = saved.site.partition(".")
    if kind not in SAELENS_HOOKS:
        raise ActstoreError(f"SAELens has no hook name for site {saved.site!r}; export it as npz")
    params, (d_model, d_sae) = fold(saved), saved.sae.W_enc.shape
    config: dict[str, Any] = {
        "architecture": "jumprelu" if "threshold" in params else "topk",
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
    if "threshold" not in params:
        config |= {"k": saved.sae.recipe.k, "rescale_acts_by_decoder_norm": False}
    tensors = {name: torch.from_numpy(array) for name, array in params.items()}
    write_atomically(out / "sae_weights.safetensors", lambda temporary: write_tensors(temporary, tensors))
    write_json(out / "cfg.json", config)
    return out


def write_dictionary_learning(saved: SavedSAE, out: Path, *, model_name: str, context_size: int) -> Path:
    """Write a directory that dictionary_learning's `load_dictionary` opens (0.1.0), and return it.

    Its ae.pt is a pickle of tensors, which `torch.load` reads with `weights_only`.
    """
    params = fold(saved)
    kind, (d_model, d_sae) = "jumprelu" if "threshold" in params else "topk", saved.sae.W_enc.shape
    state = {name: torch.from_numpy(array) for name, array in params.items()}
    trainer_class, dict_class = DICTIONARY_CLASSES[kind]
    trainer: dict[str, Any] = {"trainer_class": trainer_class, "dict_class": dict_class}
    if kind == "topk":
        # it subtracts b_dec from its input, which the fold had added to b_enc
        k, bias = int(saved.sae.recipe.k), params["b_enc"] + params["b_dec"].astype(np.float64) @ params["W_enc"]
        state = {
            "encoder.weight": state["W_enc"].T.contiguous(),
            "encoder.bias": torch.from_numpy(bias.astype(np.float32)),
            "decoder.weight": state["W_dec"].T.contiguous(),
            "b_dec": state["b_dec"],
            "k": torch.tensor(k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),
        }
        trainer["k"] = k
    site, _, layer = saved.site.partition(".")
    trainer |= {"activation_dim": d_model, "dict_size": d_sae, "layer": int(layer or 0), "lm_name": model_name}
    trainer |= {"submodule_name": f"{site}_layer_{layer}", "seed": saved.config.get("seed")}
    about = {"site": saved.site, "scale": saved.scale, "store": saved.config.get("store")}
    pickled = io.BytesIO()  # a full disk would not be an OSError of torch's
    torch.save(state, pickled)
    write_atomically(out / "ae.pt", lambda temporary: temporary.write_bytes(pickled.getbuffer()))
    write_json(out / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": context_size}, "actstore": about})
    return out


def released(directory: Path) -> list[Released]:
    """The SAE in a directory, or all below it, with the figures of `trainer eval` or else of the last training step."""
    found = (
        [directory] if (directory / CONFIG).exists() else sorted(p.parent for p in directory.glob("**/sae.safetensors"))
    )
    if not found:
        raise ActstoreError(f"no SAE in {directory} or below it. Make one with `trainer train`.")
    return [Released.read(load_sae(path), path) for path in found]


def export(config: ExportConfig) -> Path:
    """Write the SAE in `config.sae` to `config.out`; returns what was written.

    `ValueError` if that is the SAE's own directory, whose `config.json` a format would replace.
    """
    if config.out.resolve() == config.sae.resolve():
        raise ValueError(
            f"--out {config.out} is the SAE's own directory, which the export would overwrite; name another"
        )
    if config.format == "gemma_scope":
        return write_release(released(config.sae), config.out, license_id=config.license)
    saved = load_sae(config.sae)
    if config.format == "npz":
        return write_npz(saved, config.out)
    context = config.context_size or saved.config.get("provenance", {}).get("tokens", {}).get("seq_len")
    if not context:
        raise ValueError("the store does not say how long its sequences were; give --context-size")
    write = write_saelens if config.format == "saelens" else write_dictionary_learning
    return write(saved, config.out, model_name=config.model_name or model_of(saved), context_size=int(context))
