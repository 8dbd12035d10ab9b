"""What the three commands are asked: one frozen dataclass each, from which the command line is made.

Light to import (no torch), so that `trainer --help` answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.recipe import PRESETS, Recipe


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a JumpReLU SAE on one site of an activation store."""

    store: str
    """URL or path of the activation store."""
    site: str
    """The site to train on, for example resid_post.12."""
    out: Path
    """Directory for sae.safetensors, config.json and metrics.jsonl."""
    steps: int
    """Optimizer steps; the store is read again from the start, in a new order, as often as that takes."""
    preset: Literal["gemma_scope", "short"] = "gemma_scope"
    """The recipe to start from: Gemma Scope's own, or the one for a few thousand steps."""
    d_sae: int | None = None
    """Number of latents; by default `expansion` times the width of the site."""
    expansion: int = 8
    """Latents per dimension of the site, where d_sae is not given."""
    seed: int = 0
    """Fixes the initial weights and the order of the batches."""
    batch_size: int | None = None
    """Replaces the preset's activations per step."""
    lr: float | None = None
    """Replaces the preset's learning rate."""
    bandwidth: float | None = None
    """Replaces the preset's kernel bandwidth."""
    sparsity_coefficient: float | None = None
    """Replaces the preset's price of an active latent."""
    target_l0: float | None = None
    """Replaces the preset's L0 target; 0 removes it, which makes the price constant."""
    threshold_init: float | None = None
    """Replaces the preset's initial threshold."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    device: str = "cpu"
    """Torch device to train on, for example cuda."""

    def __post_init__(self) -> None:
        """Refuse counts that are not positive."""
        for name in ("steps", "d_sae", "expansion", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")

    @property
    def recipe(self) -> Recipe:
        """The preset with this config's replacements."""
        names = ("batch_size", "lr", "bandwidth", "sparsity_coefficient", "target_l0", "threshold_init")
        recipe = PRESETS[self.preset]
        if self.target_l0 == 0:
            return recipe.without_target().replaced(**{n: getattr(self, n) for n in names if n != "target_l0"})
        return recipe.replaced(**{n: getattr(self, n) for n in names})


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a trained SAE on held-out token sequences."""

    sae: Path
    """Directory that `trainer train` wrote."""
    tokens: str
    """URL or path of a token table of held-out text, made with the model's own tokenizer."""
    model: str | None = None
    """Name or path of the language model; by default the one the store was captured from (needed where that was a
    local directory, whose path is not recorded)."""
    site: str | None = None
    """The site; by default the one the SAE was trained on."""
    sequences: int = 2_048
    """Sequences to evaluate on, at most (Gemma Scope: 2,048 of length 1,024)."""
    batch_sequences: int = 8
    """Sequences per forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the language model."""
    device: str = "cpu"
    """Torch device."""

    def __post_init__(self) -> None:
        """Refuse counts that are not positive."""
        for name in ("sequences", "batch_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained SAE in a format that other tools load."""

    sae: Path
    """Directory that `trainer train` wrote."""
    out: Path
    """Directory to write to; npz writes params.npz in it."""
    format: Literal["npz", "saelens"] = "npz"
    """Gemma Scope's params.npz, or a SAELens directory (cfg.json and sae_weights.safetensors)."""
    model_name: str | None = None
    """Model name for SAELens; by default the one the store was captured from."""
    context_size: int | None = None
    """Sequence length for SAELens; by default the store's."""
