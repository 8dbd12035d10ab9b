"""Where released SAEs lie, and the model card beside them: README.md as the Hugging Face Hub reads it.

Folders are Gemma Scope's, layer_20/width_16k/average_l0_71. The card's front matter is YAML whose values are written as
JSON, which is YAML too, so that no name can break it; everything in the card comes from the SAEs' own config.json and
from `trainer eval`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.console import figure
from actstore.errors import ActstoreError
from trainer.files import CONFIG, SavedSAE

EVALUATION = "evaluation.json"
"""What `trainer eval` writes into the SAE's directory."""

SHOWN = {"l0": "L0", "fvu": "FVU", "delta_loss": "delta loss", "loss_recovered": "loss recovered", "dead": "dead"}
"""Columns of the card's table by figure."""

CONTENTS = """Each folder has `params.npz` (float32 `W_enc`, `W_dec`, `b_enc`, `b_dec`, `threshold`), which takes raw
activations, and `config.json` with its site, recipe, provenance and figures."""

USE = """```python
import numpy as np
from huggingface_hub import hf_hub_download

p = np.load(hf_hub_download("OWNER/NAME", "{folder}/params.npz"))
pre = x @ p["W_enc"] + p["b_enc"]                        # x: raw activations [batch, d_model], float32
features = np.maximum(pre, 0) * (pre > p["threshold"])   # [batch, d_sae]
reconstruction = features @ p["W_dec"] + p["b_dec"]
```"""


@dataclass(frozen=True, kw_only=True)
class Released:
    """An SAE to release and its figures."""

    saved: SavedSAE
    figures: Mapping[str, Any]
    """As `trainer.evaluate.Evaluation` names them; at least `l0`."""

    @classmethod
    def read(cls, saved: SavedSAE, directory: Path) -> "Released":
        """With the figures of `trainer eval` on the first model and data set, or else of the last training step."""
        file = directory / EVALUATION
        if file.exists():
            about = json.loads(file.read_text(encoding="utf-8"))
            if about.get("config") != config_digest(directory):
                raise ActstoreError(f"{file} is of another SAE than lies beside it now; run `trainer eval` on it again")
            evaluations = about["evaluations"]
            figures = {k: v for k, v in evaluations[0].items() if not isinstance(v, list)}
            figures |= {"model": _public(figures["model"]), "data": Path(figures["data"]).name}
        else:
            last: Mapping[str, Any] = saved.config.get("final", {})
            figures = {k: last[k] for k in ("l0", "fvu", "dead") if k in last}
            figures |= {"l0": last["mean_l0"]} if "mean_l0" in last else {}
        if "l0" not in figures:
            raise ActstoreError(f"the L0 of the SAE in {directory} is not known; run `trainer eval` on it first")
        return cls(saved=saved, figures=figures)


def config_digest(directory: Path) -> str | None:
    """A digest of config.json, which no two training runs share, so that figures are not taken for another SAE's."""
    file = directory / CONFIG
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.is_file() else None


def width_name(d_sae: int) -> str:
    """16k for 16,384, 1m for 1,048,576, as Gemma Scope names widths."""
    if d_sae >= 1_000_000:
        return f"{d_sae // 1_000_000}m"
    return f"{d_sae // 1_000}k" if d_sae >= 1_000 else str(d_sae)


def folders_of(released: Sequence[Released]) -> list[str]:
    """The folder of each SAE; seeds are named only where folders would be equal without."""
    kinds = {item.saved.site.partition(".")[0] for item in released}
    folders: list[str] = []
    for item in released:
        kind, _, layer = item.saved.site.partition(".")
        width = width_name(item.saved.sae.W_enc.shape[1])
        folder = f"layer_{layer}/width_{width}/average_l0_{round(item.figures['l0'])}"
        folders.append(f"{kind}/{folder}" if len(kinds) > 1 else folder)
    for name, count in Counter(folders).items():
        if count > 1:
            same = [i for i, folder in enumerate(folders) if folder == name]
            for i in same:
                folders[i] = f"{name}_seed_{released[i].saved.config.get('seed')}"
    twice = [name for name, count in Counter(folders).items() if count > 1]
    if twice:
        raise ActstoreError(f"several SAEs would be {twice[0]}: same site, width, L0 and seed. Export them apart.")
    return folders


