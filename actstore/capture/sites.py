"""Sites: named places in a model, and which module's input or output each one is.

    resid_pre.0     what enters layer 0: the embedding, after Gemma's factor sqrt(d), with GPT-2's learned positions
    attn_out.L      all heads of the token mixer, concatenated, before its output projection (Gemma Scope sec. 3.1)
    resid_mid.L     the residual stream between attention and MLP: resid_pre + what attention adds
    mlp_in.L        what the MLP reads, after the norm before it: a transcoder's input
    mlp_hidden.L    the MLP's neurons: what its last projection reads
    mlp_out.L       what the MLP, or a whole mixture of experts, adds to the stream: after the norm behind it
    resid_post.L    resid_mid + mlp_out: the output of layer L, before the final norm
    q.L, k.L, v.L   heads concatenated, after projection, bias and norm, before rotary positions
    router.L        a mixture of experts' logits, one per expert, before softmax and top-k

Two families end a layer another way. With parallel residuals (Pythia) attention and MLP both read resid_pre, so there
is no resid_mid, and resid_post = resid_pre + attention + mlp_out. In Gemma 4 resid_post = (resid_mid + mlp_out + the
branch of per-layer inputs, where there is one) * layer_scalar.

A new architecture is one entry in `ARCHITECTURES`; `docs/playbooks/add-an-architecture.md` says how it is proved. Which
layers have which site, and how wide it is, is read from the model's own modules, built without weights.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Literal


@dataclass(frozen=True)
class Hook:
    """Where a kind of site is inside a decoder layer."""

    module: str
    """Path below the layer, empty for the layer itself; of several, separated by |, the first that the layer has."""
    side: Literal["input", "output"]
    layout: Literal["rows", "heads_first", "blocks", "interleaved"] = "rows"
    """How the tensor holds a token's vector. `rows` keeps tokens in order, `heads_first` is [sequences, heads, seq_len,
    head_dim]. One projection for q, k and v has all heads of q, then of k, then of v (`blocks`), or one of each in turn
    (`interleaved`)."""
    unless: str = ""
    """A layer whose attribute of this name is true does not have the site."""

    def of(self, layer: Any) -> Any:
        """The module in this decoder layer, or None if the layer does not have the site."""
        if self.unless and getattr(layer, self.unless, False):
            return None
        paths = (path.split(".") if path else () for path in self.module.split("|"))
        modules = (reduce(lambda module, name: getattr(module, name, None), path, layer) for path in paths)
        return next((module for module in modules if module is not None), None)


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model."""

    layer: int
    kind: str

    @property
    def name(self) -> str:
        """For example `resid_post.12`."""
        return f"{self.kind}.{self.layer}"


def _fused(module: str, layout: Literal["blocks", "interleaved"]) -> dict[str, Hook]:
    return {kind: Hook(module, "output", layout) for kind in "qkv"}


def _normed(layout: Literal["rows", "heads_first"] = "rows", kinds: str = "qk") -> dict[str, Hook]:
    return {kind: Hook(f"self_attn.{kind}_norm", "output", layout) for kind in kinds}


