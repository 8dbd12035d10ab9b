"""A replica: one model that turns buckets into committed objects.

Replicas run in the command's process or as Ray actors (`actstore.capture.replicas`). Errors leave a replica as values,
so that the pool learns on which node what failed, with the traceback.

`capture` runs in two threads at a time, and hands its forward passes to one thread that both share. So while one
bucket's passes run, the other bucket is encoded and put, and then the token ids of the next are read. It is always the
same thread because OpenMP keeps a team of threads for each one that computes: with two teams a CPU model lost a tenth
of its speed (`docs/log.md`). `actstore.capture.memory` states what two buckets take. Activations leave through the
store only.
"""

import errno
import os
import re
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actstore.capture.config import Precision
from actstore.capture.events import without_secrets
from actstore.capture.memory import Needs, check_memory, needs
from actstore.capture.segments import Segment, Work
from actstore.capture.sites import Site
from actstore.errors import (
    ActstoreError,
    CaptureError,
    EncodingError,
    IntegrityError,
    TokensError,
    mismatch,
)
from actstore.store import Storage, StoreSpec, StoreWriter, open_storage, open_writer
from actstore.store.storage import LocalStorage
from actstore.tokens.tokenizer import one_line

CALLS_IN_FLIGHT = 2
"""Calls of `capture` that a replica may be given at a time: what bounds its memory to two buckets."""
TRACEBACK_CHARACTERS = 8000
"""The end of a traceback that is kept."""


@dataclass(frozen=True)
class ReplicaConfig:
    """What a replica needs to know; small enough to travel with the actor."""

    model: str
    revision: str | None
    dtype: Precision
    attention: str
    device: str
    store: str
    batch_size: int
    threads: int
    any_versions: bool = False
    """Whether torch and transformers may be others than those that began the store."""

    def needs(self, spec: StoreSpec, seq_len: int, model_config: Any) -> Needs:
        """What the replica takes in memory."""
        return needs(
            spec,
            model_config,
            dtype=self.dtype,
            seq_len=seq_len,
            batch_size=self.batch_size,
            threads=self.threads,
            local=isinstance(open_storage(self.store), LocalStorage),
            on_gpu=self.device != "cpu",
            gguf=self.model.endswith(".gguf"),
        )


@dataclass(frozen=True)
class BucketSummary:
    """What a replica reports about a bucket; the activations stay in the store."""

    bucket: int
    rows: int
    outcome: Literal["captured", "repaired", "by_others"]
    """repaired: only damaged objects were put, because the rows came out as before. by_others: another run, or
    a worker that died before it could report it, committed the bucket."""
    bytes_stored: int = 0
    forward_s: float = 0.0
    write_s: float = 0.0
    encode_s: float = 0.0
    """Per encoding thread, as is `put_s` per thread that puts: what the stage takes without the others."""
    put_s: float = 0.0
    nonfinite: int = 0
    """Rows with NaN or infinity, over all sites, as is `saturated`, values that `fixed` has clipped."""
    saturated: int = 0
    remarks: tuple[str, ...] = ()
    """The same in words."""
    retries: int = 0
    """Requests to the store that this worker had to send once more since it last reported."""


@dataclass(frozen=True)
class Again:
    """A task that another run took over; it is to be looked at again later."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a call failed."""

    error: ActstoreError | None
    """What actstore itself refused, as it is; None for any other error."""
    text: str
    """In one line."""
    traceback: str
    everywhere: bool
    """Whether it would fail on any other node too."""


class _StoppedError(Exception):
    """Raised between two forward passes of a replica that is to stop."""


@dataclass
class Loaded:
    """Everything that takes long to open."""

    model: Any
    sites: tuple[Site, ...]
    writer: StoreWriter
    segments: list[Segment]


