"""Carrying out a plan: start replicas, run them over the work, watch, finalise, and say what bounded the run.

Forward passes, encoding and putting overlap, so the slowest of them bounds a run: each is summed as the time it would
have taken without the others, and the longest is named.
"""

import os
import time
from collections import Counter
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from actstore.builtin import NAME, model_path
from actstore.capture.cluster import (
    check_directory,
    choose_device,
    on_cluster,
    ray_for,
    request_for,
    runs_here,
    runtime_environment,
)
from actstore.capture.config import DType, WorkersConfig
from actstore.capture.events import EventLog, event_log
from actstore.capture.memory import check_memory
from actstore.capture.pool import Pool, Task
from actstore.capture.precision import Choice, choose, saved_precision
from actstore.capture.replicas import LocalReplicas, RayReplicas, Replicas, Request
from actstore.capture.segments import Work, open_segments
from actstore.capture.worker import BucketSummary, ReplicaConfig
from actstore.errors import CaptureError
from actstore.progress import Progress, scaled
from actstore.store import StoreSpec, StoreWriter, open_storage
from actstore.store.write.finalise import missing_parts
from actstore.tokens.tokenizer import public_name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did."""

    buckets: int = 0
    """Captured by this run."""
    buckets_by_others: int = 0
    """Committed meanwhile by another run, or by a worker that died before it could say so."""
    rows_captured: int = 0
    """By this run."""
    bytes_stored: int = 0
    """By this run."""
    seconds: float = 0.0
    """Starting workers and loading the model included."""
    tokens_per_s: float = 0.0
    """Rows captured by this run per second from the moment the first worker was ready."""
    forward_s: float = 0.0
    """Summed over buckets, as are the next two; per worker, they overlap."""
    encode_s: float = 0.0
    put_s: float = 0.0
    bound: str = "none"
    """The stage that took longest: forward, encode or upload; none if there was nothing to do."""
    buckets_repaired: int = 0
    """Buckets of a repair whose rows came out as before, so that only damaged objects were put."""
    retries: int = 0
    """Requests to the store that had to be sent once more."""
    workers_lost: int = 0
    """Buckets taken back from workers that died or failed, and captured again."""
    nonfinite: int = 0
    """Rows with NaN or infinity that this run stored, over all sites."""
    saturated: int = 0
    """Values that `fixed` has clipped."""
    taken_over: int = 0
    """How often another run took a bucket over while this one wrote it."""
    nodes_quarantined: int = 0
    """Nodes that got no more buckets because too much failed on them."""
    log_failures: int = 0
    """How often a piece of the run's log could not be put."""


NOTHING = Outcome()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run a model for a store; made by `plan_run`."""

    config: WorkersConfig
    model: str
    model_config: Any
    choice: Choice
    batch_size: int
    store: str

    @property
    def threads(self) -> int:
        """CPU threads per worker on this machine."""
        return self.config.threads or max(1, (os.cpu_count() or 1) // self.config.workers)

    @property
    def replica(self) -> ReplicaConfig:
        """What its workers are told."""
        from actstore.capture.model import revision_of

        return ReplicaConfig(
            model=self.model,
            revision=revision_of(self.model_config),
            dtype=self.choice.dtype,
            attention=self.choice.attention,
            device="balanced" if self.config.devices_per_worker > 1 else self.choice.device,
            store=self.store,
            batch_size=self.batch_size,
            threads=self.threads,
            any_versions="versions" in self.config.allow,
        )

    def check_memory(self, spec: StoreSpec, seq_len: int) -> None:
        """Refuse what does not fit, if the workers run on this machine; on a cluster Ray places them by memory."""
        if not on_cluster(self.config):
            check_memory(self.replica.needs(spec, seq_len, self.model_config), self.config.workers, spec.shard_rows)


def plan_run(
    config: WorkersConfig,
    model: str,
    model_config: Any,
    progress: Progress,
    *,
    store: str,
    batch_size: int,
    dtype: DType,
    recorded: dict[str, object],
) -> Plan:
    """Choose device, precision and attention, and say so: as the store was begun, if it is there.

    `recorded` is what the store at `store` says about its model. Paths become absolute, because workers have another
    working directory. A bad runtime environment is refused now, not when Ray starts.
    """
    runtime_environment(config)
    device, saved, path = choose_device(config), saved_precision(model, model_config), model_path(model)
    choice = choose(dtype, saved, model_config, device=device.kind, bfloat16_gpu=device.bfloat16, recorded=recorded)
    progress.say(str(choice))
    absolute = str(path.resolve()) if model != NAME and path.exists() else model
    return Plan(
        config=config,
        model=absolute,
        model_config=model_config,
        choice=choice,
        batch_size=batch_size,
        store=open_storage(store).url,
    )


def execute(plan: Plan, writer: StoreWriter, work: list[Work], progress: Progress, *, verb: str) -> Outcome:
    """Do the work and finalise the store; see `capture` for the errors."""
    began = time.monotonic()
    if not work:
        writer.finalise()
        return NOTHING
    rows = sum(w.span.rows for w in work)
    tasks = [Task("capture", w, key=w.bucket, name=f"bucket {w.bucket}") for w in work]
    with event_log(writer.storage, progress.say) as log:
        display = _Display(progress, verb, rows, writer.spec, len(work), log)
        with _replicas(plan, writer) as replicas:
            about = {**asdict(replicas.config), "model": public_name(plan.model)}
            del about["store"]  # no machine's paths in a store
            log.write(verb, buckets=len(work), rows=rows, **about)
            workers = min(plan.config.workers, len(work))
            with closing(Pool(replicas, log, workers=workers, show=display.show, say=progress.say)) as pool:
                pool.run(tasks, display.done)
                outcome = display.outcome(began, pool)
                _consolidate(pool, writer, progress)
        log.write("done", **vars(outcome))
    if not writer.finalise():
        missing = sorted(set(range(writer.buckets)) - writer.committed())
        raise CaptureError(
            f"the store is not complete: {len(missing)} buckets are not committed, for example {missing[:3]}; another "
            "program changed this store meanwhile, run this again"
        )
    return replace(outcome, seconds=time.monotonic() - began, log_failures=log.failures)


def _consolidate(pool: Pool, writer: StoreWriter, progress: Progress) -> None:
    """Let the replicas make the parts of the manifest, where there are several."""
    parts = missing_parts(writer.storage, writer.spec)
    if len(parts) > 1:
        step = progress.step("finalise", total=len(parts), unit="parts")
        tasks = [Task("consolidate", n, key=-1, name=f"part {n} of the manifest") for n in parts]
        pool.run(tasks, lambda *_: step.advance(1))


@contextmanager
def _replicas(plan: Plan, writer: StoreWriter) -> Generator[Replicas]:
    """Where the plan's replicas run: in this process, or on Ray."""
    config, device, replica = plan.config, plan.choice.device, plan.replica
    if runs_here(config):
        with closing(LocalReplicas(replica)) as here:
            yield here
        return

    def memory(threads: int) -> int:
        seq_len = max(s.tokens.seq_len for s in open_segments(writer.storage, writer.spec))
        return replace(replica, threads=threads).needs(writer.spec, seq_len, plan.model_config).total

    cluster = on_cluster(config)
    with ray_for(config, plan.threads) as ray:
        if cluster:
            check_directory(ray, config, plan.store)
            request = request_for(ray, config, device, memory)
        else:
            request = Request(cpus=plan.threads, gpus=config.devices_per_worker if device != "cpu" else 0)
        yield RayReplicas(ray, replica, request, threads=config.threads, cluster=cluster)


