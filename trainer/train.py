"""Train SAEs on one stream of activations.

`train_many` needs nothing but an iterator of batches, and feeds each to all SAEs: one read of the store, one transfer
to the device. The SAEs share nothing else, so each becomes bit for bit what it would be alone. `train_site` feeds it
from an activation store, with checkpoints, and writes the results; `train_from_store` is that for one SAE. In a
process group they do one process' part of that (`trainer/parallel.py`), and the lead writes what belongs to all. The
loop never waits for the device between log steps: statistics stay there until then.
"""

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

import actstore
from actstore.errors import ActstoreError, StreamError
from actstore.progress import Progress
from trainer import checkpoint, gpu
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig, SAESpec, TrainConfig
from trainer.device import settle, tf32_products
from trainer.files import CONFIG, METRICS, save_sae
from trainer.optim import second_moments, update
from trainer.parallel import ALONE, Deal, Ranks, check_deal, check_sharding, current
from trainer.sae import SAE, StepStatistics, init_sae, ranks_of, sae_of, shapes
from trainer.stream import Batch, Stream, normalisation
from trainer.watch import Meter, Metrics, last_metrics, note, of_all, open_metrics, watching


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    out: str
    site: str
    d_sae: int
    scale: float
    seconds: float
    """Wall time of the training loop, of all SAEs on the stream and from the first step on."""
    final: Metrics


@dataclass
class Run:
    """One SAE in training: all that its next step depends on, on its device."""

    name: str
    sae: SAE
    moments: dict[str, Tensor]
    idle: Float[Tensor, " d_sae"]
    """Tokens since each latent fired."""
    first_bad: Int[Tensor, ""]
    """The first step whose loss is not finite; the number of steps if there is none."""
    window_l0: Float[Tensor, ""]
    """Sum of the steps' L0 since the last line of metrics."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share the SAE; it and the state are then those of this one's latents."""
        return ranks_of(self.sae)

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors by name, not copied: what a checkpoint holds."""
        groups = {"parameters": self.sae.parameters, "buffers": self.sae.buffers, "moments": self.moments}
        named = {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}
        return named | {"idle": self.idle, "first_bad": self.first_bad, "window_l0": self.window_l0}

    def step(
        self, x: Float[Tensor, "batch d_model"], y: Float[Tensor, "batch d_out"] | None, step: int, steps: int
    ) -> StepStatistics:
        """Do step `step` (from 0) of `steps` on normalised activations, without waiting for the device."""
        recipe, dead = self.sae.recipe, self.idle >= self.sae.recipe.dead_after_tokens
        gradients, statistics = self.sae.loss_and_gradients(x, recipe.sparsity(step, steps), dead, y)
        rate = recipe.learning_rate(step, steps)
        update(self.sae, gradients, self.moments, step=step, rate=rate, recipe=recipe, ranks=self.ranks)
        self.idle.add_(len(x)).masked_fill_(statistics.fired > 0, 0)
        good = statistics.loss.isfinite()
        self.first_bad.copy_(torch.where(good, self.first_bad, self.first_bad.clamp(max=step)))
        self.window_l0 += statistics.l0
        return statistics


def start(name: str, sae: SAE, steps: int) -> Run:
    """The state of `sae` before the first of `steps` steps."""
    device = sae.W_enc.device
    return Run(
        name=name,
        sae=sae,
        moments=second_moments(sae),
        idle=torch.zeros(sae.W_enc.shape[1], device=device),
        first_bad=torch.full((), steps, device=device),
        window_l0=torch.zeros((), device=device),
    )


@dataclass
class Position:
    """How far a stream has been trained on: steps and rows done."""

    step: int = 0
    rows: int = 0
    checkpoint: Path | None = None
    """The last one, if any was written."""


def train_many(
    runs: Sequence[Run],
    batches: Iterable[Batch],
    *,
    steps: int,
    scale: float,
    target_scale: float = 1.0,
    position: Position | None = None,
    deal: Deal | None = None,
    log_every: int = 100,
    checkpoint_every: int = 0,
    on_log: Callable[[list[Metrics]], object] = lambda _: None,
    on_step: Callable[[int], object] = lambda _: None,
    on_checkpoint: Callable[[Position], object] = lambda _: None,
) -> None:
    """Train all `runs`, on one device, in place up to step `steps` on raw activations divided by `scale`.

    Batches for transcoders are pairs, and the second is divided by `target_scale`. `position` is where the runs
    stand, and is kept up to date; `batches` begin there. `on_log` gets the metrics of each run, `on_step` the rows of
    each step, `on_checkpoint` the position every `checkpoint_every` steps and at the end. With `deal`, other processes
    have further SAEs, on the same batches. Raises ActstoreError, the same on all of them, that names step and SAE if a
    loss stops being finite, and StreamError if the batches end early.
    """
    at, device, source, meter = position or Position(), runs[0].sae.W_enc.device, iter(batches), Meter()
    logged, everyone = at.step - at.step % log_every, deal or Deal(tuple(run.name for run in runs))
    while at.step < steps:
        try:
            batch = meter.wait(lambda: next(source))
        except StopIteration:
            text = f"the batches ended after {at.step} of {steps} steps; ask for fewer or feed more"
            raise StreamError(text) from None
        read, target = batch if isinstance(batch, tuple) else (batch, None)
        x = _normalised(read, scale, device)
        y = x if target is None else _normalised(target, target_scale, device)
        statistics = [run.step(x, None if y is x else y, at.step, steps) for run in runs]
        at.step, at.rows, meter.rows = at.step + 1, at.rows + len(x), meter.rows + len(x)
        log = at.step % log_every == 0 or at.step == steps
        keep = at.step == steps or bool(checkpoint_every and at.step % checkpoint_every == 0)
        if log or keep:
            _check_finite(runs, at, steps, everyone, parameters=keep)
        if log:
            window, logged = at.step - logged, at.step
            on_log(_measure(runs, statistics, y, at, steps=steps, window=window, rates=meter.lap()))
        on_step(len(x))
        if keep:
            on_checkpoint(at)


def _normalised(rows: Float[Tensor, "batch d"], scale: float, device: torch.device) -> Float[Tensor, "batch d"]:
    """`rows / scale` in float32 on the device; the rows stay as they are, and travel in their own type."""
    x = rows.to(device, non_blocking=True).to(torch.float32)
    return x / scale if x is rows else x.div_(scale)


def train(
    sae: SAE,
    batches: Iterable[Batch],
    *,
    steps: int,
    scale: float,
    log_every: int = 100,
    on_log: Callable[[Metrics], object] = lambda _: None,
) -> Metrics:
    """`train_many` for one SAE from its beginning; returns the last metrics."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    history: list[Metrics] = []

    def log(metrics: list[Metrics]) -> None:
        history[:] = metrics
        on_log(metrics[0])

    train_many([start("the SAE", sae, steps)], batches, steps=steps, scale=scale, log_every=log_every, on_log=log)
    return history[0]


