"""Replicas as Ray actors: hand out buckets, take back those of the dead.

Ray places processes, replaces dead ones and asks its autoscaler for room. A replica gets buckets once it has started,
at most `CALLS_IN_FLIGHT` at a time, so nothing waits for a machine that is not there; when it dies its buckets go to
whoever is free, because capturing one again writes the same rows. Activations never enter Ray's object store.
"""

import errno
import time
from collections import Counter, deque
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from actstore.capture.events import EventLog
from actstore.capture.segments import Work
from actstore.capture.worker import CALLS_IN_FLIGHT, BucketSummary, Replica, ReplicaConfig
from actstore.errors import ActstoreError, CaptureError
from actstore.tokens.tokenizer import one_line

CRASHES = 5
"""A bucket whose worker dies more often than this fails the run, and so does a worker that never gets ready."""
POLL_S = 0.5
WAITING_S = 30.0
"""Seconds without any worker after which the log says so."""


@runtime_checkable
class Watch(Protocol):
    """Who is told how a run goes."""

    def done(self, summary: BucketSummary) -> None:
        """A bucket is finished."""
        ...

    def show(self, rows_in_work: int, pool: "Pool") -> None:
        """Some time has passed; so many rows of unfinished buckets have left the models."""
        ...


class Pool:
    """The replicas of one run; `run` is all there is to do with it."""

    def __init__(
        self, ray: Any, replica: ReplicaConfig, log: EventLog, *, workers: int, cpus: int, gpus: int, watch: Watch
    ) -> None:
        """Ask Ray for `workers` replicas with so many CPUs and GPUs each."""
        self._ray, self._log, self._watch, self._store = ray, log, watch, replica.store
        self._replica = replica
        self._actor = ray.remote(Replica).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_concurrency=CALLS_IN_FLIGHT + 1,
            max_restarts=CRASHES,
            max_task_retries=0,
        )
        self.needs = f"{cpus} CPUs and {gpus} GPUs" if gpus else f"{cpus} CPUs"
        self._actors = [self._actor.remote(replica) for _ in range(workers)]
        self._proven: set[int] = set()
        self._starts: dict[Any, int] = {}
        self._polls: dict[Any, int] = {}
        self._calls: dict[Any, tuple[Work, int]] = {}
        self._rows: dict[int, int] = {}
        self._crashes: Counter[int] = Counter()
        self.live: set[int] = set()
        self.losses = 0
        """Buckets that were taken back from a dead worker."""

    def run(self, todo: deque[Work]) -> None:
        """Capture all of `todo`; the first failure that is no death ends the run, and what is committed stays."""
        for worker in range(len(self._actors)):
            self._start(worker)
        alone = time.monotonic()
        while todo or self._calls:
            self._hand_out(todo)
            self._poll()
            ready, _ = self._ray.wait([*self._calls, *self._starts], num_returns=1, timeout=POLL_S)
            for ref in ready:
                if ref in self._starts:
                    self._started(ref)
                else:
                    work, worker = self._calls.pop(ref)
                    summary = self._result(ref, work, worker)
                    if summary is None:
                        todo.appendleft(work)
                    else:
                        self._watch.done(summary)
            alone = self._complain(alone)
            in_work = {work.bucket for work, _ in self._calls.values()}
            self._watch.show(sum(rows for bucket, rows in self._rows.items() if bucket in in_work), self)

    def _start(self, worker: int) -> None:
        # unlike a bucket, this waits for as long as Ray needs to find a place
        self._starts[self._actors[worker].start.options(max_task_retries=-1).remote()] = worker

    def _started(self, ref: Any) -> None:
        worker = self._starts.pop(ref)
        try:
            where = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as e:
            raise _plain(e, f"worker {worker}", self._store) from e
        except self._ray.exceptions.RayError as e:
            if worker not in self._proven:
                raise CaptureError(
                    f"worker {worker} died {CRASHES + 1} times before it was ready: {one_line(e)}; see that actstore "
                    "runs on every machine, and that the model fits in memory"
                ) from e
            self._proven.discard(worker)
            self._actors[worker] = self._actor.remote(self._replica)
            self._start(worker)
            return
        self._proven.add(worker)
        self.live.add(worker)
        self._log.write("worker", worker=worker, **where)

    def _hand_out(self, todo: deque[Work]) -> None:
        busy = Counter(worker for _, worker in self._calls.values())
        for load in range(CALLS_IN_FLIGHT):
            for worker in sorted(self.live):
                if todo and busy[worker] == load:
                    work = todo.popleft()
                    self._calls[self._actors[worker].capture.remote(work)] = (work, worker)
                    busy[worker] += 1

    def _poll(self) -> None:
        answered, _ = self._ray.wait(list(self._polls), num_returns=max(len(self._polls), 1), timeout=0)
        for ref in answered:
            del self._polls[ref]
            with suppress(self._ray.exceptions.RayError):  # a dead worker's calls tell
                self._rows |= self._ray.get(ref)
        asked = set(self._polls.values())
        self._polls |= {self._actors[w].rows_done.remote(): w for w in self.live if w not in asked}

    def _result(self, ref: Any, work: Work, worker: int) -> BucketSummary | None:
        """What became of a bucket; None if its worker died, which then has to start again."""
        try:
            summary: BucketSummary = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as e:
            raise _plain(e, f"bucket {work.bucket}", self._store) from e
        except self._ray.exceptions.RayError as e:
            self._crashes[work.bucket] += 1
            self.losses += 1
            self._log.write("lost", bucket=work.bucket, worker=worker, error=one_line(e))
            if self._crashes[work.bucket] > CRASHES:
                raise CaptureError(
                    f"the worker of bucket {work.bucket} died {CRASHES + 1} times, most likely out of "
                    "memory; lower --bucket-rows, --batch-size or --workers; committed buckets are kept"
                ) from e
            if worker in self.live:
                self.live.discard(worker)
                self._start(worker)
            return None
        finally:
            self._rows.pop(work.bucket, None)
        self._log.write("bucket", worker=worker, **vars(summary))
        return summary

    def _complain(self, alone: float) -> float:
        """Say it where no worker has a place; returns since when that is."""
        now = time.monotonic()
        if self.live or now - alone < WAITING_S:
            return now if self.live else alone
        self._log.write("waiting", needs=self.needs)
        return now


def _plain(error: Any, what: str, store: str) -> ActstoreError:
    """A worker's own error in one line."""
    cause = error.cause
    if isinstance(cause, ActstoreError):
        return cause
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return CaptureError(f"no space left at {store}; committed buckets are kept: free some space and run this again")
    return CaptureError(f"{what} failed in a worker: {type(cause).__name__}: {one_line(cause)}")
