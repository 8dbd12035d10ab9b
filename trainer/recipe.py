"""The training recipe: every constant that shapes an SAE, by name, with its source.

`GEMMA_SCOPE` is the published recipe to the last constant (Lieberum et al. 2024, arXiv 2408.05147, section 3.2, cited
below as GS; JumpReLU and its gradients: Rajamanoharan et al. 2024, arXiv 2407.14435, cited as JR). `SHORT` is what to
take for a few thousand steps; it says where it differs and why.

Units: the SAE is trained on x / C with one scalar C per site, so that E||x||^2 = 1 over the store (the mean squared
norm of a row, not of a coordinate). Bandwidth, thresholds and sparsity coefficients only mean something there.
"""

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Constants of one training run; the defaults are Gemma Scope's."""

    bandwidth: float = 0.001
    """Width of the rectangle kernel that estimates the thresholds' gradient, at E||x||^2 = 1 (GS 3.2)."""
    lr: float = 7e-5
    """Learning rate after warm-up (GS 3.2)."""
    lr_warmup_steps: int = 1_000
    """Steps of the cosine warm-up (GS 3.2)."""
    lr_warmup_start: float = 0.1
    """The share of `lr` that warm-up starts from (GS 3.2)."""
    lr_decay_fraction: float = 0.0
    """The last share of the run over which the rate falls linearly to zero. Gemma Scope: 0, constant to the end."""
    beta1: float = 0.0
    """Adam's first decay (GS 3.2). Only 0 is implemented: no first moment is stored."""
    beta2: float = 0.999
    """Adam's second decay (GS 3.2)."""
    adam_eps: float = 1e-8
    """Adam's epsilon (GS 3.2)."""
    clip_norm: float | None = None
    """If set, gradients are scaled down to this norm over all parameters, before the projection (Gemma Scope: not)."""
    batch_size: int = 4_096
    """Activations per step (GS 3.2)."""
    sparsity_coefficient: float = 6e-4
    """The price lambda of one active latent (GS print 6e-4 for L0 near 50 on Gemma 2 9B, layer 20)."""
    sparsity_warmup_steps: int = 10_000
    """Steps over which the sparsity coefficient rises linearly from 0 (GS 3.2)."""
    target_l0: float | None = None
    """If set, the sparsity loss is lambda * (target/2) * (L0/target - 1)^2 over the batch mean L0, whose price per
    active latent is lambda * (L0/target - 1); Gemma Scope 2 penalises L0 quadratically too, but for each token."""
    threshold_init: float = 0.001
    """Every threshold at the start (GS 3.2)."""
    log_threshold: bool = True
    """Train log(threshold), as JR's notebook does. It moves thresholds by at most a factor exp(lr) a step, so a
    short run hardly moves them (SAELens issue 494); off, the threshold itself is trained and kept >= 0."""
    pre_bias: bool = True
    """Subtract b_dec from the encoder's input in training; it is folded away at export (GS 3.2)."""
    relu_before_jump: bool = True
    """Apply ReLU before the jump (JR's pseudo-code). It matters only to latents whose threshold is below half a
    bandwidth: without it, negative pre-activations may fall into the kernel's window."""
    init_b_dec_to_mean: bool = False
    """Start b_dec at the mean activation instead of 0 (Gemma Scope: 0)."""
    dead_after_tokens: int = 10_000_000
    """A latent counts as dead after this many tokens without firing (the usual 10 million)."""
    revival: float = 0.0
    """Weight of the loss term that sums theta - b_enc over dead latents, which brings them back to firing.
    Gemma Scope: 0, JumpReLU leaves few latents dead in a long run."""

    def __post_init__(self) -> None:
        """Refuse constants outside their range."""
        if self.beta1 != 0:
            raise ValueError(f"beta1 is {self.beta1}, only 0 is implemented: no first moment is stored")
        positive = ("bandwidth", "lr", "adam_eps", "batch_size", "threshold_init", "dead_after_tokens")
        for name in (*positive, *(n for n in ("target_l0", "clip_norm") if getattr(self, n) is not None)):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, it must be positive and finite")
        for name in ("sparsity_coefficient", "lr_warmup_steps", "sparsity_warmup_steps", "revival"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, it must be 0 or more and finite")
        for name in ("lr_warmup_start", "lr_decay_fraction", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must lie in [0, 1]")

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) of `steps`: cosine warm-up, constant, then the decay if there is one."""
        rate = self.lr
        if step < self.lr_warmup_steps:
            rise = 0.5 * (1 - math.cos(math.pi * step / self.lr_warmup_steps))
            rate *= self.lr_warmup_start + (1 - self.lr_warmup_start) * rise
        decay_steps = self.lr_decay_fraction * steps
        return rate * min(1.0, (steps - step) / decay_steps) if decay_steps else rate

    def sparsity(self, step: int) -> float:
        """The sparsity coefficient of step `step` (from 0)."""
        warm = min(1.0, step / self.sparsity_warmup_steps) if self.sparsity_warmup_steps else 1.0
        return self.sparsity_coefficient * warm

    def replaced(self, **overrides: Any) -> "Recipe":
        """This recipe with the overrides that are not None."""
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})

    def without_target(self) -> "Recipe":
        """This recipe with a constant price per active latent."""
        return replace(self, target_l0=None)


GEMMA_SCOPE = Recipe()
"""Gemma Scope's recipe, for runs of a million steps."""

SHORT = Recipe(
    bandwidth=0.03,
    lr=2e-3,
    lr_warmup_steps=50,
    lr_decay_fraction=0.5,
    beta2=0.99,
    clip_norm=1.0,
    batch_size=512,
    sparsity_coefficient=0.03,
    sparsity_warmup_steps=300,
    target_l0=36.0,
    threshold_init=0.02,
    log_threshold=False,
    init_b_dec_to_mean=True,
    dead_after_tokens=50_000,
    revival=1e-3,
)
"""For a few thousand steps on one or two million rows. Loss, gradients and order of the step are Gemma Scope's; these
constants are not, because its run is a thousand times longer:

- a larger rate that decays, a shorter memory in Adam and small batches: there are few steps to learn in;
- gradients are clipped: residual streams hold rare rows a hundred times longer than the rest (SmolLM2-135M, layer 15:
  one in 8,000, at position 1), and one of them would undo hundreds of steps (`docs/log.md`);
- the thresholds themselves are trained, and start at a higher value, since log-thresholds would hardly move;
- a wider kernel: half this width gave the same FVU with twice as many dead latents;
- a target L0 instead of a fixed price, as there is no time for a sweep over prices;
- b_dec starts at the mean, and dead latents are revived: without that, more of them stayed dead on easy sites.

Keep batch x steps at 0.75 million rows or more. At equal rows, batch 1,024 gave a higher FVU than batch 512.
"""

PRESETS: dict[str, Recipe] = {"gemma_scope": GEMMA_SCOPE, "short": SHORT}
