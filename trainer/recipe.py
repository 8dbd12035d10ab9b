"""The training recipe: every constant that shapes an SAE, by name, with its source.

`GEMMA_SCOPE` is the published recipe to the last constant (Lieberum et al. 2024, arXiv 2408.05147, section 3.2, cited
below as GS; JumpReLU and its gradients: Rajamanoharan et al. 2024, arXiv 2407.14435, cited as JR). `GEMMA_SCOPE_2` is
its successor's (technical paper of 2025-09-16, cited as GS2) and `ANTHROPIC_2025` that of Anthropic's update of January
2025 (transformer-circuits.pub/2025/january-update, cited as A25). `SHORT` is what to take for a few thousand steps; it
says where it differs and why.

Units: the SAE is trained on x / C with one scalar C per site, so that E||x||^2 = 1 over the store (the mean squared
norm of a row, not of a coordinate), or d_model if the recipe says so. Bandwidth, thresholds and sparsity coefficients
only mean something there.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Constants of one training run; the defaults are Gemma Scope's."""

    architecture: Literal["jumprelu", "topk", "batchtopk", "gated"] = "jumprelu"
    """What decides which latents fire: thresholds that are trained (GS), the k largest of each token (Gao et al. 2024)
    or of the batch (Bussmann et al. 2024), or a gate with its own bias (Rajamanoharan et al. 2024a)."""
    skip: bool = False
    """A transcoder's affine skip connection (GS2 releases transcoders with and without)."""
    unit_mean_square: bool = True
    """Inputs are scaled to E||x||^2 = 1 (GS 3.2); off: to E||x||^2 = d_model, the units of A25's constants (A25 scales
    the mean norm to sqrt(d_model), a few per cent away)."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """What the matrix products of a step read (GS 3.2: float32 throughout). bfloat16 multiplies copies of the matrices
    and activations; parameters, gradients, thresholds, pointwise work and Adam stay float32. So do the results of the
    products on a GPU; on a CPU they are rounded to bfloat16 (`trainer.parts.multiply`)."""
    kernels: Literal["torch", "triton"] = "torch"
    """What does the pointwise work of a step, a wide SAE's sums over active latents, and Adam, on a GPU: PyTorch's
    operations or Triton's kernels (`trainer/gpu.py`), which no GPU has run yet. Sums are rounded differently."""
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
    """Adam's first decay (GS 3.2). At 0 no first moment is stored."""
    beta2: float = 0.999
    """Adam's second decay (GS 3.2)."""
    adam_eps: float = 1e-8
    """Adam's epsilon (GS 3.2)."""
    lazy_adam: bool = False
    """Update only the rows of latents that have a gradient, and let the others' second moments catch up when they next
    have one: the same updates as Adam's, since with beta1 = 0 a zero gradient moves nothing. It pays for wide SAEs."""
    unit_decoder: bool = True
    """Keep the decoder's rows at length 1, and their gradients orthogonal to them (GS 3.2). Off, the penalties weigh
    each latent by the length of its row (A25; RI-L1 of a Gated SAE)."""
    decoder_init: Literal["he_unit", "uniform"] = "he_unit"
    """W_dec He-uniform with rows of length 1, W_enc = W_dec^T (GS 3.2); or W_dec uniform in +-1/sqrt(d_model), W_enc =
    (d_model / d_sae) W_dec^T (A25)."""
    init_l0: float | None = None
    """If set, b_enc starts where each latent fires on this many tokens in d_sae (A25: 10,000), by a sample's quantile.
    For d_sae at or below it that is every token."""
    clip_norm: float | None = None
    """If set, gradients are scaled down to this norm over all parameters, before the projection (Gemma Scope: not)."""
    batch_size: int = 4_096
    """Activations per step (GS 3.2)."""
    sparsity_coefficient: float = 6e-4
    """The price lambda of one active latent (GS print 6e-4 for L0 near 50 on Gemma 2 9B, layer 20)."""
    sparsity_warmup_steps: int = 10_000
    """Steps over which the sparsity coefficient rises linearly from 0 (GS 3.2)."""
    sparsity_warmup_fraction: float = 0.0
    """If above 0, the share of the run over which the coefficient rises, in place of a number of steps (A25: 1)."""
    sparsity_loss: Literal["l0", "l0_per_token", "tanh"] = "l0"
    """JumpReLU's: lambda * L0 (GS eq. 4), or the quadratic of `target_l0` in the batch's mean L0; the mean over tokens
    of lambda * (2/target) * (L0 - target)^2 (GS2); or lambda * sum tanh(tanh_scale * f * ||W_dec||) (A25)."""
    target_l0: float | None = None
    """If set, the sparsity loss is lambda * (target/2) * (L0/target - 1)^2 over the batch mean L0, whose price per
    active latent is lambda * (L0/target - 1); with `l0_per_token` it is Gemma Scope 2's, quadratic for each token."""
    tanh_scale: float = 4.0
    """The scale c inside tanh (A25: 4, where E||x|| = sqrt(d_model))."""
    pre_act_coefficient: float = 0.0
    """Price of sum relu(theta - z) * ||W_dec||, which pulls silent latents back (A25: 3e-6; GS: none)."""
    estimate_inputs: bool = False
    """Let the jumps' pseudo-derivative reach the pre-activations as well as the thresholds (A25; JR: thresholds only).
    A jump depends on z - theta, so it is the same kernel with the sign changed; the notes on A25 that this was
    written from say only that it reaches all parameters."""
    frequency_penalty: float = 0.0
    """Price of sum relu(p - frequency_max), p a latent's firing frequency in the batch, with the pseudo-derivative of
    L0. GS2 has a penalty that removes latents firing on more than 10% of tokens; neither its form nor its weight is in
    the notes that this was written from, so both are ours."""
    frequency_max: float = 0.1
    """The firing frequency from which the penalty applies (GS2: 10%)."""
    prefixes: int = 1
    """Matryoshka: the squared error is summed over this many nested dictionaries, the whole, its first half, its first
    quarter and so on. GS2 uses a Matryoshka loss; the sizes are not in the notes that this was written from. A latent
    of the first prefixes lowers several errors for one price, so JumpReLU's firing gathers there, and it recovers known
    features worse (`benchmarks/trainer_synthetic.py`); BatchTopK's recovers them as well or better."""
    k: int = 50
    """TopK: active latents per token; BatchTopK: on average. No default is published; Qwen-Scope uses 50 and 100."""
    aux_k: int = 256
    """Dead latents that AuxK lets reconstruct the error (openai/sparse_autoencoder: 256, or d_model / 2)."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK's error (Gao et al. 2024)."""
    threshold_rate: float = 0.01
    """How fast BatchTopK's running threshold follows the batch's (SAELens 6.54.12)."""
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
        positive = ("bandwidth", "lr", "adam_eps", "batch_size", "threshold_init", "dead_after_tokens", "k", "aux_k")
        optional = ("target_l0", "clip_norm", "init_l0")
        for name in (*positive, "prefixes", "tanh_scale", *(n for n in optional if getattr(self, n) is not None)):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, it must be positive and finite")
        weights = ("sparsity_coefficient", "pre_act_coefficient", "frequency_penalty", "aux_coefficient", "revival")
        for name in (*weights, "lr_warmup_steps", "sparsity_warmup_steps"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, it must be 0 or more and finite")
        shares = ("lr_warmup_start", "lr_decay_fraction", "beta2", "sparsity_warmup_fraction", "frequency_max")
        for name in (*shares, "threshold_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must lie in [0, 1]")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1 is {self.beta1}, it must lie in [0, 1)")
        for refused, why in self._conflicts():
            if refused:
                raise ValueError(why)

    def _conflicts(self) -> tuple[tuple[bool, str], ...]:
        """Pairs of fields that cannot go together, and why."""
        jumprelu, per_token = self.architecture == "jumprelu", self.sparsity_loss == "l0_per_token"
        batch_price = self.frequency_penalty > 0 or (self.sparsity_loss == "l0" and self.target_l0 is not None)
        return (
            (self.lazy_adam and self.beta1 > 0, "lazy_adam needs beta1 = 0: with a first moment every latent moves"),
            (
                self.kernels == "triton" and (not self.priced_by_counts or self.beta1 > 0),
                "kernels triton are for jumprelu priced by counts (l0, no prefixes, no skip) and beta1 = 0; take torch",
            ),
            (self.skip and self.pre_bias, "skip needs pre_bias off: take `for_transcoder`"),
            (self.skip and not jumprelu, f"skip is for jumprelu, the architecture is {self.architecture}"),
            (per_token and self.target_l0 is None, "sparsity_loss l0_per_token needs a target_l0"),
            (self.prefixes > 1 and self.architecture == "gated", "prefixes (Matryoshka) are not implemented for gated"),
            (self.lazy_adam and self.pre_act_coefficient > 0, "lazy_adam gains nothing with pre_act_coefficient"),
            (
                self.pre_act_coefficient > 0 and self.relu_before_jump,
                "pre_act_coefficient needs relu_before_jump off: ReLU stops its gradient",
            ),
            (
                self.estimate_inputs and batch_price,
                "estimate_inputs needs a price that does not depend on the batch: no frequency_penalty or batch target",
            ),
        )

    @property
    def priced_by_counts(self) -> bool:
        """Whether this is a JumpReLU SAE of one reconstruction whose latents are priced by counts alone."""
        other = self.skip or self.pre_act_coefficient > 0 or self.estimate_inputs or self.prefixes > 1
        return self.architecture == "jumprelu" and self.sparsity_loss == "l0" and not other

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) of `steps`: cosine warm-up, constant, then the decay if there is one."""
        rate = self.lr
        if step < self.lr_warmup_steps:
            rise = 0.5 * (1 - math.cos(math.pi * step / self.lr_warmup_steps))
            rate *= self.lr_warmup_start + (1 - self.lr_warmup_start) * rise
        decay_steps = self.lr_decay_fraction * steps
        return rate * min(1.0, (steps - step) / decay_steps) if decay_steps else rate

    def sparsity(self, step: int, steps: int | None = None) -> float:
        """The sparsity coefficient of step `step` (from 0) of `steps`, which a warm-up over a share of them needs."""
        warmup: float = self.sparsity_warmup_steps
        if self.sparsity_warmup_fraction:
            if steps is None:
                raise ValueError("the sparsity coefficient rises over a share of the run: say how long the run is")
            warmup = self.sparsity_warmup_fraction * steps
        warm = min(1.0, step / warmup) if warmup else 1.0
        return self.sparsity_coefficient * warm

    def scale(self, mean_sq_norm: float, d_model: int) -> float:
        """C, by which activations of this mean squared norm and width are divided."""
        return math.sqrt(mean_sq_norm / (1 if self.unit_mean_square else d_model))

    def for_transcoder(self, *, skip: bool = False) -> "Recipe":
        """This recipe without a pre-encoder bias (GS appendix C), and with an affine skip connection if asked."""
        return replace(self, pre_bias=False, skip=skip)

    def replaced(self, **overrides: Any) -> "Recipe":
        """This recipe with the overrides that are not None."""
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})

    def without_target(self) -> "Recipe":
        """This recipe with a constant price per active latent."""
        return replace(self, target_l0=None, sparsity_loss="l0" if self.target_l0 else self.sparsity_loss)


GEMMA_SCOPE = Recipe()
"""Gemma Scope's recipe, for runs of a million steps."""

