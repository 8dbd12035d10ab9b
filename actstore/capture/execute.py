"""Carrying out a plan: start Ray, run replicas over the work, watch, finalise, and say what bounded the run.

Forward passes, encoding and putting overlap, so the slowest of them bounds a run: each is summed as the time it would
have taken alone, and the longest is named.
"""

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from actstore.capture.cluster import placement, ray_for
from actstore.capture.config import DType, WorkersConfig
from actstore.capture.events import event_log
from actstore.capture.memory import check_memory, needs
from actstore.capture.pool import Pool
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
    workers_lost: int
    """Buckets taken back from dead workers and captured again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run a model for a store."""

    config: WorkersConfig
    model: str
    dtype: DType
    batch_size: int
    store: str

    @property
    def threads(self) -> int:
        """CPU threads per worker."""
        return self.config.threads or max(1, (os.cpu_count() or 1) // self.config.workers)

    def check_memory(self, spec: StoreSpec, seq_len: int, model_config: Any) -> None:
        """Refuse what does not fit, if the workers run on this machine; on a cluster each checks its own."""
        from actstore.capture.model import resolve_dtype

        if self.config.address is None:
            needed = needs(
                spec,
                model_config,
                dtype_bytes=resolve_dtype(self.model, model_config, self.dtype).itemsize,
                seq_len=seq_len,
                batch_size=self.batch_size,
                threads=self.threads,
                local=isinstance(open_storage(self.store), LocalStorage),
                on_gpu=self.config.device == "cuda" or self.config.devices_per_worker > 1,
            )
            check_memory(needed, self.config.workers, spec.shard_rows)


def execute(
    plan: Plan, writer: StoreWriter, work: list[Work], model_config: Any, progress: Progress, *, verb: str
) -> Outcome:
    """Do the work and finalise the store; see `capture` for the errors."""
    from actstore.capture.model import revision_of

    began = time.monotonic()
    outcome = _outcome([], 0.0, 0.0, 0)
    if work:
        show = _Display(progress.step(verb, total=sum(w.span.rows for w in work), unit="rows"), writer.spec, len(work))
        with event_log(writer.storage) as log, ray_for(plan.config, plan.threads) as ray:
            device, gpus = placement(ray, plan.config)
            replica = ReplicaConfig(
                model=plan.model,
                revision=revision_of(model_config),
                dtype=plan.dtype,
                device=device,
                store=plan.store,
                batch_size=plan.batch_size,
                threads=plan.threads,
            )
            about = {**asdict(replica), "model": public_name(plan.model)}
            del about["store"]  # no machine's paths in a store
            log.write(verb, buckets=len(work), rows=sum(w.span.rows for w in work), **about)
            workers = min(plan.config.workers, len(work))
            pool = Pool(ray, replica, log, workers=workers, cpus=plan.threads, gpus=gpus, watch=show)
            done = pool.run(deque(work))
            now = time.monotonic()
            outcome = _outcome(done, now - began, now - (show.ready or began), pool.losses)
            log.write("done", **vars(outcome))
    writer.finalise()
    return replace(outcome, seconds=time.monotonic() - began)


def _outcome(done: list[BucketSummary], seconds: float, working: float, losses: int) -> Outcome:
    rows = sum(s.rows for s in done)
    stages = {
        "forward": math.fsum(s.forward_s for s in done),
        "encode": math.fsum(s.encode_s for s in done),
        "upload": math.fsum(s.put_s for s in done),
    }
    return Outcome(
        buckets=len(done),
        rows_captured=rows,
        bytes_stored=sum(s.bytes_stored for s in done),
        seconds=seconds,
        tokens_per_s=rows / max(working, 1e-9),
        forward_s=stages["forward"],
        encode_s=stages["encode"],
        put_s=stages["upload"],
        bound=max(stages, key=lambda name: stages[name]) if done else "none",
        buckets_mended=sum(s.mended for s in done),
        workers_lost=losses,
    )


class _Display:
    """The one progress display of a run: rows, buckets, GB/s in and out, ratio, workers, what was lost."""

    def __init__(self, step: Step, spec: StoreSpec, buckets: int) -> None:
        self._step, self._buckets = step, buckets
        self._row_bytes = sum(s.d * (4 if s.kind == "f32" else 2) for s in spec.sites.values())
        self.ready: float | None = None
        """When the first worker was."""

    def __call__(self, rows: int, done: Sequence[BucketSummary], pool: Pool) -> None:
        if self.ready is None and pool.live:
            self.ready = time.monotonic()
            self._step.restart()
        elapsed = max(time.monotonic() - (self.ready or time.monotonic()), 1e-9)
        stored = [s for s in done if s.bytes_stored]
        out = sum(s.bytes_stored for s in stored)
        parts = [f"{len(done)}/{self._buckets} buckets", f"{len(pool.live)} workers"]
        if not pool.live:
            parts[-1] = f"waiting for a worker ({pool.needs})"
        if rows and self.ready:
            parts.append(f"{scaled(rows * self._row_bytes / elapsed)}B/s in")
        if out:
            ratio = sum(s.rows for s in stored) * self._row_bytes / out
            parts += [f"{scaled(out / elapsed)}B/s out", f"ratio {ratio:.2f}"]
        if pool.losses:
            parts.append(f"{pool.losses} lost and taken back")
        self._step.note(", ".join(parts))
        self._step.advance(rows - self._step.done)
