"""SAEs that others trained, read as ours: Gemma Scope, Gemma Scope 2 and SAELens, as they are released.

| what | files | where the site is said |
|---|---|---|
| this trainer | config.json, sae.safetensors | config.json |
| Gemma Scope | layer_20/width_16k/average_l0_71/params.npz | layer_20; the release's name, gemma-scope-2b-pt-res |
| Gemma Scope 2 | resid_post/layer_13_width_16k_l0_medium/{params.safetensors, config.json} | the folders |
| SAELens | cfg.json, sae_weights.safetensors | metadata.hook_name |

All take raw activations, so the scale is 1. JumpReLU, TopK and Gated are read as they are, and ReLU as JumpReLU with
thresholds of 0, which is the same function; what no class here can express is refused, never approximated. Nothing
pickled is read.
"""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from actstore.errors import ActstoreError
from trainer.files import CONFIG, WEIGHTS, SavedSAE, load_sae
from trainer.recipe import Recipe
from trainer.sae import sae_of, shapes

Arrays = dict[str, Float32[ndarray, "..."]]

PARAMS, GEMMA_2, LENS_CONFIG, LENS_WEIGHTS = "params.npz", "params.safetensors", "cfg.json", "sae_weights.safetensors"

UNREADABLE = (OSError, ValueError, EOFError, TypeError, NotImplementedError, BadZipFile, zlib.error)
"""What numpy and zipfile raise for files that are no npz, are cut short or damaged."""

RAW = Recipe(log_threshold=False, pre_bias=False, relu_before_jump=True)
"""How released parameters are read: relu(z) * (z > threshold), z from x itself."""

RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)")
RELEASED_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}
"""By the last part of a Gemma Scope release's name."""

HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_out",
}
"""Kinds of site by TransformerLens' name. Its `ln2.hook_normalized` is none of ours: it lacks the norm's gain, which
mlp_in has."""


def load_any(path: Path, *, site: str | None = None, device: str = "cpu") -> SavedSAE:
    """The SAE in a directory (or params.npz), this trainer's or one of the releases above.

    `site` replaces what the files say, and is needed where they say nothing. Raises ActstoreError for what can't be
    read or expressed.
    """
    if path.is_file() and path.suffix == ".npz":
        saved = _gemma_scope(path)
    elif (path / PARAMS).exists():
        saved = _gemma_scope(path / PARAMS)
    elif (path / GEMMA_2).exists():
        saved = _gemma_scope_2(path)
    elif (path / LENS_WEIGHTS).exists():
        saved = _saelens(path)
    elif (path / CONFIG).exists() and (path / WEIGHTS).exists():
        saved = load_sae(path)
    else:
        raise ActstoreError(f"no SAE in {path}: {_instead(path)}")
    site = site or saved.site
    if not site:
        raise ActstoreError(f"{path} does not say which site it was trained on; give --site, for example resid_post.20")
    held = {**saved.sae.parameters, **saved.sae.buffers}
    sae = sae_of(saved.sae.recipe, {name: tensor.to(device) for name, tensor in held.items()})
    return saved._replace(sae=sae, site=site)


def _instead(path: Path) -> str:
    """What is wrong with a path that holds none of the formats."""
    if (path / "ae.pt").exists():
        return (
            "ae.pt is a pickle, which can run code when it is read. Convert it with dictionary_learning's own loader."
        )
    if (path / LENS_CONFIG).exists() and (path / WEIGHTS).exists():
        return "it is sparsify's, whose grouped TopK can't be expressed here"
    names = (PARAMS, GEMMA_2, LENS_WEIGHTS, WEIGHTS)
    if path.is_dir() and (below := sorted(p for name in names for p in path.glob(f"**/{name}"))):
        return f"{len(below)} lie below it; name one, for example {below[0].parent}"
    return f"none of {', '.join(names)} is there. Make one with `trainer train`, or download a release."


def load_params(path: Path) -> Arrays:
    """Read and check a params.npz, this trainer's or Gemma Scope's own; nothing pickled is accepted."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise ActstoreError(f"{path} can't be read as params.npz: {type(error).__name__}: {error}") from None
    return checked(path, {name.replace("w_", "W_"): array for name, array in arrays.items()}, RAW)


def checked(path: Path, arrays: Mapping[str, ndarray], recipe: Recipe) -> Arrays:
    """The arrays that an SAE of this recipe has, if they are there, float32, and fit each other."""
    if missing := [name for name in shapes(recipe, 1, 1) if name not in arrays]:
        raise ActstoreError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays)}")
    if np.any(arrays.get("scaling_factor", np.ones(1)) != 1):
        raise ActstoreError(f"{path} has a scaling_factor that is not 1, which no current loader applies")
    if arrays["W_enc"].ndim != 2:
        raise ActstoreError(f"{path}: W_enc has shape {arrays['W_enc'].shape}, want [d_model, d_sae]")
    wanted = shapes(recipe, *arrays["W_enc"].shape)
    for name, shape in wanted.items():
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            raise ActstoreError(f"{path}: {name} is {arrays[name].dtype} {arrays[name].shape}, want float32 {shape}")
    return {name: arrays[name] for name in wanted}


def _saved(arrays: Arrays, recipe: Recipe, site: str, config: dict[str, Any]) -> SavedSAE:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return SavedSAE(sae_of(recipe, tensors), 1.0, site, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ActstoreError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise ActstoreError(f"{path} holds no JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, TypeError) as error:  # bfloat16 is no type of numpy's
        raise ActstoreError(f"{path} can't be read as safetensors of numpy's types: {error}") from None


def _about(release: str, model: str | None) -> dict[str, Any]:
    """What stands for config.json where there is none of ours."""
    return {"release": release, "provenance": {"model": {"name": model}}}


def _gemma_scope(path: Path) -> SavedSAE:
    """One of Gemma Scope's, or an export of ours, which has its own config.json beside the parameters."""
    arrays, beside = load_params(path), path.with_name(CONFIG)
    if beside.exists():
        config = _read_json(beside)
        return _saved(arrays, RAW, str(config.get("site", "")), config)
    parts = path.resolve().parent.parts
    if "embedding" in parts:
        raise ActstoreError(f"{path} is for token embeddings, which are scaled apart from its weights; not supported")
    layers = [m[1] for part in parts if (m := re.fullmatch(r"layer_(\d+)", part))]
    release = next((m for part in reversed(parts) if (m := RELEASE.search(part))), None)
    if release is None:
        return _saved(arrays, RAW, "", _about("", None))
    size, tuned, kind = release.groups()
    if kind not in RELEASED_SITES:
        raise ActstoreError(f"{path}: {release[0]} holds {kind}, which are no SAEs of one site; not supported")
    site = f"{RELEASED_SITES[kind]}.{layers[-1]}" if layers else ""
    model = f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")
    return _saved(arrays, RAW, site, _about(release[0], model))


