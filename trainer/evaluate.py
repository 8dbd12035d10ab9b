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
  fired; `dense`: share that fired on more than a tenth of the tokens, which Gemma Scope 2 penalises.
- `positions`: the same over positions 0, 1, 2-3, 4-7, ... of a sequence. FVU there compares with the mean over all
  evaluated tokens; a loss belongs to the position of the token that is predicted (so the delta loss of the token after
  BOS is 0, for only BOS predicts it, and BOS is not replaced).

An SAE is evaluated on every model and every token table that are given: on another model of the same shape, that says
how far it transfers. Of several SAEs on one site, such as a sweep's, each costs one pass of the model more, and
`frontier.html` sets L0 against FVU and delta loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor, nn

from actstore.capture.config import Precision
from actstore.capture.precision import slow_bfloat16
from actstore.errors import ActstoreError, MismatchError
from actstore.progress import Progress
from actstore.tokens.table import TokenTable
from trainer.card import EVALUATION, config_digest
from trainer.config import EvalConfig
from trainer.device import choose_device
from trainer.files import CONFIG, WEIGHTS, SavedSAE, model_dtype_of, model_of, write_json
from trainer.releases import load_any
from trainer.splice import cross_entropy, place_of, splice, watch

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DENSE = 0.1
"""A latent that fires on more than this share of tokens is dense."""

EDGES = np.linspace(-7, 0, 57)
"""Edges of the histogram of log10 firing frequency, eight bins a decade; rarer latents count in the first."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """The figures of tokens at positions `first` to `stop` - 1 of their sequences; None where nothing defines one."""

    first: int
    stop: int
    tokens: int
    fvu: float | None
    l0: float
    delta_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures that the module docstring defines, for one model and one set of sequences."""

    sae: str = ""
    """Directory of the SAE."""
    model: str = ""
    dtype: str = ""
    """Precision of the model."""
    data: str = ""
    """Where the sequences come from."""
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
    dense: float
    positions: tuple[Position, ...]
    histogram: tuple[int, ...]
    """Latents that fired, by log10 frequency between `EDGES`."""
    density: tuple[float, ...]
    """Firing frequency of each latent."""

    @property
    def figures(self) -> dict[str, Any]:
        """What fits a table: everything but the sequences of numbers."""
        return {name: value for name, value in vars(self).items() if name not in ("positions", "histogram", "density")}