def _check_finite(runs: Sequence[Run], at: Position, steps: int, everyone: Deal, *, parameters: bool) -> None:
    """Refuse losses that were not finite, and parameters that the last update left so."""
    found = [torch.stack([run.first_bad.double(), _not_finite(run) * float(parameters)]) for run in runs]
    first, broken = everyone.all(torch.stack(found)).unbind(1)
    step = int(first.min())
    names = [name for name, bad in zip(everyone.names, first.tolist(), strict=True) if bad == step < steps]
    what = f"the loss of {', '.join(names)} is not finite from step {step} (of {steps}) on"
    if not names and parameters:
        names = [name for name, bad in zip(everyone.names, broken.tolist(), strict=True) if bad]
        what = f"the parameters of {', '.join(names)} are not finite after {at.step} of {steps} steps"
    if names:
        good = f"The last good checkpoint is {at.checkpoint}. " if at.checkpoint else ""
        advice = "Check the store for NaN or infinite activations, or lower the learning rate."
        raise ActstoreError(f"{what}. {good}{advice}")


def _not_finite(run: Run) -> Float64[Tensor, ""]:
    """How many of its parameter tensors are not finite, counted on every rank that shares it."""
    bad = torch.stack([~p.isfinite().all() for p in run.sae.parameters.values()])
    return run.ranks.sum(bad.sum().double())


