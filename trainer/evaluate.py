"""What an SAE costs the language model: spliced loss, FVU, L0 and firing densities on held-out sequences.

Definitions (Gemma Scope, arXiv 2408.05147, section 4.1), all over kept positions, those whose token is not BOS, EOS or
padding; means are over tokens:

- `ce_clean`, `ce_sae`, `ce_zero`: next-token cross-entropy in nats over targets that are kept tokens, with the site's
  activations untouched, replaced by their reconstruction, and replaced by zeros. Both replacements happen at kept
  positions only; every other position keeps its original activation.
- `delta_loss` = ce_sae - ce_clean, and `loss_recovered` = 1 - (ce_sae - ce_clean) / (ce_zero - ce_clean).
- `fvu` = E||x - xhat||^2 / E||x - E x||^2, where E x is the mean over all evaluated tokens, not a batch's; sums are
  float64. (SAEBench's explained_variance is not 1 - FVU: it subtracts a scalar mean.)
- `l0`: mean number of active latents; `density`: each latent's firing frequency; `dead`: share of latents that never
  fired.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

from actstore.errors import ActstoreError, MismatchError
from actstore.progress import Progress
from trainer.config import EvalConfig
from trainer.files import SavedSAE, load_sae, model_of

Replace = Callable[[Float[Tensor, "sequences length d_model"]], Float[Tensor, "sequences length d_model"]]
"""From a site's activations to what the model goes on with."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures that the module docstring defines."""

    sequences: int
    tokens: int
    """Kept tokens: what FVU, L0 and densities are taken over."""
    ce_clean: float
    ce_sae: float
    ce_zero: float
    delta_loss: float
    loss_recovered: float
    fvu: float
    l0: float
    dead: float
    density: tuple[float, ...]
    """Firing frequency of each latent."""