_LLAMA = {
    "resid_pre": Hook("", "input"),
    "resid_mid": Hook("post_attention_layernorm", "input"),
    "resid_post": Hook("", "output"),
    "attn_out": Hook("self_attn.o_proj", "input"),
    "mlp_in": Hook("mlp", "input"),
    "mlp_hidden": Hook("mlp.down_proj", "input"),
    "mlp_out": Hook("mlp", "output"),
    "q": Hook("self_attn.q_proj", "output"),
    "k": Hook("self_attn.k_proj", "output"),
    "v": Hook("self_attn.v_proj", "output"),
    "router": Hook("mlp.gate", "output"),
}
_QWEN_3 = _LLAMA | _normed()
_QWEN_NEXT = _QWEN_3 | {"attn_out": Hook("self_attn.o_proj|linear_attn.out_proj", "input")}
_GEMMA = _LLAMA | {
    "resid_mid": Hook("pre_feedforward_layernorm", "input"),
    "mlp_out": Hook("post_feedforward_layernorm", "output"),
}
_GEMMA_3 = _GEMMA | _normed("heads_first")
_GEMMA_4 = {
    **_GEMMA,
    "mlp_in": Hook("mlp", "input", unless="enable_moe_block"),
    "mlp_hidden": Hook("mlp.down_proj", "input", unless="enable_moe_block"),
    "router": Hook("router.proj", "output"),
    **_normed(kinds="qkv"),
}
_OLMO = _GEMMA | _normed() | {"resid_mid": Hook("mlp", "input")}
_GPT_2 = {
    **_LLAMA,
    "resid_mid": Hook("ln_2", "input"),
    "attn_out": Hook("attn.c_proj", "input"),
    "mlp_hidden": Hook("mlp.c_proj", "input"),
    **_fused("attn.c_attn", "blocks"),
}
_GPT_NEOX = {
    **_LLAMA,
    "resid_mid": Hook("post_attention_layernorm", "input", unless="use_parallel_residual"),
    "attn_out": Hook("attention.dense", "input"),
    "mlp_hidden": Hook("mlp.dense_4h_to_h", "input"),
    **_fused("attention.query_key_value", "interleaved"),
}
ARCHITECTURES: dict[str, dict[str, Hook]] = {
    **dict.fromkeys(("gemma", "llama", "mistral", "mixtral", "qwen2", "smollm3"), _LLAMA),
    **dict.fromkeys(("olmoe", "qwen3", "qwen3_moe"), _QWEN_3),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _QWEN_NEXT),
    **dict.fromkeys(("gemma3", "gemma3_text"), _GEMMA_3),
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA_4),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO),
    "gemma2": _GEMMA,
    "gpt2": _GPT_2,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": _LLAMA | {"router": Hook("mlp.router", "output")},
    "phi3": _LLAMA | _fused("self_attn.qkv_proj", "blocks"),
}
"""Hooks by `model_type` of the model's configuration."""

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_hidden", "mlp_out", "q", "k", "v", "router")
CLASSIC = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
"""What `all`, and `*` in place of a kind, stand for."""
_NO_HEADS = "the layer mixes tokens by linear attention, or reads the keys and values of an earlier layer"
ABSENT = {
    "resid_mid": "attention and MLP both read resid_pre, so nothing lies between them",
    "mlp_in": "its MLP and its experts read two different norms of resid_mid",
    "mlp_hidden": "in a mixture of experts tokens share no neurons",
    "q": _NO_HEADS,
    "k": _NO_HEADS,
    "v": _NO_HEADS,
    "router": "it has no mixture of experts",
}
"""Why a layer does not have a site of this kind."""
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


def expand_sites(patterns: str | Iterable[str], config: Any) -> tuple[Site, ...]:
    """Sites of a model with this `transformers` configuration, by layer and kind, each once however often it is named.

    Patterns are a list or comma-separated: names (`mlp_out.12`), globs (`resid_post.*`, `*.12`), ranges with both ends
    (`mlp_out.0-12`) and `all`. `all`, and `*` in place of a kind, mean the kinds of `CLASSIC`; other globs mean every
    kind that they spell. `ValueError` for a pattern that matches nothing, or a layer that lacks the kind.
    """
    widths, layers = site_widths(config), int(config.get_text_config().num_hidden_layers)
    sites: set[Site] = set()
    for pattern in _split(patterns):
        matched = _matching(pattern, layers)
        if not matched:
            raise ValueError(
                f"site {pattern}: this {config.model_type} model has layers 0-{layers - 1} and kinds {', '.join(KINDS)}"
            )
        for site in matched:
            _check_presence(site, widths, f"site {pattern}: this {config.model_type} model")
        sites.update(matched)
    return tuple(sorted(sites))


