"""What a store holds, in figures, without reading a single activation.

A finished store answers from its manifest and group. For an unfinished one the commit objects are listed as well, and
each bucket that somebody is at, or was at when he died, costs one more look.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from actstore.store.format import manifest, record
from actstore.store.format.manifest import ArrayIndex
from actstore.store.format.shard import index_bytes
from actstore.store.format.spec import OPEN_ENDED
from actstore.store.read.store import Store

_WORKERS = 16


def describe(store: Store) -> dict[str, Any]:
    """The figures of a store, as JSON values; `planned_rows` and `planned_buckets` are None if it is open-ended."""
    spec, open_ended = store.spec, store.spec.rows == OPEN_ENDED
    figures = {
        "rows": store.rows,
        "planned_rows": None if open_ended else spec.planned_rows,
        "complete": store.complete,
        "open_ended": open_ended,
        "buckets": len(store.index.buckets),
        "planned_buckets": None if open_ended else spec.buckets,
        "bytes_stored": store.stored_bytes,
        "bytes_raw": store.raw_bytes,
        "ratio": store.raw_bytes / max(store.stored_bytes, 1),
        "objects": sum(_size(a)[1] for a in store.index.arrays.values()),
        "codec": spec.codec,
        "bucket_rows": spec.bucket_rows,
        "shard_rows": spec.shard_rows,
        "chunk_rows": spec.chunk_rows,
        "fingerprint": store.fingerprint,
    }
    sites = {name: _site(store, name) for name in sorted(spec.sites)}
    return figures | _in_work(store) | _extension(store) | {"sites": sites, "provenance": spec.provenance}


def _extension(store: Store) -> dict[str, Any]:
    """How far an extension is that readers do not see yet."""
    if not store.complete or manifest.read_spec(store.storage) == store.spec:
        return {}
    now = manifest.load_current(store.storage)
    planned = now.spec.buckets - store.spec.buckets
    return {"extension_buckets": len(now.buckets) - len(store.index.buckets), "extension_planned_buckets": planned}


def _size(index: ArrayIndex) -> tuple[int, int]:
    """Bytes and number of an array's committed shards."""
    per_shard = index.array.chunks_per_shard
    shards = int(np.count_nonzero(index.chunks[:, ::per_shard]))
    return int(index.chunks.sum(dtype=np.int64)) + shards * index_bytes(per_shard), shards


def _site(store: Store, name: str) -> dict[str, Any]:
    site, stored = store.sites[name], _size(store.index.arrays[name])[0]
    found = store.stats(name) if store.rows else None
    raw = store.rows * site.d * (4 if site.kind == "f32" else 2)
    return {
        "d": site.d,
        "encoding": site.encoding,
        "bytes_stored": stored,
        "ratio": raw / max(stored, 1),
        "rms_norm": found and found.mean_sq_norm**0.5,
        "max_abs": found and found.max_abs,
        "saturated": found.saturated if found and site.kind == "fixed" else None,
    }


def _in_work(store: Store) -> dict[str, Any]:
    """Buckets with an intent: being written, or left by an attempt that died; and the age of the newest."""
    if store.complete:
        return {"buckets_in_work": 0, "newest_attempt_s": None}
    listed = manifest.listed_buckets(store.storage, store.spec) - set(store.index.buckets.tolist())
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-info") as pool:
        seen = [s for s in pool.map(lambda b: store.storage.stat(record.commit_key(b)), sorted(listed)) if s]
    newest = max(time.time() - max(s.modified for s in seen), 0.0) if seen else None
    return {"buckets_in_work": len(seen), "newest_attempt_s": newest}