@contextmanager
def splice(module: nn.Module, side: str, replace: Replace) -> Generator[None]:
    """While open, the model goes on with `replace(activations)` at this side ('input' or 'output') of `module`."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]), *args[1:])

    def after(_: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    hook = module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def cross_entropy(
    model: nn.Module, ids: Int[Tensor, "sequences length"], kept: Bool[Tensor, "sequences length"]
) -> tuple[float, int]:
    """Summed next-token loss over the kept targets, and their number; one sequence's logits at a time in float32."""
    logits = model(input_ids=ids, use_cache=False).logits
    targets = ids.masked_fill(~kept, -100)
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        total += float(nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum"))
    return total, int(kept[:, 1:].sum())


class _Sums:
    """Streaming sums over kept tokens, in float64."""

    def __init__(self, d_model: int, d_sae: int, device: torch.device) -> None:
        self.tokens, self.targets = 0, 0
        self.errors, self.squares = 0.0, 0.0
        self.loss = {"clean": 0.0, "sae": 0.0, "zero": 0.0}
        self.x = torch.zeros(d_model, dtype=torch.float64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def add(
        self,
        x: Float[Tensor, "tokens d_model"],
        xhat: Float[Tensor, "tokens d_model"],
        f: Float[Tensor, "tokens d_sae"],
    ) -> None:
        """Count one batch of tokens."""
        self.tokens += len(x)
        self.fired += (f > 0).sum(0)
        exact = x.double()
        self.x += exact.sum(0)
        self.squares += float(exact.square().sum())
        self.errors += float((exact - xhat.double()).square().sum())

    @property
    def fvu(self) -> float:
        """E||x - xhat||^2 / E||x - E x||^2."""
        return self.errors / (self.squares - float(self.x.square().sum()) / self.tokens)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    module: nn.Module,
    side: str,
    saved: SavedSAE,
    ids: Int[ndarray, "sequences length"],
    special_ids: Sequence[int],
    *,
    batch_sequences: int = 8,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Evaluate `saved` at one side ('input' or 'output') of `module`, a part of `model`, on token sequences.

    `special_ids` are BOS, EOS and padding. `on_batch` is told the sequences done.
    """
    sae, device = saved.sae, saved.sae.W_enc.device
    d_model, d_sae = sae.W_enc.shape
    sums = _Sums(d_model, d_sae, device)
    specials = torch.tensor(sorted(set(special_ids)), device=device)
    for start in range(0, len(ids), batch_sequences):
        tokens = torch.from_numpy(np.ascontiguousarray(ids[start : start + batch_sequences], np.int64)).to(device)
        kept = ~torch.isin(tokens, specials)
        seen: list[Tensor] = []

        def watch(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        with splice(module, side, watch):
            loss, targets = cross_entropy(model, tokens, kept)
        (clean,) = seen
        if clean.shape[-1] != d_model:
            raise ActstoreError(
                f"the site is {clean.shape[-1]} wide, the SAE reads {d_model}. Check --site and --model."
            )
        sums.loss["clean"] += loss
        sums.targets += targets
        x = clean[kept].float()
        f = sae.encode(x / saved.scale)
        xhat = sae.decode(f) * saved.scale
        sums.add(x, xhat, f)
        for name, value in (("sae", xhat), ("zero", torch.zeros_like(xhat))):
            spliced = clean.clone()
            spliced[kept] = value.to(clean.dtype)
            with splice(module, side, lambda _, spliced=spliced: spliced):
                sums.loss[name] += cross_entropy(model, tokens, kept)[0]
        on_batch(len(tokens))
    return _evaluation(len(ids), sums)


def _evaluation(sequences: int, sums: _Sums) -> Evaluation:
    if not sums.targets:
        raise ActstoreError("the token sequences hold no token to predict; give longer text to `actstore tokenize`")
    clean, sae, zero = (total / sums.targets for total in sums.loss.values())
    if zero == clean:
        raise ActstoreError("zero ablation does not change the loss: the site does not lead to the model's output")
    density = sums.fired.double() / sums.tokens
    return Evaluation(
        sequences=sequences,
        tokens=sums.tokens,
        ce_clean=clean,
        ce_sae=sae,
        ce_zero=zero,
        delta_loss=sae - clean,
        loss_recovered=1 - (sae - clean) / (zero - clean),
        fvu=sums.fvu,
        l0=float(density.sum()),
        dead=float((sums.fired == 0).double().mean()),
        density=tuple(density.tolist()),
    )


def place_of(model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """The module, and which side of it, that `site` is in a `transformers` model."""
    from actstore.capture.forward import decoder_of
    from actstore.capture.sites import check_sites, hooks_of, parse_sites

    (place,) = parse_sites(site)
    config: Any = model.config
    check_sites(config, (place,), str(config.name_or_path))
    hook = hooks_of(config.model_type)[place.kind]
    return decoder_of(model).layers[place.layer].get_submodule(hook.module), hook.side


def evaluate_saved(config: EvalConfig, progress: Progress | None = None) -> Evaluation:
    """Evaluate the SAE in `config.sae` on the first sequences of a token table."""
    from actstore.capture.model import load_model
    from actstore.tokens import open_tokens

    saved = load_sae(config.sae, config.device)
    name = config.model or model_of(saved)
    table = open_tokens(config.tokens)
    ids = table.ids(0, min(config.sequences, table.sequences))
    model = load_model(name, config.dtype, config.device)
    vocabulary = model.get_input_embeddings().num_embeddings
    if table.max_id >= vocabulary:
        raise MismatchError(
            f"{config.tokens} holds token {table.max_id}, {name} knows {vocabulary}. "
            "Tokenize with the model's own tokenizer."
        )
    place = place_of(model, config.site or saved.site)
    bar = (progress or Progress()).step("evaluate", total=len(ids), unit="sequences")
    special, size = table.special_ids, config.batch_sequences
    return evaluate(model, *place, saved, ids, special, batch_sequences=size, on_batch=bar.advance)