def _measure(
    runs: Sequence[Run],
    statistics: Sequence[StepStatistics],
    y: Float[Tensor, "batch d_out"],
    at: Position,
    *,
    steps: int,
    window: int,
    rates: dict[str, float],
) -> list[Metrics]:
    """The metrics after a step, with one wait for the device; begins a new window."""
    variance = (y - y.mean(0)).square().sum() / len(y)
    found: list[Tensor] = []
    for run, s in zip(runs, statistics, strict=True):
        dead = run.ranks.sum((run.idle >= run.sae.recipe.dead_after_tokens).float().mean()) / run.ranks.world
        found.append(torch.stack([s.loss, s.mse, s.l0, run.window_l0 / window, dead, variance]))
        run.window_l0.zero_()
    return [
        Metrics(
            step=at.step,
            rows=at.rows,
            loss=loss,
            mse=mse,
            fvu=mse / max(spread, 1e-30),
            l0=l0,
            mean_l0=mean_l0,
            dead=dead,
            sparsity=run.sae.recipe.sparsity(at.step - 1, steps),
            lr=run.sae.recipe.learning_rate(at.step - 1, steps),
            **rates,
        )
        for run, (loss, mse, l0, mean_l0, dead, spread) in zip(runs, torch.stack(found).tolist(), strict=True)
    ]


SAMPLE_ELEMENTS = 1 << 24
"""Pre-activations at most, of the sample that a recipe's `init_l0` reads: what `torch.quantile` takes."""


