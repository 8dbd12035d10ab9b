"""Sites: named places in a model, and which module's input or output each one is.

Gemma 2 and 3 put an RMSNorm after attention and one after the MLP, so what the MLP adds to the residual stream is the
output of `post_feedforward_layernorm`, not of `mlp`. In every architecture here, with resid_mid the residual stream
between attention and MLP:

    resid_post.L = resid_mid + mlp_out.L          the output of decoder layer L, before the final norm
    attn_out.L                                    all heads concatenated, before W_O (Gemma Scope sec. 3.1)
    mlp_in.L                                      the input of the MLP, after its norm: what a transcoder reads

`tests/test_sites.py` holds these statements against the models' own arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Hook:
    """Where a kind of site is inside a decoder layer."""

    module: str
    """Path below the layer; empty for the layer itself."""
    side: Literal["input", "output"]


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model."""

    layer: int
    kind: str

    @property
    def name(self) -> str:
        """For example `resid_post.12`."""
        return f"{self.kind}.{self.layer}"


_PRE_NORM = {
    "resid_post": Hook("", "output"),
    "mlp_out": Hook("mlp", "output"),
    "attn_out": Hook("self_attn.o_proj", "input"),
    "mlp_in": Hook("post_attention_layernorm", "output"),
}
_SANDWICH_NORM = {
    **_PRE_NORM,
    "mlp_out": Hook("post_feedforward_layernorm", "output"),
    "mlp_in": Hook("pre_feedforward_layernorm", "output"),
}
ARCHITECTURES: dict[str, dict[str, Hook]] = {
    "gemma2": _SANDWICH_NORM,
    "gemma3": _SANDWICH_NORM,
    "gemma3_text": _SANDWICH_NORM,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
}
"""Hooks by `model_type` of the model's configuration."""


def parse_sites(names: str | Iterable[str]) -> tuple[Site, ...]:
    """Sites from names, or from one comma-separated string; `ValueError` says what is wrong with a name."""
    parts = [part.strip() for text in ([names] if isinstance(names, str) else names) for part in text.split(",")]
    sites: list[Site] = []
    for part in filter(None, parts):
        kind, _, layer = part.partition(".")
        if kind not in _PRE_NORM:
            raise ValueError(f"unknown site kind {kind!r} in {part!r}: known are {', '.join(_PRE_NORM)}")
        if not (layer.isascii() and layer.isdigit()) or str(int(layer)) != layer:
            raise ValueError(f"site {part!r} has no layer number: expected for example {kind}.12")
        site = Site(int(layer), kind)
        if site in sites:
            raise ValueError(f"site {part} is named twice")
        sites.append(site)
    if not sites:
        raise ValueError("no sites given: expected for example resid_post.12,mlp_out.12")
    return tuple(sites)


def check_sites(config: Any, sites: Iterable[Site], model: str) -> dict[str, int]:
    """Width of each site in a model with this `transformers` configuration, by site name.

    `ValueError` names the layers or architectures there are.
    """
    hooks_of(config.model_type)
    text = config.get_text_config()
    widths: dict[str, int] = {}
    for site in sites:
        if site.layer >= text.num_hidden_layers:
            layers = f"layers 0-{text.num_hidden_layers - 1}"
            raise ValueError(f"site {site.name}: {config.model_type} model {model} has {layers}")
        widths[site.name] = attention_width(text) if site.kind == "attn_out" else int(text.hidden_size)
    return widths


def attention_width(text_config: Any) -> int:
    """Width of all heads concatenated; differs from hidden_size where head_dim is set on its own (Gemma, Qwen3)."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return int(text_config.num_attention_heads * head_dim)


def hooks_of(model_type: str) -> dict[str, Hook]:
    """The hooks of an architecture; `ValueError` lists the known ones."""
    if model_type not in ARCHITECTURES:
        raise ValueError(f"architecture {model_type!r} has no table of sites: known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
