"""What the four commands are asked: one frozen dataclass each, from which the command line is made.

Light to import (no torch), so that `trainer --help` answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.recipe import PRESETS, Recipe

Compute = Literal["float32", "bfloat16"]
COMPUTE: tuple[Compute, ...] = get_args(Compute)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What training one SAE and sweeping over many have in common."""

    store: str
    """URL or path of the activation store."""
    out: Path
    """Directory to write to; the same command goes on where it was interrupted."""
    steps: int
    """Optimizer steps; the store is read again from the start, in a new order, as often as that takes."""
    preset: Literal["gemma_scope", "gemma_scope_2", "anthropic_2025", "short"] = "gemma_scope"
    """The recipe to start from: a published one, or the one for a few thousand steps."""
    architecture: Literal["jumprelu", "topk", "batchtopk", "gated"] | None = None
    """Replaces the preset's architecture."""
    compute: Compute | None = None
    """Precision of matrix products. Default: what a resumed run recorded; else bfloat16 on a GPU, and the preset's
    precision on a CPU. A GPU multiplies float32 as TF32."""
    kernels: Literal["torch", "triton"] | None = None
    """What a GPU's own kernels are; Triton's are experimental, no GPU has run them yet."""
    data_seed: int = 0
    """Fixes the order of the batches."""
    batch_size: int | None = None
    """Replaces the preset's activations per step."""
    lr: float | None = None
    """Replaces the preset's learning rate."""
    bandwidth: float | None = None
    """Replaces the preset's kernel bandwidth."""
    threshold_init: float | None = None
    """Replaces the preset's initial threshold."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = True
    """Go on from the newest checkpoint in `out`; otherwise those are deleted and training starts over."""
    device: str = "auto"
    """Where to train: cpu, cuda or cuda:N; auto takes a GPU if PyTorch sees one."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    tensorboard: Path | None = None
    """Also log for TensorBoard, to this directory."""

    def __post_init__(self) -> None:
        """Refuse counts that are too small."""
        least = {"steps": 1, "batch_size": 1, "log_every": 1, "keep": 1, "checkpoint_every": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, it must be at least {bound}")

    def recipe_with(self, **overrides: Any) -> Recipe:
        """The preset with this config's replacements and further ones.

        A `target_l0` of 0 removes the target; for TopK and BatchTopK it is k.
        """
        names = ("architecture", "compute", "kernels", "batch_size", "lr", "bandwidth", "threshold_init")
        recipe, target = PRESETS[self.preset], overrides.pop("target_l0", None)
        if self.architecture in ("topk", "batchtopk"):
            if target is not None and (target < 1 or target != int(target)):
                raise ValueError(f"target_l0 is {target:g}; for {self.architecture} it is k, a whole number from 1 on")
            recipe, overrides["k"] = recipe.without_target(), None if target is None else int(target)
        elif target == 0:
            recipe = recipe.without_target()
        else:
            overrides["target_l0"] = target
        return recipe.replaced(**{name: getattr(self, name) for name in names}, **overrides)


@dataclass(frozen=True, kw_only=True)
class SAESpec:
    """One SAE to train on a stream."""

    name: str
    """Unique on the stream, and the name of its files."""
    d_sae: int
    seed: int
    """Fixes the initial weights."""
    recipe: Recipe

    def __post_init__(self) -> None:
        """Refuse a width or a target that no SAE can have."""
        if self.d_sae < 1:
            raise ValueError(f"the width is {self.d_sae}, it must be at least 1")
        k = self.recipe.k if self.recipe.architecture in ("topk", "batchtopk") else None
        if (target := k or self.recipe.target_l0) is not None and target > self.d_sae:
            raise ValueError(f"the L0 target is {target:g}, more than the {self.d_sae} latents of the SAE")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Train an SAE on one site of an activation store; writes sae.safetensors, config.json and metrics.jsonl."""

    site: str
    """The site to train on, for example resid_post.12."""
    target: str | None = None
    """Train a transcoder, which reconstructs this site from `site`: mlp_out.12 from mlp_in.12."""
    skip: bool = False
    """Give the transcoder an affine skip connection."""
    d_sae: int | None = None
    """Number of latents; by default `expansion` times the width of the site."""
    expansion: int = 8
    """Latents per dimension of the site, where d_sae is not given."""
    seed: int = 0
    """Fixes the initial weights."""
    sparsity_coefficient: float | None = None
    """Replaces the preset's price of an active latent."""
    target_l0: float | None = None
    """Replaces the preset's L0 target; 0 removes it, which makes the price constant. For TopK and BatchTopK: k."""

    def __post_init__(self) -> None:
        """Refuse counts that are too small."""
        super().__post_init__()
        for name in ("d_sae", "expansion"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if self.skip and self.target is None:
            raise ValueError("skip is for transcoders: give target, the site to reconstruct")

    @property
    def recipe(self) -> Recipe:
        """The preset with this config's replacements."""
        recipe = self.recipe_with(sparsity_coefficient=self.sparsity_coefficient, target_l0=self.target_l0)
        return recipe if self.target is None else recipe.for_transcoder(skip=self.skip)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RunConfig):
    """Train SAEs of every width, sparsity and seed on every site; one read of the store feeds all SAEs of a site."""

    sites: tuple[str, ...]
    """The sites to train on, for example resid_post.12 resid_post.18."""
    targets: tuple[str, ...] = ()
    """Train transcoders: the site that is reconstructed from each of `sites`, in the same order."""
    skip: bool = False
    """Give the transcoders an affine skip connection."""
    widths: tuple[int, ...]
    """Numbers of latents."""
    sparsity_coefficients: tuple[float, ...] = ()
    """Prices of an active latent, without an L0 target; by default the preset's own price and target."""
    target_l0s: tuple[float, ...] = ()
    """L0 targets, instead of prices; for TopK and BatchTopK: values of k."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights; every SAE sees the same batches."""

    def __post_init__(self) -> None:
        """Refuse an empty or ambiguous grid, and SAEs that can't be trained."""
        super().__post_init__()
        for name in ("sites", "widths", "sparsity_coefficients", "target_l0s", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice: {', '.join(map(str, values))}")
            if not values and name in ("sites", "widths", "seeds"):
                raise ValueError(f"{name} is empty, give at least one")
        if self.targets and len(self.targets) != len(self.sites):
            raise ValueError(f"{len(self.targets)} targets for {len(self.sites)} sites, give one for each")
        if self.skip and not self.targets:
            raise ValueError("skip is for transcoders: give targets, the sites to reconstruct")
        if self.sparsity_coefficients and self.target_l0s:
            raise ValueError(
                "sparsity_coefficients and target_l0s are both given; with a target the price only says "
                "how hard it is held, so sweep over one of them"
            )
        if any(not target > 0 for target in self.target_l0s):
            raise ValueError(f"target_l0s has {min(self.target_l0s):g}, they must be positive")
        if self.sparsity_coefficients and self.architecture in ("topk", "batchtopk"):
            raise ValueError(f"{self.architecture} has no sparsity coefficient; sweep over target_l0s, its k")
        _ = self.specs

    @property
    def specs(self) -> tuple[SAESpec, ...]:
        """The SAEs to train on each site."""
        sparsities: list[tuple[str, dict[str, float]]] = [
            *(
                (f"_coefficient_{_short(c)}", {"sparsity_coefficient": c, "target_l0": 0})
                for c in self.sparsity_coefficients
            ),
            *((f"_target_{_short(t)}", {"target_l0": t}) for t in self.target_l0s),
        ]
        return tuple(
            SAESpec(
                name=f"width_{width}{label}_seed_{seed}",
                d_sae=width,
                seed=seed,
                recipe=self._recipe(**overrides),
            )
            for width in self.widths
            for label, overrides in sparsities or [("", {})]
            for seed in self.seeds
        )

    def _recipe(self, **overrides: Any) -> Recipe:
        recipe = self.recipe_with(**overrides)
        return recipe.for_transcoder(skip=self.skip) if self.targets else recipe


def _short(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a trained SAE, or all of a sweep, on held-out token sequences."""

    sae: Path
    """Directory that `trainer train` wrote, or that holds several such, or of a Gemma Scope or SAELens release."""
    tokens: tuple[str, ...]
    """URLs or paths of token tables of held-out text, made with the model's own tokenizer; each is evaluated."""
    model: tuple[str, ...] = ()
    """Names or paths of language models of one shape, each evaluated: the SAE's own and, say, an instruction-tuned one.
    By default the one the store was captured from (needed where that was a local directory, whose path is not
    recorded)."""
    out: Path | None = None
    """Directory for evaluation.json and evaluation.html; by default the SAE's own, if this trainer wrote it. Of several
    SAEs each has a directory there, and frontier.json and frontier.html compare them."""
    site: str | None = None
    """The site; by default the one the SAE was trained on, which releases don't always say."""
    sequences: int = 2_048
    """Sequences to evaluate on, at most (Gemma Scope: 2,048 of length 1,024)."""
    batch_sequences: int = 8
    """Sequences per forward pass."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the language model; auto: what the SAE's store was captured in, float32 if that is not recorded."""
    device: str = "auto"
    """Where to evaluate: cpu, cuda or cuda:N; auto takes a GPU if PyTorch sees one."""

    def __post_init__(self) -> None:
        """Refuse counts that are not positive, and no data at all."""
        if not self.tokens:
            raise ValueError("tokens is empty, give at least one token table")
        for name in ("sequences", "batch_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write trained SAEs in a format that other tools load."""

    sae: Path
    """Directory that `trainer train` wrote; for gemma_scope also one that holds several, such as a sweep's."""
    out: Path
    """Directory to write to; npz writes params.npz in it."""
    format: Literal["npz", "gemma_scope", "saelens", "dictionary_learning"] = "npz"
    """Gemma Scope's params.npz; its whole layout with a model card, ready for upload; a SAELens directory; or a
    dictionary_learning one."""
    model_name: str | None = None
    """Model name for SAELens and dictionary_learning; by default the one the store was captured from."""
    context_size: int | None = None
    """Sequence length for SAELens and dictionary_learning; by default the store's."""
    license: str | None = None
    """Licence that the model card names, for example cc-by-4.0."""