GEMMA_SCOPE_2 = Recipe(
    sparsity_loss="l0_per_token", target_l0=50.0, sparsity_warmup_steps=50_000, frequency_penalty=0.1, prefixes=5
)
"""Gemma Scope 2's recipe for single-layer SAEs: Gemma Scope's but for the quadratic L0 penalty, its warm-up of 50,000
steps, the frequency penalty and the Matryoshka loss. Targets of 10, 50, 100 and 150 were released. What is not in the
notes that this was written from: the coefficient (Gemma Scope's example stands in), the penalty's weight and form,
the number and sizes of the prefixes."""

ANTHROPIC_2025 = Recipe(
    unit_mean_square=False,
    bandwidth=2.0,
    threshold_init=0.1,
    lr=2e-4,
    lr_warmup_steps=0,
    lr_decay_fraction=0.2,
    beta1=0.9,
    clip_norm=1.0,
    batch_size=32_768,
    unit_decoder=False,
    decoder_init="uniform",
    init_l0=10_000.0,
    sparsity_loss="tanh",
    sparsity_coefficient=15.0,
    sparsity_warmup_steps=0,
    sparsity_warmup_fraction=1.0,
    pre_act_coefficient=3e-6,
    estimate_inputs=True,
    relu_before_jump=False,
    pre_bias=False,
)
"""Anthropic's of January 2025: a tanh of the features is priced (A25: about 10 to 20), a pre-activation loss revives,
pseudo-derivatives reach all parameters, decoder rows are free and are brought to length 1 after training
(`trainer.sae.as_jumprelu`). Not in the notes that this was written from: a warm-up of the rate (none), Adam's epsilon
(Gemma Scope's), and whether b_dec is subtracted before the encoder (not: their encoder is a plain affine map)."""

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

PRESETS: dict[str, Recipe] = {
    "gemma_scope": GEMMA_SCOPE,
    "gemma_scope_2": GEMMA_SCOPE_2,
    "anthropic_2025": ANTHROPIC_2025,
    "short": SHORT,
}
