"""Sites: named places in a model, and which module's input or output each one is.

With resid_mid the residual stream between a layer's attention and its MLP, in every architecture here:

    resid_pre.0                                   what enters layer 0: the embedding, after Gemma's factor sqrt(d)
    attn_out.L                                    all heads concatenated, before W_O (Gemma Scope sec. 3.1)
    mlp_in.L                                      what the MLP reads, after the norm before it: a transcoder's input
    mlp_out.L                                     what is added to resid_mid: after the norm behind the MLP
    resid_post.L = resid_mid + mlp_out.L          the output of layer L, before the final norm

A new architecture is one line in `ARCHITECTURES`: `_PRE_NORM`, or `_POST_NORM` if the MLP's output is normalised before
it is added. `tests/test_sites.py` runs every statement above over the whole table, so `pytest tests/test_sites.py -k
NAME` proves the line or refuses it: Granite, for one, scales `mlp_out` before the sum and fails. Architectures whose
decoder has no `embed_tokens`, `layers`, `self_attn.o_proj` and `mlp`, or whose MLP runs beside attention, don't fit.
Mixtures of experts would pass but are left out: an expert multiplies tokens of the whole batch at once, so padding and
neighbours would change a row's rounding.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
    "resid_pre": Hook("", "input"),
    "attn_out": Hook("self_attn.o_proj", "input"),
    "mlp_in": Hook("mlp", "input"),
    "mlp_out": Hook("mlp", "output"),
    "resid_post": Hook("", "output"),
}
_POST_NORM = {**_PRE_NORM, "mlp_out": Hook("post_feedforward_layernorm", "output")}
ARCHITECTURES: dict[str, dict[str, Hook]] = {
    "gemma2": _POST_NORM,
    "gemma3": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "phi3": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "smollm3": _PRE_NORM,
}
"""Hooks by `model_type` of the model's configuration."""

KINDS = tuple(_PRE_NORM)
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


def expand_sites(patterns: str | Iterable[str], config: Any) -> tuple[Site, ...]:
    """Sites of a model with this `transformers` configuration, by layer and kind, each once however often it is named.

    Patterns are a list or comma-separated: names (`mlp_out.12`), globs (`resid_post.*`, `*.12`), ranges with both ends
    (`mlp_out.0-12`) and `all`, every kind in every layer. `ValueError` for one that matches nothing.
    """
    hooks_of(config.model_type)
    layers = int(config.get_text_config().num_hidden_layers)
    everything = [Site(i, kind) for i in range(layers) for kind in KINDS if kind != "resid_pre" or i == 0]
    sites: set[Site] = set()
    for pattern in _split(patterns):
        found = _matching(pattern, everything)
        if not found:
            raise ValueError(
                f"site {pattern}: this {config.model_type} model has layers 0-{layers - 1} and kinds {', '.join(KINDS)}"
            )
        sites.update(found)
    return tuple(sorted(sites))


def _matching(pattern: str, everything: Sequence[Site]) -> list[Site]:
    kind, _, layer = pattern.partition(".")
    if bounds := _RANGE.fullmatch(layer):
        first, last = int(bounds[1]), int(bounds[2])
        found = [s for s in everything if first <= s.layer <= last and fnmatchcase(s.kind, kind)]
        return found if len({s.layer for s in found}) == last - first + 1 else []
    if pattern != "all" and not any(c in pattern for c in "*?["):
        parse_sites(pattern)
    return [s for s in everything if pattern == "all" or fnmatchcase(s.name, pattern)]


def parse_sites(names: str | Iterable[str]) -> tuple[Site, ...]:
    """Sites from names, or from one comma-separated string; `ValueError` says what is wrong with a name."""
    sites: list[Site] = []
    for name in _split(names):
        kind, _, layer = name.partition(".")
        if kind not in KINDS:
            raise ValueError(f"unknown site kind {kind!r} in {name!r}: known are {', '.join(KINDS)}")
        if not (layer.isascii() and layer.isdigit()) or str(int(layer)) != layer:
            raise ValueError(f"site {name!r} has no layer number: expected for example {kind}.12")
        if kind == "resid_pre" and layer != "0":
            raise ValueError(f"site {name}: what enters layer {layer} is resid_post.{int(layer) - 1}; use that name")
        site = Site(int(layer), kind)
        if site in sites:
            raise ValueError(f"site {name} is named twice")
        sites.append(site)
    return tuple(sites)


def num_layers(sites: Iterable[Site]) -> int:
    """How many layers a model must run for these sites."""
    return 1 + max(site.layer for site in sites)


def _split(names: str | Iterable[str]) -> list[str]:
    parts = [part.strip() for text in ([names] if isinstance(names, str) else names) for part in text.split(",")]
    if not any(parts):
        raise ValueError("no sites given: expected for example resid_post.12,mlp_out.12")
    return [part for part in parts if part]


def check_sites(config: Any, sites: Iterable[Site], model: str) -> dict[str, int]:
    """Width of each site in a model with this `transformers` configuration, by site name.

    `ValueError` names the layers or architectures there are, or says that the model's attention is not causal.
    """
    hooks_of(config.model_type)
    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", False):
        raise ValueError(f"model {model}: its attention is bidirectional, so padding would leak; use a causal model")
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
