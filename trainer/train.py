"""Train one SAE on a stream of activations.

`train` needs nothing but an iterator of [batch, d_model] tensors; `train_from_store` feeds it from an activation
store and writes the result. The loop never waits for the device between log steps: statistics stay there until then.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actstore.errors import ActstoreError, StreamError
from actstore.progress import Progress
from actstore.stream.adapters import endless
from trainer.config import TrainConfig
from trainer.files import CONFIG, METRICS, save_sae
from trainer.optim import second_moments, update
from trainer.sae import JumpReLUSAE, StepStatistics, init_sae


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One line of metrics.jsonl: the state after `step` steps."""

    step: int
    rows: int
    """Activations trained on so far."""
    loss: float
    mse: float
    """Mean ||x - xhat||^2 of the batch, where E||x||^2 = 1."""
    fvu: float
    """mse over the batch's own variance (an evaluation uses the data set's)."""
    l0: float
    dead: float
    """Share of latents that have not fired for `recipe.dead_after_tokens` tokens."""
    sparsity: float
    """The sparsity coefficient of this step."""
    lr: float
    rows_per_second: float
    """Since the previous line."""
    wait: float
    """Share of that time spent waiting for the next batch."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    out: str
    site: str
    d_sae: int
    scale: float
    seconds: float
    """Wall time of the training loop."""
    final: Metrics


def train(
    sae: JumpReLUSAE,
    batches: Iterable[Float[Tensor, "_batch d_model"]],
    *,
    steps: int,
    scale: float,
    log_every: int = 100,
    on_log: Callable[[Metrics], object] = lambda _: None,
    on_step: Callable[[int], object] = lambda _: None,
) -> Metrics:
    """Train `sae` in place for `steps` steps on raw activations divided by `scale`; returns the last metrics.

    `on_step` is told the rows of each step. Raises ActstoreError that names the step if the loss stops being finite,
    and StreamError if the batches end early.
    """
    recipe, moments, device = sae.recipe, second_moments(sae), sae.W_enc.device
    idle = torch.zeros(sae.W_enc.shape[1], device=device)
    first_bad = torch.full((), steps, device=device)
    metrics, rows, source = None, 0, iter(batches)
    meter = _Meter()
    for step in range(steps):
        try:
            batch = meter.wait(lambda: next(source))
        except StopIteration:
            raise StreamError(f"the batches ended after {step} of {steps} steps; ask for fewer or feed more") from None
        x = batch.to(device, torch.float32, non_blocking=True) / scale
        rate, sparsity = recipe.learning_rate(step, steps), recipe.sparsity(step)
        gradients, statistics = sae.loss_and_gradients(x, sparsity, idle >= recipe.dead_after_tokens)
        update(sae, gradients, moments, step=step, rate=rate, recipe=recipe)
        idle = (idle + len(x)).masked_fill_(statistics.fired > 0, 0)
        first_bad = torch.where(statistics.loss.isfinite(), first_bad, first_bad.clamp(max=step))
        rows += len(x)
        meter.rows += len(x)
        on_step(len(x))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            if int(first_bad) < steps:
                raise ActstoreError(
                    f"the loss is not finite from step {int(first_bad)} (of {steps}) on. "
                    "Check the store for NaN or infinite activations, or lower the learning rate."
                )
            dead = float((idle >= recipe.dead_after_tokens).float().mean())
            rates = meter.lap()
            metrics = Metrics(
                step=step + 1, rows=rows, dead=dead, lr=rate, sparsity=sparsity, **rates, **_scalars(statistics, x)
            )
            on_log(metrics)
    if metrics is None:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    return metrics


class _Meter:
    """Rows per second and the share of time spent waiting, since the last lap."""

    def __init__(self) -> None:
        self.rows, self._waited, self._began = 0, 0.0, time.perf_counter()

    def wait(self, take: Callable[[], Tensor]) -> Tensor:
        began = time.perf_counter()
        batch = take()
        self._waited += time.perf_counter() - began
        return batch

    def lap(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        rates = {"rows_per_second": self.rows / elapsed, "wait": self._waited / elapsed}
        self.__init__()
        return rates


def _scalars(statistics: StepStatistics, x: Float[Tensor, "batch d_model"]) -> dict[str, float]:
    variance = float((x - x.mean(0)).square().sum() / len(x))
    loss, mse, l0 = (float(value) for value in statistics[:3])
    return {"loss": loss, "mse": mse, "fvu": mse / max(variance, 1e-30), "l0": l0}


def train_from_store(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train on `config.site` of `config.store` and write the SAE, its config and its metrics to `config.out`.

    Raises ValueError for a site or batch size that the store can't serve.
    """
    import actstore

    recipe, store = config.recipe, actstore.open(config.store)
    store.check_site(config.site)
    stats = store.stats(config.site)
    scale = math.sqrt(stats.mean_sq_norm)
    if not (scale > 0 and math.isfinite(scale)):
        raise ActstoreError(
            f"the mean squared norm of {config.site} is {stats.mean_sq_norm}, expected a positive number. "
            "Look for NaN or infinite activations with `actstore info`."
        )
    mean = torch.from_numpy(stats.mean / scale)
    d_sae = config.d_sae or config.expansion * len(mean)
    sae = init_sae(len(mean), d_sae, recipe, seed=config.seed, mean=mean, device=config.device)
    display = progress or Progress()
    bar = display.step(f"train {config.site}", total=config.steps * recipe.batch_size, unit="rows")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / CONFIG).unlink(missing_ok=True)
    began = time.perf_counter()
    with (
        (config.out / METRICS).open("w", encoding="utf-8", buffering=1) as lines,
        actstore.ActivationDataset(store, sites=config.site, batch_size=recipe.batch_size, seed=config.seed) as data,
    ):

        def log(m: Metrics) -> None:
            lines.write(json.dumps(asdict(m)) + "\n")
            bar.note(f"fvu {m.fvu:.3f}  l0 {m.l0:.1f}  dead {m.dead:.0%}  wait {m.wait:.0%}")

        batches, every, on_step = endless(data), config.log_every, bar.advance
        final = train(sae, batches, steps=config.steps, scale=scale, log_every=every, on_log=log, on_step=on_step)
    seconds = time.perf_counter() - began
    about = {"seed": config.seed, "steps": config.steps, "rows": final.rows, "final": asdict(final)}
    about |= {"store": store.fingerprint, "provenance": store.provenance}
    save_sae(config.out, sae, scale=scale, site=config.site, about=about)
    return TrainResult(out=str(config.out), site=config.site, d_sae=d_sae, scale=scale, seconds=seconds, final=final)