def _gemma_scope_2(path: Path) -> SavedSAE:
    """Gemma Scope 2: params.safetensors with lower-case names, and a config.json that is missing for some."""
    arrays = {name.replace("w_", "W_"): array for name, array in _read_tensors(path / GEMMA_2).items()}
    config = _read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    if "affine_skip_connection" in arrays or config.get("affine_connection") or "transcoder" in path.parent.name:
        raise ActstoreError(f"{path} is a transcoder, which reads one site and writes another; not supported")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ActstoreError(f"{path} has the architecture {config['architecture']!r}; only jump_relu is supported")
    layer = re.search(r"layer_(\d+)", path.resolve().name)
    kind = path.resolve().parent.name.removesuffix("_all")
    site = f"{kind}.{layer[1]}" if layer and kind in ("resid_post", "attn_out", "mlp_out") else ""
    model = config.get("model_name")
    if model:
        model = model if "/" in model else f"google/{model.replace('-v3', '-3')}"
    return _saved(checked(path, arrays, RAW), RAW, site, _about("gemma-scope-2", model))


def _saelens(path: Path) -> SavedSAE:
    """A directory that SAELens saved: jumprelu, topk, gated, or standard as thresholds of 0.

    From 6.0.0 on the configuration says all; before, `apply_b_dec_to_input` was True by default, and an activation
    function could make a standard SAE a TopK.
    """
    config, arrays = _read_json(path / LENS_CONFIG), _read_tensors(path / LENS_WEIGHTS)
    metadata: dict[str, Any] = config.get("metadata") or config
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    old = int(version.partition(".")[0]) < 6 if version[0].isdigit() else True
    architecture = str(config.get("architecture", "standard"))
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if old and activation == "topk":
        architecture, activation = "topk", "relu"
        config["k"] = (config.get("activation_fn_kwargs") or {}).get("k")
    if architecture not in ("standard", "jumprelu", "topk", "gated") or activation != "relu":
        named = architecture if activation == "relu" else f"{architecture} with {activation}"
        raise ActstoreError(f"{path} is a SAELens SAE of architecture {named}: want jumprelu, standard, topk or gated")
    normalised = config.get("normalize_activations") or "none"
    if normalised != "none":
        raise ActstoreError(
            f"{path} wants activations normalised by {normalised!r}. Fold that into the weights with SAELens "
            "(fold_activation_norm_scaling_factor) and save it again."
        )
    if config.get("finetuning_scaling_factor"):
        raise ActstoreError(f"{path} has a finetuning scaling factor; not supported")
    recipe = replace(RAW, pre_bias=bool(config.get("apply_b_dec_to_input", old)))
    if architecture in ("topk", "gated"):
        recipe = replace(recipe, architecture=architecture)
    if architecture == "topk":
        if not isinstance(k := config.get("k"), int) or k < 1:
            raise ActstoreError(f"{path}: k is {k!r}, want a number of latents")
        recipe = replace(recipe, k=k)
    if architecture == "standard" and "W_enc" in arrays:
        arrays["threshold"] = np.zeros(arrays["W_enc"].shape[-1], np.float32)
    arrays = checked(path, arrays, recipe)
    if config.get("rescale_acts_by_decoder_norm"):  # choose, and report, features in units of the decoder's rows
        lengths = np.linalg.norm(arrays["W_dec"].astype(np.float64), axis=1)
        arrays |= {name: (arrays[name] * lengths).astype(np.float32) for name in ("W_enc", "b_enc")}
        arrays["W_dec"] = (arrays["W_dec"] / lengths[:, None]).astype(np.float32)
    hook = str(metadata.get("hook_name") or metadata.get("hook_point") or "")
    return _saved(arrays, recipe, site_of(hook), _about("SAELens", metadata.get("model_name")))


def site_of(hook: str) -> str:
    """Our name of a TransformerLens hook, or nothing if it is none of our sites."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    kind = HOOKS.get(match[2], "") if match else ""
    if not (match and kind):
        return ""
    layer = int(match[1])
    return f"resid_post.{layer - 1}" if kind == "resid_pre" and layer else f"{kind}.{layer}"