def _bins(positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Which bin positions belong to: 0 for 0, and i for 2^(i-1) to 2^i - 1."""
    return torch.frexp(positions.float()).exponent.long()


class _Sums:
    """Streaming sums over kept tokens by bin of position, in float64."""

    def __init__(self, d_model: int, d_sae: int, length: int, device: torch.device) -> None:
        bins = int(_bins(torch.tensor(length - 1))) + 1
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.length = length
        self.tokens, self.targets, self.active, self.errors, self.squares = (zeros(bins) for _ in range(5))
        self.loss = {name: zeros(bins) for name in ("clean", "sae", "zero")}
        self.x = zeros(bins, d_model)
        self.fired = zeros(d_sae)

    def add(
        self,
        x: Float[Tensor, "tokens d_model"],
        xhat: Float[Tensor, "tokens d_model"],
        f: Float[Tensor, "tokens d_sae"],
        positions: Int[Tensor, " tokens"],
    ) -> None:
        """Count one batch of tokens."""
        exact, where = x.double(), _bins(positions)
        active = torch.gt(f, 0, out=torch.empty_like(f))  # as 0.0 and 1.0: booleans are several times slower to add
        self.fired += active.sum(0)
        self.tokens.index_add_(0, where, torch.ones_like(exact[:, 0]))
        self.active.index_add_(0, where, active.sum(1).double())
        self.x.index_add_(0, where, exact)
        self.squares.index_add_(0, where, exact.square().sum(1))
        self.errors.index_add_(0, where, (exact - xhat.double()).square().sum(1))

    def add_loss(self, name: str, losses: Float64[Tensor, " length"]) -> None:
        """Count the losses of one batch of sequences."""
        self.loss[name].index_add_(0, _bins(torch.arange(self.length, device=losses.device)), losses)

    def add_targets(self, kept: Bool[Tensor, "sequences length"]) -> None:
        """Count the tokens that are predicted."""
        where = _bins(torch.arange(1, self.length, device=kept.device))
        self.targets.index_add_(0, where, kept[:, 1:].sum(0, dtype=torch.float64))

    @property
    def fvu(self) -> float:
        """E||x - xhat||^2 / E||x - E x||^2."""
        variance = self.squares.sum() - self.x.sum(0).square().sum() / self.tokens.sum()
        return float(self.errors.sum() / variance)

    def positions(self) -> tuple[Position, ...]:
        """The figures of every bin that holds tokens."""
        mean = self.x.sum(0) / self.tokens.sum()
        variance = self.squares - 2 * self.x @ mean + self.tokens * mean.square().sum()
        delta = (self.loss["sae"] - self.loss["clean"]) / self.targets
        fvu, l0 = self.errors / variance, self.active / self.tokens
        return tuple(
            Position(
                first=(1 << i) >> 1,
                stop=min(1 << i, self.length),
                tokens=int(self.tokens[i]),
                fvu=_finite(fvu[i]),
                l0=float(l0[i]),
                delta_loss=_finite(delta[i]),
            )
            for i in range(len(fvu))
            if self.tokens[i] > 0
        )


def _finite(value: Float64[Tensor, ""]) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def evaluate(
    model: nn.Module,
    module: nn.Module,
    side: str,
    saved: SavedSAE,
    ids: Int[ndarray, "sequences length"],
    kept: Bool[ndarray, "sequences length"],
    *,
    target: tuple[nn.Module, str] | None = None,
    batch_sequences: int = 8,
) -> Evaluation:
    """`evaluate_many` for one SAE."""
    how: dict[str, Any] = {"target": target, "batch_sequences": batch_sequences}
    return evaluate_many(model, module, side, [saved], ids, kept, **how)[0]


@torch.inference_mode()
def evaluate_many(
    model: nn.Module,
    module: nn.Module,
    side: str,
    saes: Sequence[SavedSAE],
    ids: Int[ndarray, "sequences length"],
    kept: Bool[ndarray, "sequences length"],
    *,
    target: tuple[nn.Module, str] | None = None,
    batch_sequences: int = 8,
    on_batch: Callable[[int], object] = lambda _: None,
) -> list[Evaluation]:
    """Evaluate SAEs at one side ('input' or 'output') of `module`, a part of `model`, on token sequences.

    Transcoders read there and reconstruct, and are spliced in, at `target`. `kept` is false at BOS, EOS and padding.
    `on_batch` is told the sequences done.
    """
    device = saes[0].sae.W_enc.device
    every = [_Sums(s.sae.W_dec.shape[1], s.sae.W_enc.shape[1], ids.shape[1], device) for s in saes]
    read, written = (module, side), target or (module, side)
    for start in range(0, len(ids), batch_sequences):
        tokens = torch.from_numpy(np.ascontiguousarray(ids[start : start + batch_sequences], np.int64)).to(device)
        here = torch.from_numpy(kept[start : start + batch_sequences]).to(device)
        seen: dict[str, Tensor] = {}
        with watch(*read, seen, "read"), watch(*written, seen, "written"):
            losses = {"clean": cross_entropy(model, tokens, here)}
        clean = seen["written"]

        def spliced(value: Tensor | float, clean: Tensor = clean, tokens: Tensor = tokens, here: Tensor = here) -> Any:
            changed = clean.clone()
            changed[here] = value.to(clean.dtype) if isinstance(value, Tensor) else value
            with splice(*written, lambda _: changed):
                return cross_entropy(model, tokens, here)

        losses["zero"] = spliced(0.0)
        x, y, positions = seen["read"][here].float(), clean[here].float(), here.nonzero()[:, 1]
        for saved, sums in zip(saes, every, strict=True):
            _check_width(seen["read"], saved.sae.W_enc.shape[0], "reads")
            _check_width(seen["written"], saved.sae.W_dec.shape[1], "writes")
            sums.add_targets(here)
            xhat = _reconstructed(saved, x, y, positions, sums)
            for name, loss in {**losses, "sae": spliced(xhat)}.items():
                sums.add_loss(name, loss)
        on_batch(len(tokens))
    return [_evaluation(len(ids), sums) for sums in every]


def _check_width(activations: Tensor, width: int, does: str) -> None:
    if activations.shape[-1] != width:
        raise ActstoreError(
            f"the site is {activations.shape[-1]} wide, the SAE {does} {width}. Check --site and --model."
        )


def _reconstructed(
    saved: SavedSAE,
    x: Float[Tensor, "tokens d_model"],
    y: Float[Tensor, "tokens d_out"],
    positions: Int[Tensor, " tokens"],
    sums: _Sums,
) -> Float[Tensor, "tokens d_out"]:
    """The reconstruction of `y`, which is `x` but for a transcoder, from `x`; counted in `sums`."""
    scale = saved.config.get("target", {}).get("scale", saved.scale)
    parts, rows = [torch.empty_like(y[:0])], rows_at_once(saved.sae.W_enc.shape[1])
    for read, wanted, where in zip(x.split(rows), y.split(rows), positions.split(rows), strict=True):
        f = saved.sae.encode(read / saved.scale)
        parts.append(saved.sae.decode(f, read / saved.scale) * scale)
        sums.add(wanted, parts[-1], f, where)
    return torch.cat(parts)


def rows_at_once(d_sae: int) -> int:
    """Tokens whose features take half a GiB as float32."""
    return max(1, (1 << 27) // d_sae)


def _evaluation(sequences: int, sums: _Sums) -> Evaluation:
    targets = int(sums.targets.sum())
    if not targets:
        raise ActstoreError("the token sequences hold no token to predict; give longer text to `actstore tokenize`")
    clean, sae, zero = (float(loss.sum()) / targets for loss in sums.loss.values())
    if zero == clean:
        raise ActstoreError("zero ablation does not change the loss: the site does not lead to the model's output")
    tokens = int(sums.tokens.sum())
    density = (sums.fired / tokens).cpu().numpy()
    fired = density[density > 0]
    counts, _ = np.histogram(np.log10(fired).clip(EDGES[0], EDGES[-1]), EDGES)
    return Evaluation(
        sequences=sequences,
        tokens=tokens,
        ce_clean=clean,
        ce_sae=sae,
        ce_zero=zero,
        delta_loss=sae - clean,
        loss_recovered=1 - (sae - clean) / (zero - clean),
        fvu=sums.fvu,
        l0=float(density.sum()),
        dead=1 - len(fired) / len(density),
        dense=float((density > DENSE).mean()),
        positions=sums.positions(),
        histogram=tuple(counts.tolist()),
        density=tuple(density.tolist()),
    )


def saes_in(directory: Path) -> list[Path]:
    """The directories of this trainer's SAEs below one that is none itself, such as a sweep's; else the path itself."""
    if (directory / WEIGHTS).exists():
        return [directory]
    return sorted(path.parent for path in directory.glob(f"**/{WEIGHTS}")) or [directory]


def evaluate_saved(config: EvalConfig, progress: Progress | None = None) -> tuple[Evaluation, ...]:
    """Evaluate the SAE in `config.sae`, or all below it, on the first sequences of every token table, on every model.

    Writes evaluation.json and evaluation.html of each to `config.out`, by default to the SAE's directory if it is one
    of ours, and of several also frontier.json and frontier.html. Raises ValueError for a device that is not there.
    """
    from actstore.tokens import open_tokens

    display = progress or Progress()
    device, reason = choose_device(config.device)
    display.say(f"device {device} ({reason})")
    config, paths = replace(config, device=device), saes_in(config.sae)
    saes = {path: load_any(path, site=config.site, device=config.device) for path in paths}
    tables = {url: open_tokens(url) for url in config.tokens}
    dtype, reason = _choose_dtype(config, tuple(saes.values()))
    display.say(f"model in {dtype} ({reason})")
    done = {path: list[Evaluation]() for path in paths}
    for name in config.model or sorted({model_of(saved) for saved in saes.values()}):
        for path, found in _on_model(name, dtype, saes, tables, config, display):
            done[path].append(found)
    for path, found in done.items():
        ours = (path / WEIGHTS).exists() and (path / CONFIG).exists()
        out = config.out / path.relative_to(config.sae) if config.out else path if ours else None
        if out is not None:
            write_evaluations(out, str(path), saes[path].site, found)
    if len(paths) > 1:
        write_frontier(config.out or config.sae, config.sae, saes, done)
    return tuple(evaluation for path in paths for evaluation in done[path])


def _choose_dtype(config: EvalConfig, saes: Sequence[SavedSAE]) -> tuple[Precision, str]:
    """The precision to load models in, and why."""
    if config.dtype != "auto":
        return config.dtype, "as asked"
    recorded = {model_dtype_of(saved) for saved in saes}
    for dtype in PRECISIONS:
        if recorded == {dtype}:
            slow = "; slow, this processor has no bfloat16 products, float32 is faster"
            reason = "auto: what the store was captured in"
            return dtype, reason + slow * (dtype == "bfloat16" and slow_bfloat16(config.device))
    what = "the SAEs' stores do not agree" if len(recorded) > 1 else "no SAE records what its store was captured in"
    return "float32", f"auto: {what}"


def _on_model(
    name: str,
    dtype: Precision,
    saes: Mapping[Path, SavedSAE],
    tables: Mapping[str, TokenTable],
    config: EvalConfig,
    display: Progress,
) -> Iterator[tuple[Path, Evaluation]]:
    """The evaluations of all SAEs on every table, of one model; the model is gone afterwards."""
    from actstore.capture.model import load_model

    model = load_model(name, dtype, config.device)
    vocabulary = model.get_input_embeddings().num_embeddings
    for url, table in tables.items():
        if table.max_id >= vocabulary:
            raise MismatchError(
                f"{url} holds token {table.max_id}, {name} knows {vocabulary}. Tokenize with the model's own tokenizer."
            )
    places: dict[tuple[str, str | None], list[Path]] = {}
    for path, saved in saes.items():
        places.setdefault((saved.site, saved.config.get("target", {}).get("site")), []).append(path)
    for (site, written), paths in places.items():
        place, target = place_of(model, site), None if written is None else place_of(model, written)
        for url, table in tables.items():
            ids = table.ids(0, min(config.sequences, table.sequences))
            what = f"evaluate {site}, {PurePath(name).name}, {PurePath(url).name}"
            bar = display.step(what, total=len(ids), unit="sequences")
            how: dict[str, Any] = {"batch_sequences": config.batch_sequences, "on_batch": bar.advance}
            here = [saes[path] for path in paths]
            kept = table.documents(0, len(ids)) >= 0  # by place: a vocabulary may pad with a token of text
            found = evaluate_many(model, *place, here, ids, kept, target=target, **how)
            for path, one in zip(paths, found, strict=True):
                yield path, replace(one, sae=str(path), model=name, dtype=dtype, data=url)


def write_evaluations(out: Path, sae: str, site: str, evaluations: Sequence[Evaluation]) -> None:
    """Write `out`/evaluation.json, every figure, and `out`/evaluation.html, which shows them."""
    from trainer.report import evaluation_sections, write_report

    about = {"sae": sae, "config": config_digest(Path(sae)), "site": site, "log10_edges": EDGES.tolist()}
    write_json(out / EVALUATION, {**about, "evaluations": [asdict(e) for e in evaluations]})
    figures = evaluations[0].figures
    write_report(
        out / "evaluation.html", title=f"SAE on {site}", figures=figures, sections=evaluation_sections(evaluations)
    )


def write_frontier(
    out: Path, root: Path, saes: Mapping[Path, SavedSAE], done: Mapping[Path, Sequence[Evaluation]]
) -> None:
    """Write the figures of every SAE below `root` to `out`/frontier.json, and against L0 to `out`/frontier.html."""
    from trainer.report import frontier_sections, write_report

    rows: list[dict[str, Any]] = []
    for path, saved in saes.items():
        about = {"name": path.relative_to(root).as_posix(), "site": saved.site, "d_sae": saved.sae.W_enc.shape[1]}
        about["architecture"] = saved.sae.recipe.architecture
        rows += [{**about, **evaluation.figures, "sae": about["name"]} for evaluation in done[path]]
    write_json(out / "frontier.json", {"evaluations": rows})
    figures = {"SAEs": len(saes), "sequences": rows[0]["sequences"], "tokens": rows[0]["tokens"]}
    write_report(out / "frontier.html", title=f"SAEs in {root.name}", figures=figures, sections=frontier_sections(rows))
