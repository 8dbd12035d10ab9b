"""A replica: one model that turns buckets into committed objects.

`capture` runs in two threads at a time and a lock admits one of them to the model, so one bucket is encoded and written
while the next one's forward passes run. Memory is at most two buckets, `2 * bucket_rows * sum(d) * 2 bytes` for bf16,
and the model. Each call keeps its own exception; activations leave through the store only.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from actstore.capture.config import DType
from actstore.errors import mismatch
from actstore.tokens.rows import Span

CALLS_IN_FLIGHT = 2
"""Calls of `capture` that a replica may be given at a time: what bounds its memory to two buckets."""


@dataclass(frozen=True)
class ReplicaConfig:
    """What a replica needs to know; small enough to travel with the actor."""

    model: str
    revision: str | None
    dtype: DType
    device: str
    sites: tuple[str, ...]
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
    forward_s: float
    write_s: float


@dataclass
class _Loaded:
    """Everything that takes long to open."""

    model: Any
    writer: Any
    tokens: Any


@dataclass
class Replica:
    """One model replica; `ray.remote` makes an actor of it."""

    config: ReplicaConfig
    _forward: threading.Lock = field(default_factory=threading.Lock)
    _rows: dict[int, int] = field(default_factory=dict[int, int])
    _loaded: _Loaded | None = None

    def rows_done(self) -> dict[int, int]:
        """Rows that went through the model, by bucket; for progress."""
        return dict(self._rows)

    def capture(self, bucket: int, span: Span) -> BucketSummary:
        """Run the model over a bucket's sequences, store its rows and commit it."""
        with self._forward:
            loaded = self._load()
            from actstore.capture.bucket import bucket_rows
            from actstore.capture.sites import parse_sites

            writer, tokens = loaded.writer, loaded.tokens
            began = time.perf_counter()
            self._rows[bucket] = 0

            def advance(rows: int) -> None:
                self._rows[bucket] += rows

            arrays, rows = bucket_rows(
                loaded.model,
                parse_sites(self.config.sites),
                tokens.ids(span.first_sequence, span.stop_sequence),
                span,
                writer.permutation(bucket),
                rule=tokens.rule,
                batch_size=self.config.batch_size,
                encoding=next(iter(writer.spec.sites.values())).encoding,
                advance=advance,
            )
            forward_s = time.perf_counter() - began
        began = time.perf_counter()
        record = writer.write_bucket(
            bucket, arrays, sequence=rows.sequence, position=rows.position, token_id=rows.token_id
        )
        write_s = time.perf_counter() - began
        return BucketSummary(bucket, span.rows, record.stored_bytes(writer.spec) if record else 0, forward_s, write_s)

    def _load(self) -> _Loaded:
        if self._loaded is None:
            from actstore.store import open_writer
            from actstore.tokens import open_tokens

            writer = open_writer(self.config.store, threads=self.config.threads)
            tokens = open_tokens(writer.storage, "tokens/")
            self._loaded = _Loaded(_load_model(self.config, writer.spec.provenance["model"]), writer, tokens)
        return self._loaded


def _load_model(config: ReplicaConfig, recorded: dict[str, Any]) -> Any:
    """The model, cut off after its deepest site; it must be the one that the store was created for."""
    import torch

    from actstore.capture.model import load_config, load_model, model_identity, truncate
    from actstore.capture.sites import parse_sites

    here = model_identity(config.model, load_config(config.model), config.dtype)
    if here != recorded:
        raise mismatch("the model on this worker", here, recorded, "Give every worker the same model and versions.")
    torch.set_num_threads(config.threads)
    model = load_model(config.model, config.dtype, config.device, config.revision)
    truncate(model, max(site.layer for site in parse_sites(config.sites)))
    return model
