"""Carrying out a plan: start Ray, run replicas over the work, watch, finalise, and say what bounded the run.

Forward passes, encoding and putting overlap, so the slowest of them bounds a run: each is summed as the time it would
have taken alone, and the longest is named.
"""

import os
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, replace
from typing import Any

from actstore.capture.cluster import placement, ray_for, runtime_environment
from actstore.capture.config import WorkersConfig
from actstore.capture.events import event_log
from actstore.capture.memory import check_memory, needs
from actstore.capture.pool import Pool
from actstore.capture.precision import Choice
from actstore.capture.segments import Work
from actstore.capture.worker import BucketSummary, ReplicaConfig
from actstore.progress import Progress, Step, scaled
from actstore.store import StoreSpec, StoreWriter
from actstore.store.storage import LocalStorage, open_storage
from actstore.tokens.tokenizer import public_name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did."""

    buckets: int
    """Captured by this run."""
    rows_captured: int
    """By this run."""
    bytes_stored: int
    """By this run."""
    seconds: float
    """Starting Ray and loading the model included."""
    tokens_per_s: float
    """Rows captured by this run per second from the moment the first worker was ready."""
    forward_s: float
    """Summed over buckets, as are the next two; per worker, they overlap."""
    encode_s: float
    put_s: float
    bound: str
    """The stage that took longest: forward, encode or upload; none if there was nothing to do."""
    buckets_mended: int
    """Of a repair: those whose rows came out as they were, so that only damaged objects were put."""
    retries: int
    """Requests to the store that had to be sent once more."""
    workers_lost: int
    """Buckets taken back from dead workers and captured again."""


NOTHING = Outcome(
    buckets=0,
    rows_captured=0,
    bytes_stored=0,
    seconds=0.0,
    tokens_per_s=0.0,
    forward_s=0.0,
    encode_s=0.0,
    put_s=0.0,
    bound="none",
    buckets_mended=0,
    retries=0,
    workers_lost=0,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run a model for a store."""

    config: WorkersConfig
    model: str
    choice: Choice
    batch_size: int
    store: str

    def __post_init__(self) -> None:
        """Refuse a bad runtime environment now, not when Ray starts."""
        runtime_environment(self.config)

    @property
    def threads(self) -> int:
        """CPU threads per worker."""
        return self.config.threads or max(1, (os.cpu_count() or 1) // self.config.workers)

    def check_memory(self, spec: StoreSpec, seq_len: int, model_config: Any) -> None:
        """Refuse what does not fit, if the workers run on this machine; on a cluster each checks its own."""
        import torch

        if self.config.address is None:
            needed = needs(
                spec,
                model_config,
                dtype_bytes=getattr(torch, self.choice.dtype).itemsize,
                seq_len=seq_len,
                batch_size=self.batch_size,
                threads=self.threads,
                local=isinstance(open_storage(self.store), LocalStorage),
                on_gpu=self.choice.device != "cpu",
                gguf=self.model.endswith(".gguf"),
            )
            check_memory(needed, self.config.workers, spec.shard_rows)


def execute(
    plan: Plan, writer: StoreWriter, work: list[Work], model_config: Any, progress: Progress, *, verb: str
) -> Outcome:
    """Do the work and finalise the store; see `capture` for the errors."""
    from actstore.capture.model import revision_of

    began = time.monotonic()
    if not work:
        writer.finalise()
        return NOTHING
    rows = sum(w.span.rows for w in work)
    display = _Display(progress.step(verb, total=rows, unit="rows"), writer.spec, len(work))
    with event_log(writer.storage) as log, ray_for(plan.config, plan.threads) as ray:
        device, gpus = placement(ray, plan.config, plan.choice.device)
        replica = ReplicaConfig(
            model=plan.model,
            revision=revision_of(model_config),
            dtype=plan.choice.dtype,
            attention=plan.choice.attention,
            device=device,
            store=plan.store,
            batch_size=plan.batch_size,
            threads=plan.threads,
        )
        about = {**asdict(replica), "model": public_name(plan.model)}
        del about["store"]  # no machine's paths in a store
        log.write(verb, buckets=len(work), rows=rows, **about)
        workers = min(plan.config.workers, len(work))
        pool = Pool(ray, replica, log, workers=workers, cpus=plan.threads, gpus=gpus, watch=display)
        pool.run(deque(work))
        outcome = display.outcome(began, pool.losses)
        log.write("done", **vars(outcome))
    writer.finalise()
    return replace(outcome, seconds=time.monotonic() - began)


class _Display:
    """The one progress display of a run, and its sums: rows, buckets, GB/s in and out, ratio, what went wrong."""

    def __init__(self, step: Step, spec: StoreSpec, buckets: int) -> None:
        self._step, self._planned = step, buckets
        self._row_bytes = sum(s.d * (4 if s.kind == "f32" else 2) for s in spec.sites.values())
        self.ready: float | None = None
        """When the first worker was."""
        self.sums: Counter[str] = Counter()
        """Of the fields of all summaries."""
        self.buckets = self._rows_stored = 0

    def done(self, summary: BucketSummary) -> None:
        """Count a finished bucket."""
        self.buckets += 1
        self.sums.update({k: v for k, v in vars(summary).items() if k != "bucket"})
        self._rows_stored += summary.rows if summary.bytes_stored else 0

    def show(self, rows_in_work: int, pool: Pool) -> None:
        """Draw it."""
        if self.ready is None and pool.live:
            self.ready = time.monotonic()
            self._step.restart()
        elapsed = max(time.monotonic() - (self.ready or time.monotonic()), 1e-9)
        rows, out = self.sums["rows"] + rows_in_work, self.sums["bytes_stored"]
        workers = f"{len(pool.live)} workers" if pool.live else f"waiting for a worker ({pool.needs})"
        parts = [f"{self.buckets}/{self._planned} buckets", workers]
        if rows and self.ready:
            parts.append(f"{scaled(rows * self._row_bytes / elapsed)}B/s in")
        if out:
            parts += [f"{scaled(out / elapsed)}B/s out", f"ratio {self._rows_stored * self._row_bytes / out:.2f}"]
        if self.sums["retries"]:
            parts.append(f"{self.sums['retries']} requests sent again")
        if pool.losses:
            parts.append(f"{pool.losses} lost and taken back")
        self._step.note(", ".join(parts))
        self._step.advance(rows - self._step.done)

    def outcome(self, began: float, losses: int) -> Outcome:
        """What the run has done by now."""
        now, sums = time.monotonic(), self.sums
        stages = {"forward": sums["forward_s"], "encode": sums["encode_s"], "upload": sums["put_s"]}
        return Outcome(
            buckets=self.buckets,
            rows_captured=sums["rows"],
            bytes_stored=sums["bytes_stored"],
            seconds=now - began,
            tokens_per_s=sums["rows"] / max(now - (self.ready or began), 1e-9),
            forward_s=float(stages["forward"]),
            encode_s=float(stages["encode"]),
            put_s=float(stages["upload"]),
            bound=max(stages, key=lambda name: stages[name]),
            buckets_mended=sums["mended"],
            retries=sums["retries"],
            workers_lost=losses,
        )
