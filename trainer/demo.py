"""`actstore demo`: the whole workflow on the built-in model and text, step by step as a user would run it.

Everything below is the public path with small numbers: a smaller bucket, shorter sequences, one site. What is done is
kept, so that a second run of an interrupted demo goes on where the first stopped.
"""

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actstore import builtin, console
from actstore.capture.config import CaptureConfig
from actstore.progress import Progress
from actstore.store import Store, open_store
from actstore.tokens.config import TokenizeConfig
from trainer.config import EvalConfig, ExportConfig, TrainConfig
from trainer.report import Section, write_report

SITE = "resid_post.3"
SEQ_LEN = 256
ROWS = 1 << 20
BUCKET_ROWS = 1 << 17
SHARD_ROWS = 1 << 14
D_SAE = 1536
STEPS = 1500
HELDOUT_SEQUENCES = 192
"""Of the 469 held-out sequences: 49,000 tokens, each of which takes three passes of the model."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the demo ends with; the keys of `--json`."""

    rows: int
    """Activations in the store."""
    bytes_stored: int
    """Bytes of the store's data objects, provenance included."""
    ratio: float
    """Bytes as bfloat16 over bytes stored."""
    read_gb_s: float
    """Shuffled, decoded GB/s of one pass over the store."""
    l0: float
    fvu: float
    delta_loss: float
    """Nats per token that the spliced reconstruction costs, on held-out sequences."""
    loss_recovered: float
    dead_fraction: float
    """Latents that fire on no held-out token."""
    seconds: float
    """The whole demo."""


class Stages:
    """Seconds by stage."""

    def __init__(self) -> None:
        """Begin with none."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        """Time the block as stage `name`."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def run_demo(out: Path) -> Figures:
    """Run everything into the directory `out`; returns the figures it also prints."""
    began = time.monotonic()
    stages = Stages()
    with Progress() as progress:
        with stages("tokenize"):
            _tokenize(out, progress)
        with stages("capture"):
            captured = _capture(out, progress)
        store = open_store(out / "store")
        with stages("read"):
            read_gb_s = _read(store, progress)
        with stages("train"):
            training_s = _train(out, progress)
        with stages("evaluate"):
            evaluation = _evaluate(out, progress)
        with stages("export"):
            params = _export(out)
    figures = Figures(
        rows=store.rows,
        bytes_stored=store.stored_bytes,
        ratio=store.raw_bytes / store.stored_bytes,
        read_gb_s=read_gb_s,
        l0=evaluation.l0,
        fvu=evaluation.fvu,
        delta_loss=evaluation.delta_loss,
        loss_recovered=evaluation.loss_recovered,
        dead_fraction=evaluation.dead,
        seconds=time.monotonic() - began,
    )
    report = _report(out, figures, evaluation, stages.seconds, captured, training_s)
    figures = replace(figures, seconds=time.monotonic() - began)
    console.print_table("actstore demo", _shown(figures))
    print(f"exported SAE: {params}")
    print(f"report: {report}")
    return figures


def _shown(f: Figures) -> dict[str, Any]:
    return {
        "rows": f.rows,
        "bytes stored": f.bytes_stored,
        "compression ratio (to bf16)": f.ratio,
        "read GB/s (shuffled, decoded)": f.read_gb_s,
        "L0": f.l0,
        "FVU": f.fvu,
        "delta loss (nats/token)": f.delta_loss,
        "loss recovered": f.loss_recovered,
        "dead latents": f.dead_fraction,
        "seconds": f.seconds,
    }


def _tokenize(out: Path, progress: Progress) -> None:
    from actstore.tokens import tokenize

    for name, text in zip(("tokens", "heldout"), builtin.TEXTS, strict=True):
        config = TokenizeConfig(sources=(text,), tokenizer=builtin.NAME, out=str(out / name), seq_len=SEQ_LEN)
        tokenize(config, progress)


def _capture(out: Path, progress: Progress) -> Any:
    from actstore.capture.run import capture

    config = CaptureConfig(
        model=builtin.NAME,
        tokens=str(out / "tokens"),
        sites=(SITE,),
        out=str(out / "store"),
        workers=2,
        bucket_rows=BUCKET_ROWS,
        shard_rows=SHARD_ROWS,
        rows=ROWS,
    )
    return capture(config, progress)


def _read(store: Store, progress: Progress) -> float:
    """One epoch as a trainer would read it; GB of bfloat16 per second, the first batch left out."""
    from actstore.stream import ActivationDataset

    with ActivationDataset(store, sites=SITE, batch_size=4096) as dataset:
        step = progress.step("read", total=len(dataset), unit="batches")
        batches = iter(dataset)
        next(batches)
        step.skip(1)
        moved, began = 0, time.monotonic()
        for batch in batches:
            moved += batch.nbytes
            step.advance(1)
        return moved / (time.monotonic() - began) / 1e9


def _train(out: Path, progress: Progress) -> float:
    """Seconds of training, those before an interruption included."""
    from trainer.train import train_from_store

    config = TrainConfig(
        store=str(out / "store"), site=SITE, out=out / "sae", steps=STEPS, preset="short", d_sae=D_SAE, log_every=20
    )
    return train_from_store(config, progress).seconds


def _evaluate(out: Path, progress: Progress) -> Any:
    from trainer.evaluate import evaluate_saved

    tokens = (str(out / "heldout"),)
    config = EvalConfig(sae=out / "sae", tokens=tokens, model=(builtin.NAME,), sequences=HELDOUT_SEQUENCES)
    return evaluate_saved(config, progress)[0]


def _export(out: Path) -> Path:
    from trainer.export import export

    return export(ExportConfig(sae=out / "sae", out=out / "export"))


def _report(
    out: Path, figures: Figures, evaluation: Any, seconds: dict[str, float], captured: Any, training_s: float
) -> Path:
    from trainer import plots

    lines = (out / "sae" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    sections = [
        Section(title="Training", text=f"{STEPS} steps of the short recipe on {SITE}.", plot=plots.training(metrics)),
        Section(
            title="Firing densities",
            text="Share of held-out tokens on which each latent fires.",
            plot=plots.densities(evaluation.density),
        ),
        Section(
            title="Throughput",
            text=f"Activations per second by stage. The trainer waited {_waited(metrics):.0%} of the time for batches.",
            plot=plots.throughput(_rates(figures, training_s, captured, metrics)),
        ),
        Section(title="Where the time went", text="Seconds by stage.", plot=plots.times(seconds)),
    ]
    path = out / "report.html"
    write_report(path, title="actstore demo", figures=_shown(figures), sections=sections)
    return path


def _waited(metrics: list[dict[str, Any]]) -> float:
    """Share of the training time spent waiting for the loader, over lines of equal length."""
    return sum(m["wait"] / m["rows_per_second"] for m in metrics) / sum(1 / m["rows_per_second"] for m in metrics)


def _rates(f: Figures, training_s: float, captured: Any, metrics: list[dict[str, Any]]) -> dict[str, float]:
    row_bytes = f.bytes_stored * f.ratio / f.rows
    rates = {"read, shuffled": f.read_gb_s * 1e9 / row_bytes, "train": metrics[-1]["rows"] / training_s}
    if captured.rows_captured:
        rates = {"capture": captured.tokens_per_s, **rates}
    return rates