@dataclass
class Replica:
    """One model replica; `ray.remote` makes an actor of it."""

    config: ReplicaConfig
    _forward: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "actstore-forward"))
    _rows: dict[int, int] = field(default_factory=dict[int, int])
    _loaded: Loaded | None = None
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _retries: int = 0

    def place(self) -> dict[str, str]:
        """The node that Ray chose, or this machine."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            return {"node": ray.get_runtime_context().get_node_id()}
        return {"node": os.uname().nodename}

    def call(self, method: str, *arguments: object) -> object:
        """What a method returns, or a `Failure`."""
        try:
            return getattr(self, method)(*arguments)
        except Exception as e:  # noqa: BLE001  torch, drivers and disks raise anything
            return _failure(e, self.config.store)

    def start(self, environment: dict[str, str] | None = None, threads: int | None = None) -> dict[str, object]:
        """Load the model and open the store; says where it runs, for the log.

        `environment` is added to this process's own, before anything reads it; `threads` replaces the configured ones.
        """
        began = time.perf_counter()
        os.environ.update(environment or {})
        self.config = replace(self.config, threads=threads or self.config.threads)
        self._load()
        return {
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "threads": self.config.threads,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def stop(self) -> None:
        """End the forward passes that run, after their batch."""
        self._stopped.set()
        self._forward.shutdown(wait=False, cancel_futures=True)

    def rows_done(self) -> dict[int, int]:
        """Rows that went through the model, by bucket that is there now; for progress."""
        return dict(self._rows)

    def capture(self, work: Work) -> BucketSummary | Again:
        """Run the model over a bucket's sequences, store its rows and commit it; a damaged one is repaired."""
        from actstore.store.maintain.repair import replace_shards
        from actstore.store.write.bucket import WriteTimes, remarks
        from actstore.store.write.protocol import NotWritten

        loaded = self._load()
        writer, by_others = loaded.writer, BucketSummary(work.bucket, work.span.rows, "by_others")
        if not work.keys and writer.is_committed(work.bucket):
            return by_others
        tokens, sequences = loaded.segments[work.segment].tokens, (work.span.first_sequence, work.span.stop_sequence)
        read = tokens.ids(*sequences), tokens.documents(*sequences)
        data, forward_s = self._forward.submit(self._rows_of, loaded, work, *read).result()
        began, times = time.perf_counter(), WriteTimes()
        if work.keys and replace_shards(writer, work.bucket, data, work.keys, work.version):
            return BucketSummary(work.bucket, work.span.rows, "repaired", forward_s=forward_s)
        made = writer.write_arrays(work.bucket, data, condemned=work.version, times=times)
        if made is NotWritten.ALREADY_COMMITTED or (made is NotWritten.TAKEN_OVER and work.keys):
            return by_others
        if made is NotWritten.TAKEN_OVER:
            return Again()
        return BucketSummary(
            bucket=work.bucket,
            rows=work.span.rows,
            outcome="captured",
            bytes_stored=made.stored_bytes(writer.spec),
            remarks=tuple(remarks(made)),
            nonfinite=sum(s.nonfinite for s in made.stats.values()),
            saturated=sum(s.saturated for s in made.stats.values()),
            forward_s=forward_s,
            write_s=time.perf_counter() - began,
            encode_s=times.encode_s / writer.threads,
            put_s=times.put_s / writer.puts,
            retries=self._new_retries(writer.storage),
        )

    def consolidate(self, part: int) -> int:
        """Make one part of the manifest, whose buckets are all committed."""
        from actstore.store.write.finalise import write_part

        loaded = self._load()
        write_part(loaded.writer.storage, loaded.writer.spec, part)
        return part

    def _new_retries(self, storage: Storage) -> int:
        with self._counting:
            before, self._retries = self._retries, storage.retries
            return self._retries - before

    def _rows_of(
        self, loaded: Loaded, work: Work, ids: NDArray[np.int32], documents: NDArray[np.int32]
    ) -> tuple[dict[str, NDArray[Any]], float]:
        """All arrays of a bucket with these token ids, in stored order, and the seconds that took."""
        from actstore.capture.bucket import bucket_rows

        began, segment, span = time.perf_counter(), loaded.segments[work.segment], work.span
        tokens = segment.tokens
        self._rows[work.bucket] = 0

        def advance(rows: int) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            self._rows[work.bucket] += rows

        sites, rows = bucket_rows(
            loaded.model,
            loaded.sites,
            ids,
            documents,
            span,
            loaded.writer.permutation(work.bucket),
            rule=tokens.rule,
            batch_size=self.config.batch_size,
            encoding=next(iter(loaded.writer.spec.sites.values())).encoding,
            advance=advance,
        )
        self._rows.pop(work.bucket)
        provenance = {"sequence": rows.sequence + segment.first_sequence, "position": rows.position}
        return {**sites, **provenance, "token_id": rows.token_id}, time.perf_counter() - began

    def _load(self) -> Loaded:
        def once() -> Loaded:
            self._loaded = self._loaded or load_replica(self.config)
            return self._loaded

        return self._loaded or self._forward.submit(once).result()


def load_replica(config: ReplicaConfig) -> Loaded:
    """The store and the model, cut off after its deepest site; it must be the store's own, and fit."""
    import psutil
    import torch

    from actstore.capture.model import load_config, load_model, model_identity, versions, without_head
    from actstore.capture.segments import open_segments
    from actstore.capture.sites import num_layers, parse_sites

    writer = open_writer(config.store, threads=config.threads, versions=versions())
    spec, segments = writer.spec, open_segments(writer.storage, writer.spec)
    sites = parse_sites(spec.sites)
    model_config = load_config(config.model, config.revision)
    recorded = spec.provenance["model"]
    here = model_identity(config.model, model_config, config.dtype, config.attention)
    here["name"] = recorded["name"]  # directories move
    if config.any_versions:
        here |= {name: recorded[name] for name in versions() if name in recorded}
    if here != recorded:
        remedy = "Give every worker the same model and versions, or accept other versions with --allow versions."
        raise mismatch("the model on this worker", here, recorded, remedy)
    needed = config.needs(spec, max(s.tokens.seq_len for s in segments), model_config)
    check_memory(needed, 1, spec.shard_rows, resident=psutil.Process().memory_info().rss)
    torch.set_num_threads(config.threads)
    model = load_model(
        config.model,
        config.dtype,
        config.device,
        revision=config.revision,
        attention=config.attention,
        layers=num_layers(sites),
    )
    without_head(model)
    return Loaded(model, sites, writer, segments)


def _failure(error: Exception, store: str) -> Failure:
    """What a failed call says: which errors are certain to repeat on every node is decided here."""
    everywhere = isinstance(error, (EncodingError, TokensError, IntegrityError))
    refused = error if isinstance(error, ActstoreError) else None
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        refused = CaptureError(
            f"no space left at {without_secrets(store)}; committed buckets are kept: free some space and run this again"
        )
        everywhere = not isinstance(open_storage(store), LocalStorage)
    text = one_line(refused) if refused else f"{type(error).__name__}: {one_line(error)}"
    lines = "".join(traceback.format_exception(error))
    short = re.sub(r'File "[^"]*?/?((?:[^"/]+/){0,2}[^"/]+)"', r'File "\1"', lines)  # no paths of a machine
    trace = without_secrets(short)[-TRACEBACK_CHARACTERS:]
    return Failure(error=refused, text=without_secrets(text), traceback=trace, everywhere=everywhere)