class _Display:
    """The one progress display of a run, and its sums: rows, buckets, GB/s in and out, ratio, what went wrong."""

    def __init__(self, progress: Progress, verb: str, rows: int, spec: StoreSpec, buckets: int, log: EventLog) -> None:
        self._step, self._planned, self._log = progress.step(verb, total=rows, unit="rows"), buckets, log
        self._say = progress.say
        self._row_bytes = sum(s.d * (4 if s.kind == "f32" else 2) for s in spec.sites.values())
        self.ready: float | None = None
        """When the first worker was."""
        self.sums: Counter[str] = Counter()
        """Of the figures of all summaries."""
        self.outcomes: Counter[str] = Counter()
        """Buckets by `BucketSummary.outcome`."""
        self._rows_stored = self._rows_by_others = 0

    def done(self, summary: BucketSummary, worker: int) -> None:
        """Count a finished bucket."""
        self._log.write("bucket", worker=worker, **vars(summary))
        if summary.remarks and not (self.sums["nonfinite"] or self.sums["saturated"]):  # the first such bucket
            for line in summary.remarks:
                self._say(line)
        self.outcomes[summary.outcome] += 1
        if summary.outcome == "by_others":
            self._rows_by_others += summary.rows
            return
        self.sums.update({k: v for k, v in vars(summary).items() if k not in ("bucket", "outcome", "remarks")})
        self._rows_stored += summary.rows if summary.bytes_stored else 0

    def show(self, rows_in_work: int, pool: Pool) -> None:
        """Draw it."""
        if self.ready is None and pool.live:
            self.ready = time.monotonic()
            self._step.restart()
        elapsed = max(time.monotonic() - (self.ready or time.monotonic()), 1e-9)
        rows, out = self.sums["rows"] + rows_in_work, self.sums["bytes_stored"]
        workers = f"{pool.live} worker{'s' * (pool.live != 1)}" if pool.live else f"waiting for a worker ({pool.needs})"
        parts = [f"{self.outcomes.total()}/{self._planned} buckets", workers]
        if rows and self.ready:
            parts.append(f"{scaled(rows * self._row_bytes / elapsed)}B/s in")
        if out:
            parts += [f"{scaled(out / elapsed)}B/s out", f"ratio {self._rows_stored * self._row_bytes / out:.2f}"]
        for number, what in (
            (self.outcomes["by_others"], "by others"),
            (self.sums["retries"], "requests sent again"),
            (pool.losses, "lost and taken back"),
            (pool.taken_over, "taken over by another run"),
            (len(pool.quarantined), "nodes quarantined"),
        ):
            parts += [f"{number} {what}"] * bool(number)
        self._step.note(", ".join(parts))
        self._step.advance(rows + self._rows_by_others - self._step.done)

    def outcome(self, began: float, pool: Pool) -> Outcome:
        """What the run has done by now."""
        now, sums = time.monotonic(), self.sums
        stages = {"forward": sums["forward_s"], "encode": sums["encode_s"], "upload": sums["put_s"]}
        return Outcome(
            **{name: int(sums[name]) for name in ("bytes_stored", "retries", "nonfinite", "saturated")},
            forward_s=float(sums["forward_s"]),
            encode_s=float(sums["encode_s"]),
            put_s=float(sums["put_s"]),
            buckets=self.outcomes["captured"] + self.outcomes["repaired"],
            buckets_by_others=self.outcomes["by_others"],
            buckets_repaired=self.outcomes["repaired"],
            rows_captured=sums["rows"],
            seconds=now - began,
            tokens_per_s=sums["rows"] / max(now - (self.ready or began), 1e-9),
            bound=max(stages, key=lambda name: stages[name]) if any(stages.values()) else "none",
            workers_lost=pool.losses,
            taken_over=pool.taken_over,
            nodes_quarantined=len(pool.quarantined),
        )