def _matching(pattern: str, layers: int) -> list[Site]:
    """Sites that the pattern spells, whether the model has them or not; none for a range beyond the model's layers."""
    kind, _, layer = pattern.partition(".")
    bounds = _RANGE.fullmatch(layer)
    if bounds is None and pattern != "all" and not any(c in pattern for c in "*?["):
        parse_sites(pattern)
    kinds = CLASSIC if kind in ("all", "*") else KINDS
    every = [Site(i, k) for i in range(layers) for k in kinds if k != "resid_pre" or i == 0]
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        matched = [s for s in every if first <= s.layer <= last and fnmatchcase(s.kind, kind)]
        return matched if len({s.layer for s in matched}) == last - first + 1 else []
    return [s for s in every if pattern == "all" or fnmatchcase(s.name, pattern)]


def _check_presence(site: Site, widths: dict[Site, int], subject: str) -> None:
    if site not in widths:
        others = ", ".join(other.name for other in widths if other.kind == site.kind) or f"no {site.kind}"
        raise ValueError(f"{subject} has no {site.name}, because {ABSENT[site.kind]}; it has {others}")


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

    `ValueError` names the layers or architectures there are, says why a layer lacks a site, or that the model's
    attention is not causal.
    """
    widths, text = site_widths(config), config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):  # Gemma 4's "vision" spares text
        raise ValueError(f"model {model}: its attention is bidirectional, so padding would leak; use a causal model")
    for site in sites:
        subject = f"site {site.name}: {config.model_type} model {model}"
        if site.layer >= text.num_hidden_layers:
            raise ValueError(f"{subject} has layers 0-{text.num_hidden_layers - 1}")
        _check_presence(site, widths, subject)
    return {site.name: widths[site] for site in sites}


def site_widths(config: Any) -> dict[Site, int]:
    """Width of every site of a model with this `transformers` configuration; `ValueError` as `hooks_of`.

    Which sites a layer has, and most widths, are read from its modules, because configurations spell them differently.
    """
    hooks, hidden_size = hooks_of(config.model_type), config.get_text_config().hidden_size
    widths: dict[Site, int] = {}
    for i, layer in enumerate(layers_of(skeleton(config))):
        modules = {kind: hook.of(layer) for kind, hook in hooks.items() if kind != "resid_pre" or i == 0}
        heads, kv_heads = heads_of(config, i)
        for kind, module in modules.items():
            if module is None:
                continue
            if kind in ("q", "k", "v"):
                width = _inputs(modules["attn_out"]) // heads * (heads if kind == "q" else kv_heads)
            elif kind == "router":
                width = module.weight.shape[0]
            else:
                width = _inputs(module) if kind in ("attn_out", "mlp_hidden") else hidden_size
            widths[Site(i, kind)] = width
    return widths


def _inputs(projection: Any) -> int:
    """Width of what a projection reads; GPT-2's Conv1D calls it nx."""
    return getattr(projection, "nx", None) or projection.in_features


def heads_of(config: Any, layer: int) -> tuple[int, int]:
    """Number of attention heads of a layer, and of heads that keys and values have."""
    text = config.get_text_config()
    own = text.per_layer_config[layer] if getattr(text, "is_heterogeneous", False) else text
    return own.num_attention_heads, getattr(own, "num_key_value_heads", None) or own.num_attention_heads


def skeleton(config: Any) -> Any:
    """The model of a `transformers` configuration on device `meta`: modules with shapes and no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # a copy, because building a model fills in defaults
        return AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")


def layers_of(model: Any) -> Any:
    """The decoder layers of a `transformers` model: the one list among the decoder's parts."""
    from torch.nn import ModuleList

    (layers,) = (part for part in model.get_decoder().children() if isinstance(part, ModuleList))
    return layers


def hooks_of(model_type: str) -> dict[str, Hook]:
    """The hooks of an architecture, by kind; `ValueError` lists the known ones."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"architecture {model_type!r} has no table of sites: known are {known}")
    return ARCHITECTURES[model_type]