def _start_all(
    stream: Stream, specs: Sequence[SAESpec], deal: Deal, *, steps: int, device: str, ranks: Ranks
) -> tuple[list[Run], float, float]:
    """This process' runs before their first step, and the scales of what they read and of what they reconstruct."""
    scale, mean = normalisation(stream.store, stream.site, specs[0].recipe)
    target_scale, target_mean = normalisation(stream.store, stream.target or stream.site, specs[0].recipe)
    sizes: dict[str, Any] = {"d_out": None if stream.target is None else len(target_mean), "ranks": ranks}
    rows = stream.first_rows() if any(spec.recipe.init_l0 is not None for spec in specs) else None
    runs: list[Run] = []
    for spec in deal.mine(specs):
        if rows is not None:
            sizes["sample"] = rows[: max(1, SAMPLE_ELEMENTS // spec.d_sae)].float() / scale
        sae = init_sae(len(mean), spec.d_sae, spec.recipe, seed=spec.seed, mean=target_mean, device=device, **sizes)
        runs.append(start(spec.name, sae, steps))
    return runs, scale, target_scale


def train_site(
    config: RunConfig,
    stream: Stream,
    specs: Sequence[SAESpec],
    *,
    folders: Mapping[str, Path],
    checkpoints: Path,
    progress: Progress,
    dealt: bool = False,
) -> list[TrainResult]:
    """Train the SAEs of `specs` on one stream, each into its folder (by name), from the newest of `checkpoints`.

    `config` is one that `trainer.device.settle` returned. The processes of a process group share each SAE, or, with
    `dealt`, have SAEs of their own; all return all results.
    Raises ValueError for what store or processes can't serve and MismatchError if the checkpoint is of another run.
    """
    ranks = current()
    deal = Deal(tuple(spec.name for spec in specs), ranks if dealt else ALONE)
    sharing = ALONE if dealt else ranks
    check_deal(deal.ranks, len(specs))
    for spec in specs:
        check_sharding(sharing, spec)
        if spec.recipe.kernels == "triton":
            gpu.check(config.device)
    settings = settings_of(config, stream, specs)
    common: Any = {"steps": config.steps, "device": config.device, "ranks": sharing}
    runs, scale, target_scale = _start_all(stream, specs, deal, **common)
    at, spent, shards = Position(), 0.0, sharing.world
    with ExitStack() as stack:
        data = stack.enter_context(stream.open())
        stack.enter_context(checkpoint.locked(checkpoints, ranks))
        found = checkpoint.latest(checkpoints, settings, ranks) if config.resume else None
        if found:
            place = checkpoint.place(checkpoints, found.step)
            for run in runs:
                checkpoint.restore(place, run.name, run.state, shards=found.shards, ranks=sharing)
            data.load_state_dict(found.loader)
            at, spent = Position(found.step, found.rows, place), found.seconds
            shards = found.shards if found.step == config.steps else shards
        elif ranks.lead:
            checkpoint.clear(checkpoints)
        files: dict[str, io.FileIO] = {}
        for name, folder in folders.items() if ranks.lead else ():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).unlink(missing_ok=True)
            files[name] = stack.enter_context(open_metrics(folder / METRICS, found.metrics[name] if found else 0))
        seen = config if ranks.lead else replace(config, wandb=None, tensorboard=None)
        watch = stack.enter_context(watching(seen, stream.site, list(files), settings, at.step))
        stack.enter_context(tf32_products(config.device))
        bar = progress.step(f"train {stream.site}", total=config.steps * stream.batch_size, unit="rows")
        bar.skip(at.rows)
        bar.restart()
        began = time.perf_counter() - spent

        def log(metrics: list[Metrics]) -> None:
            metrics = of_all(metrics, deal)
            for (name, file), m in zip(files.items(), metrics, strict=False):
                file.write((json.dumps(asdict(m)) + "\n").encode())
                watch(name, m)
            bar.note(note(metrics))

        def save(at: Position) -> None:
            for file in files.values():
                os.fsync(file)
            index = Checkpoint(
                step=at.step,
                rows=at.rows,
                seconds=time.perf_counter() - began,
                settings=settings,
                loader=data.state_dict(),
                metrics={name: file.tell() for name, file in files.items()},
                shards=sharing.world,
            )
            states = {run.name: run.state for run in runs}
            at.checkpoint = checkpoint.save(checkpoints, index, states, keep=config.keep, ranks=ranks)

        train_many(
            runs,
            stream.batches(data),
            steps=config.steps,
            scale=scale,
            target_scale=target_scale,
            position=at,
            deal=deal,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            on_log=log,
            on_step=bar.advance,
            on_checkpoint=save,
        )
        seconds = time.perf_counter() - began
    about: dict[str, Any] = {"data_seed": stream.seed, "steps": at.step, "rows": at.rows}
    about |= {"store": stream.store.fingerprint, "provenance": stream.store.provenance}
    if stream.target is not None:
        about["target"] = {"site": stream.target, "scale": target_scale}
    final = {spec.name: last_metrics(folders[spec.name] / METRICS) for spec in specs}
    for spec, run in zip(deal.mine(specs), runs, strict=True) if dealt or ranks.lead else ():
        sae = run.sae if sharing.world == 1 else _assembled(at.checkpoint, spec, run.sae, shards)
        facts = {"seed": spec.seed, "final": final[spec.name], **about}
        save_sae(folders[spec.name], sae, scale=scale, site=stream.site, about=facts)
    ranks.barrier()
    figures: dict[str, Any] = {"site": stream.site, "scale": scale, "seconds": seconds}
    return [
        TrainResult(out=str(folders[spec.name]), d_sae=spec.d_sae, final=Metrics(**final[spec.name]), **figures)
        for spec in specs
    ]


def _assembled(path: Path | None, spec: SAESpec, shard: SAE, shards: int) -> SAE:
    """The whole of a shared SAE, on the CPU, from the checkpoint at the end."""
    assert path is not None
    d_model, d_out = len(shard.W_enc), shard.W_dec.shape[1]
    tensors = {name: torch.empty(s) for name, s in shapes(spec.recipe, d_model, spec.d_sae, d_out).items()}
    state = {f"parameters/{name}": tensor for name, tensor in tensors.items()}
    checkpoint.restore(path, spec.name, state, shards=shards, whole=False)
    return sae_of(spec.recipe, tensors)


def train_from_store(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train on `config.site` of `config.store` and write the SAE, its config and its metrics to `config.out`.

    Goes on from the checkpoint in `config.out`, if there is one. Raises as `settle` and `train_site` do.
    """
    display, checkpoints = progress or Progress(), config.out / "checkpoints"
    config = settle(config, [checkpoints], display)
    store, recipe = actstore.open(config.store), config.recipe
    stream = Stream(
        store=store,
        site=config.site,
        target=config.target,
        batch_size=recipe.batch_size,
        seed=config.data_seed,
        device=config.device,
    )
    d_sae = config.d_sae or config.expansion * len(store.stats(config.site).mean)
    spec = SAESpec(name="sae", d_sae=d_sae, seed=config.seed, recipe=recipe)
    folders = {"sae": config.out}
    return train_site(config, stream, [spec], folders=folders, checkpoints=checkpoints, progress=display)[0]


def settings_of(config: RunConfig, stream: Stream, specs: Sequence[SAESpec]) -> dict[str, Any]:
    """What fixes the result, as JSON values: fields that all SAEs share by name, others as `SAE.field`."""
    found: dict[str, Any] = {"store": stream.store.fingerprint, "site": stream.site, "target": stream.target}
    found |= {"data_seed": stream.seed, "steps": config.steps, "log_every": config.log_every}
    fields = {spec.name: {"d_sae": spec.d_sae, "seed": spec.seed, **asdict(spec.recipe)} for spec in specs}
    for name, first in fields[specs[0].name].items():
        if all(other[name] == first for other in fields.values()):
            found[name] = first
        else:
            found |= {f"{sae}.{name}": other[name] for sae, other in fields.items()}
    return found | {"saes": [spec.name for spec in specs]}
