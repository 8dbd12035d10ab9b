"""A trained SAE on disk: `sae.safetensors` (its tensors) and `config.json` (everything else).

Nothing executable is stored or read. Files are written beside their place and renamed into it, so that a directory
never holds half of one; `config.json` is written last and makes the SAE exist.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actstore.errors import ActstoreError
from trainer.recipe import Recipe
from trainer.sae import SAE, sae_of
from trainer.sae import shapes as tensor_shapes

FORMAT_VERSION = 1
WEIGHTS, CONFIG, METRICS = "sae.safetensors", "config.json", "metrics.jsonl"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def shapes(d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the five arrays of an exported SAE."""
    return dict(zip(NAMES, ((d_model, d_sae), (d_sae, d_model), (d_sae,), (d_model,), (d_sae,)), strict=True))


class SavedSAE(NamedTuple):
    """An SAE with what is needed to use it on raw activations."""

    sae: SAE
    scale: float
    """C: the SAE reads x / C, and C times its output reconstructs x."""
    site: str
    config: dict[str, Any]
    """The whole config.json; a transcoder's has `target`, the site it reconstructs and the scale C of that."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the same directory, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with the permissions that new files get here (the library's own: 0600).

    Raises OSError, as other files do, where the library says what the system said, else ActstoreError.
    """
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from None
        raise ActstoreError(f"{path} can't be written: {error}") from None
    path.chmod(permissions)


def write_json(path: Path, value: object) -> None:
    """Write strict JSON (no NaN) atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_sae(out: Path, sae: SAE, *, scale: float, site: str, about: dict[str, Any]) -> None:
    """Write the SAE to directory `out`; `about` holds further JSON-able facts for config.json."""
    d_model, d_sae = sae.W_enc.shape
    config = {
        "format_version": FORMAT_VERSION,
        "architecture": sae.recipe.architecture,
        "d_model": d_model,
        "d_sae": d_sae,
        "d_out": sae.W_dec.shape[1],
        "site": site,
        "scale": scale,
        "recipe": dataclasses.asdict(sae.recipe),
        **about,
    }
    (out / CONFIG).unlink(missing_ok=True)
    write_atomically(out / WEIGHTS, lambda temporary: write_tensors(temporary, sae.parameters | sae.buffers))
    write_json(out / CONFIG, config)


def load_sae(directory: Path, device: str = "cpu") -> SavedSAE:
    """Read what `save_sae` wrote. Raises ActstoreError if it is missing, malformed or of another version."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS, device=device)
        version, (d_model, d_sae) = config["format_version"], (int(config["d_model"]), int(config["d_sae"]))
        d_out = int(config.get("d_out", d_model))
        recipe, scale, site = Recipe(**config["recipe"]), float(config["scale"]), str(config["site"])
    except FileNotFoundError as error:
        raise ActstoreError(
            f"no SAE in {directory}: {error.filename} is missing. Make one with `trainer train`."
        ) from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ActstoreError(f"the SAE in {directory} can't be read: {type(error).__name__}: {error}") from None
    if version != FORMAT_VERSION:
        raise ActstoreError(f"{directory / CONFIG} has format version {version}, this trainer reads {FORMAT_VERSION}.")
    expected = tensor_shapes(recipe, d_model, d_sae, d_out)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ActstoreError(f"{directory / WEIGHTS} holds {found}, expected {expected}. Train or copy it again.")
    return SavedSAE(sae_of(recipe, tensors), scale, site, config)


def model_dtype_of(saved: SavedSAE) -> str | None:
    """The precision of the language model when the store was captured, if that is recorded."""
    model = saved.config.get("provenance", {}).get("model")
    dtype = model.get("dtype") if isinstance(model, dict) else None
    return dtype if isinstance(dtype, str) else None


def model_of(saved: SavedSAE) -> str:
    """The language model named in the provenance of the store the SAE was trained on."""
    name = saved.config.get("provenance", {}).get("model", {}).get("name")
    if not isinstance(name, str):
        raise ActstoreError("the store does not say which model it was captured from; name the model")
    return name
