"""A replica: one model that turns buckets into committed objects.

`capture` runs in two threads at a time, and hands its forward passes to one thread that both share. So while one
bucket's passes run, the other bucket is encoded and put, and then the token ids of the next are read. It is always the
same thread because OpenMP keeps a team of threads for each one that computes: with two teams a CPU model lost a tenth
of its speed (`docs/log.md`). `actstore.capture.memory` states what two buckets take. Each call keeps its own exception;
activations leave through the store only.
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.capture.config import Precision
from actstore.capture.segments import Work
from actstore.errors import mismatch

CALLS_IN_FLIGHT = 2
"""Calls of `capture` that a replica may be given at a time: what bounds its memory to two buckets."""


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


@dataclass(frozen=True)
class BucketSummary:
    """What a replica reports about a bucket; the activations stay in the store."""

    bucket: int
    rows: int
    bytes_stored: int
    """0 if another attempt had committed the bucket."""
    mended: bool
    """Whether only damaged objects were put again, because the rows came out as they were."""
    forward_s: float
    write_s: float
    encode_s: float
    """Per encoding thread, as is `put_s` per thread that puts: how long the stage would have taken alone."""
    put_s: float
    retries: int
    """Requests to the store that this worker had to send once more since it last reported."""


@dataclass
class _Loaded:
    """Everything that takes long to open."""

    model: Any
    sites: Any
    writer: Any
    segments: Any


@dataclass
class Replica:
    """One model replica; `ray.remote` makes an actor of it."""

    config: ReplicaConfig
    _forward: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "actstore-forward"))
    _rows: dict[int, int] = field(default_factory=dict[int, int])
    _loaded: _Loaded | None = None
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _retries: int = 0

    def start(self) -> dict[str, Any]:
        """Load the model and open the store; says where it runs, for the log."""
        began = time.perf_counter()
        self._forward.submit(self._load).result()
        return {"pid": os.getpid(), "host": os.uname().nodename, "seconds": round(time.perf_counter() - began, 3)}

    def rows_done(self) -> dict[int, int]:
        """Rows that went through the model, by bucket that is there now; for progress."""
        return dict(self._rows)

    def capture(self, work: Work) -> BucketSummary:
        """Run the model over a bucket's sequences, store its rows and commit it; a damaged one is mended."""
        from actstore.store.write.bucket import WriteTimes
        from actstore.store.write.protocol import NotWritten

        loaded = self._loaded or self._forward.submit(self._load).result()
        ids = loaded.segments[work.segment].tokens.ids(work.span.first_sequence, work.span.stop_sequence)
        data, forward_s = self._forward.submit(self._rows_of, loaded, work, ids).result()
        began, times, writer = time.perf_counter(), WriteTimes(), loaded.writer
        mended = False
        if work.keys:
            from actstore.store.maintain.repair import replace_shards

            mended = replace_shards(writer, work.bucket, data, work.keys, work.version)
        written = None if mended else writer.write_arrays(work.bucket, data, condemned=work.version, times=times)
        record = None if written is None or isinstance(written, NotWritten) else written
        return BucketSummary(
            bucket=work.bucket,
            rows=work.span.rows,
            bytes_stored=record.stored_bytes(writer.spec) if record else 0,
            mended=mended,
            forward_s=forward_s,
            write_s=time.perf_counter() - began,
            encode_s=times.encode_s / writer.threads,
            put_s=times.put_s / writer.puts,
            retries=self._new_retries(),
        )

    def _new_retries(self) -> int:
        assert self._loaded
        with self._counting:
            before, self._retries = self._retries, self._loaded.writer.storage.retries
            return self._retries - before

    def _rows_of(self, loaded: _Loaded, work: Work, ids: NDArray[np.int32]) -> tuple[dict[str, Any], float]:
        """All arrays of a bucket with these token ids, in stored order, and the seconds that took."""
        from actstore.capture.bucket import bucket_rows

        began, segment, span = time.perf_counter(), loaded.segments[work.segment], work.span
        tokens = segment.tokens
        self._rows[work.bucket] = 0

        def advance(rows: int) -> None:
            self._rows[work.bucket] += rows

        sites, rows = bucket_rows(
            loaded.model,
            loaded.sites,
            ids,
            span,
            loaded.writer.permutation(work.bucket),
            rule=tokens.rule,
            padding=(tokens.pad_id, tokens.eos_id if tokens.bos_id is None else tokens.bos_id),
            batch_size=self.config.batch_size,
            encoding=next(iter(loaded.writer.spec.sites.values())).encoding,
            advance=advance,
        )
        self._rows.pop(work.bucket)
        provenance = {"sequence": rows.sequence + segment.first_sequence, "position": rows.position}
        return {**sites, **provenance, "token_id": rows.token_id}, time.perf_counter() - began

    def _load(self) -> _Loaded:
        if self._loaded is None:
            from actstore.capture.segments import open_segments
            from actstore.capture.sites import parse_sites
            from actstore.store import open_writer

            writer = open_writer(self.config.store, threads=self.config.threads)
            segments = open_segments(writer.storage, writer.spec)
            self._loaded = _Loaded(
                model=load_replica(self.config, writer.spec, max(s.tokens.seq_len for s in segments)),
                sites=parse_sites(writer.spec.sites),
                writer=writer,
                segments=segments,
            )
        return self._loaded


def load_replica(config: ReplicaConfig, spec: Any, seq_len: int) -> Any:
    """The model, cut off after its deepest site; it must be the one that the store was created for, and fit."""
    import psutil
    import torch

    from actstore.capture.memory import check_memory, needs
    from actstore.capture.model import load_config, load_model, model_identity, without_head
    from actstore.capture.sites import num_layers, parse_sites
    from actstore.store.storage import LocalStorage, open_storage

    model_config = load_config(config.model)
    recorded = spec.provenance["model"]
    here = model_identity(config.model, model_config, config.dtype, config.attention)
    here["name"] = recorded["name"]  # directories move
    if here != recorded:
        remedy = "Give every worker the same model and versions."
        raise mismatch("the model on this worker", here, recorded, remedy)
    needed = needs(
        spec,
        model_config,
        dtype_bytes=getattr(torch, config.dtype).itemsize,
        seq_len=seq_len,
        batch_size=config.batch_size,
        threads=config.threads,
        local=isinstance(open_storage(config.store), LocalStorage),
        on_gpu=config.device != "cpu",
        gguf=config.model.endswith(".gguf"),
    )
    check_memory(needed, 1, spec.shard_rows, resident=psutil.Process().memory_info().rss)
    torch.set_num_threads(config.threads)
    model = load_model(
        config.model,
        config.dtype,
        config.device,
        revision=config.revision,
        attention=config.attention,
        layers=num_layers(parse_sites(spec.sites)),
    )
    without_head(model)
    return model