def model_card(released: Sequence[Released], folders: Sequence[str], license_id: str | None = None) -> str:
    """The README.md of a release."""
    model = _model(released[0])
    architectures = sorted({item.saved.sae.recipe.architecture for item in released})
    matter: dict[str, Any] = {
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "actstore", *architectures]
    }
    if license_id:
        matter["license"] = license_id
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model.get("name"))) and _on_hub(model):
        matter["base_model"] = model["name"]
    front = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in matter.items())
    sites = ", ".join(sorted({item.saved.site for item in released}))
    name = _cell(model.get("name", "a language model"))
    title = f"Sparse autoencoders on {name}"
    said = (
        f"{len(released)} sparse autoencoder{'s' * (len(released) > 1)} on {sites} of {name}, in Gemma Scope's layout."
    )
    parts = [
        f"---\n{front}---\n\n# {title}\n\n{said}",
        CONTENTS,
        _table(("folder", "site", *_columns(released).values()), _lines(released, folders)),
        _measured(released),
        "## Use\n\n" + USE.format(folder=folders[0]),
        "## Provenance\n\n" + _table(("what", "value"), _provenance(released)),
        "## Recipe\n\n" + _table(("constant", "value"), _recipe(released)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _public(model: str) -> str:
    """A name of the Hub as it is, a directory without what leads to it: a release tells no machine's paths."""
    return Path(model).name if Path(model).exists() or model.count("/") != 1 else model


def _model(item: Released) -> dict[str, Any]:
    return item.saved.config.get("provenance", {}).get("model", {})


def _on_hub(model: Mapping[str, Any]) -> bool:
    """A model of the hub is recorded with its commit, a local one with a digest."""
    return bool(re.fullmatch(r"[0-9a-f]{40}", str(model.get("weights"))))


def _columns(released: Sequence[Released]) -> dict[str, str]:
    return {name: text for name, text in SHOWN.items() if any(name in item.figures for item in released)}


def _lines(released: Sequence[Released], folders: Sequence[str]) -> list[tuple[Any, ...]]:
    names = _columns(released)
    return [
        (f"`{folder}`", item.saved.site, *(item.figures.get(name, "") for name in names))
        for item, folder in zip(released, folders, strict=True)
    ]


def _measured(released: Sequence[Released]) -> str:
    """What the figures were taken on."""
    names = ("model", "data", "sequences", "tokens")
    sets = {tuple(item.figures.get(name) for name in names) for item in released}
    if len(sets) != 1 or None in next(iter(sets)):
        return "Figures without a delta loss are of the last training batch." if any(None in s for s in sets) else ""
    about = released[0].figures
    return (
        f"Measured on {about['sequences']:,} held-out sequences ({about['tokens']:,} tokens without BOS, EOS and "
        f"padding; {_cell(about['data'])}) with {_cell(about['model'])}. Delta loss is in nats "
        "per token; FVU is the squared error over the variance about the mean of these tokens."
    )


def _provenance(released: Sequence[Released]) -> list[tuple[str, Any]]:
    """Facts about the store that all SAEs share."""
    config = released[0].saved.config
    about: dict[str, Any] = {"store": config.get("store"), "rows trained on": config.get("rows")}
    for group in ("model", "tokens"):
        about |= {f"{group}: {k}": v for k, v in config.get("provenance", {}).get(group, {}).items()}
    about["scale C"] = ", ".join(sorted({f"{item.saved.scale:.6g}" for item in released}))
    return [(k, v) for k, v in about.items() if v is not None]


def _recipe(released: Sequence[Released]) -> list[tuple[str, Any]]:
    """Constants, with every value where SAEs differ."""
    recipes: list[Mapping[str, Any]] = [vars(item.saved.sae.recipe) for item in released]
    names = [name for name in recipes[0] if all(name in r for r in recipes)]
    return [(n, ", ".join(dict.fromkeys(str(r[n]) for r in recipes))) for n in names]


def _cell(value: Any) -> str:
    """Text that can break neither a table nor the page."""
    text = figure(value).replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split())


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [header, ["---"] * len(header), *([_cell(v) for v in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
