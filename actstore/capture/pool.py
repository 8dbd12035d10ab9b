"""Replicas as Ray actors: start Ray, hand out buckets, pass on what goes wrong.

Ray places processes and replaces dead ones; that is all it is used for. Activations never enter its object store, code
and data are never uploaded (every machine of a cluster has actstore installed), and a bucket is handed out anew when
its worker died, because capturing it again writes the same rows.
"""

import errno
import logging
import os
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from actstore.capture.config import CaptureConfig
from actstore.capture.sites import parse_sites
from actstore.capture.worker import CALLS_IN_FLIGHT, BucketSummary, Replica, ReplicaConfig
from actstore.errors import ActstoreError, CaptureError
from actstore.progress import Step
from actstore.tokens import Span
from actstore.tokens.tokenizer import one_line

CRASHES_PER_BUCKET = 5
"""A bucket whose worker process dies more often than this fails the run; workers are replaced without limit."""
_POLL_S = 0.5
_OBJECT_STORE_BYTES = 100_000_000
"""Ray's own memory; no activation goes through it."""


def run_buckets(
    config: CaptureConfig, model_config: Any, todo: deque[tuple[int, Span]], step: Step
) -> list[BucketSummary]:
    """Capture the buckets of `todo` with their spans; `step` counts rows as they leave the model.

    The first failure ends the run with a `CaptureError` (or the worker's own actstore error); what is committed stays.
    """
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.workers)
    with _ray(config, threads) as ray:
        device, gpus = _placement(config, ray.cluster_resources().get("GPU", 0.0))
        replica = replica_config(config, model_config, device, threads)
        actor = ray.remote(Replica).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_concurrency=CALLS_IN_FLIGHT + 1,
            max_restarts=-1,
            max_task_retries=CRASHES_PER_BUCKET,
        )
        actors = [actor.remote(replica) for _ in range(min(config.workers, len(todo)))]
        return _take_buckets(ray, actors, todo, step, config.out)


def replica_config(config: CaptureConfig, model_config: Any, device: str, threads: int) -> ReplicaConfig:
    """What every replica of this run is told."""
    from actstore.capture.model import revision_of

    return ReplicaConfig(
        model=config.model,
        revision=revision_of(model_config),
        dtype=config.dtype,
        device=device,
        sites=tuple(site.name for site in parse_sites(config.sites)),
        store=config.out,
        batch_size=config.batch_size,
        threads=threads,
    )


def _placement(config: CaptureConfig, gpus: float) -> tuple[str, int]:
    """Torch device of every replica, and GPUs to reserve for it."""
    device = config.device
    if device == "auto":
        device = "cuda" if gpus >= config.workers else "cpu"
    if device != "balanced" and not device.startswith("cuda"):
        return device, 0
    if gpus < config.workers:
        raise CaptureError(f"device {device}: Ray has {gpus:g} GPUs for {config.workers} workers; use fewer workers")
    return device, int(gpus // config.workers) if device == "balanced" else 1


def _take_buckets(
    ray: Any, actors: list[Any], todo: deque[tuple[int, Span]], step: Step, out: str
) -> list[BucketSummary]:
    done: dict[int, BucketSummary] = {}
    calls: dict[Any, tuple[int, Any]] = {}
    polls: dict[Any, Any] = {}
    running: dict[int, int] = {}
    skipped = step.done

    def submit(actor: Any) -> None:
        if todo:
            bucket, span = todo.popleft()
            calls[actor.capture.remote(bucket, span)] = (bucket, actor)

    for _ in range(CALLS_IN_FLIGHT):
        for actor in actors:
            submit(actor)
    while calls:
        polls |= {a.rows_done.remote(): a for a in actors if a not in polls.values()}
        finished, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_S)
        for call in finished:
            bucket, actor = calls.pop(call)
            done[bucket] = _result(ray, call, bucket, out)
            submit(actor)
        answered, _ = ray.wait(list(polls), num_returns=len(polls), timeout=0)
        for poll in answered:
            del polls[poll]
            with suppress(ray.exceptions.RayError):  # the actor died: its calls tell, or are retried
                running.update(ray.get(poll))
        seen = sum(s.rows for s in done.values()) + sum(rows for b, rows in running.items() if b not in done)
        if fresh := skipped + seen - step.done:
            step.advance(fresh)
    return list(done.values())


def _result(ray: Any, call: Any, bucket: int, out: str) -> BucketSummary:
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as e:
        cause = e.cause
        if isinstance(cause, ActstoreError):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            message = f"no space left at {out}; committed buckets are kept: free some space and run this again"
        else:
            message = f"bucket {bucket} failed in a worker: {type(cause).__name__}: {one_line(cause)}"
        raise CaptureError(message) from cause
    except ray.exceptions.RayError as e:  # the process died, over and over
        raise CaptureError(
            f"the worker of bucket {bucket} died {CRASHES_PER_BUCKET + 1} times, most likely out of memory; lower "
            "--bucket-rows, --batch-size or --workers; committed buckets are kept"
        ) from e


@contextmanager
def _ray(config: CaptureConfig, threads: int) -> Generator[Any]:
    """Ray, quiet and without uploads: a cluster's, the caller's own, or one for this run on this machine."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
    ):
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address:
        try:
            ray.init(address=config.address, **quiet)
        except (ConnectionError, ValueError) as e:
            raise CaptureError(f"no Ray cluster answers at {config.address}: {one_line(e)}") from e
    else:
        cpus = threads * config.workers
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
    try:
        yield ray
    finally:
        ray.shutdown()
