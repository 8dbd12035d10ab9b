"""What a store holds, in figures, without reading a single activation.

A finished store answers from its manifest and group. For an unfinished one the commit objects are listed as well, and
each bucket with an open intent (a writer is working on it, or crashed) costs one more request.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actstore.store.format import record
from actstore.store.format.spec import OPEN_ENDED, arrays
from actstore.store.read.index import committed, read_spec
from actstore.store.read.store import Store

_WORKERS = 16


def describe(store: Store) -> dict[str, Any]:
    """The figures of a store, as JSON values; `planned_rows` and `planned_buckets` are None if it is open-ended."""
    spec, open_ended = store.spec, store.spec.rows == OPEN_ENDED
    figures: dict[str, Any] = {
        "rows": store.rows,
        "planned_rows": None if open_ended else spec.planned_rows,
        "complete": store.complete,
        "open_ended": open_ended,
        "buckets": len(store.index.buckets),
        "planned_buckets": None if open_ended else spec.buckets,
        "bytes_stored": store.stored_bytes,
        "bytes_raw": store.raw_bytes,
        "ratio": store.raw_bytes / max(store.stored_bytes, 1),
        "objects": sum(map(store.index.num_shards, arrays(spec).values())),
        "codec": spec.codec,
        "bucket_rows": spec.bucket_rows,
        "shard_rows": spec.shard_rows,
        "chunk_rows": spec.chunk_rows,
        "fingerprint": store.fingerprint,
        "versions": {k: list(v) for k, v in store.index.versions.items()},
    }
    sites = {name: _site(store, name) for name in sorted(spec.sites)}
    figures["remarks"] = store.remarks()
    return figures | _in_work(store) | _extension(store) | {"sites": sites, "provenance": spec.provenance}


def _extension(store: Store) -> dict[str, Any]:
    """How far an extension is that readers do not see yet."""
    if not store.complete or (spec := read_spec(store.storage)) == store.spec:
        return {}
    done = len(committed(store.storage, spec)) - len(store.index.buckets)
    return {"extension_buckets": done, "extension_planned_buckets": spec.buckets - store.spec.buckets}


def _site(store: Store, name: str) -> dict[str, Any]:
    site, stored = store.sites[name], store.index.array_bytes(arrays(store.spec)[name])
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
        "clipped_fvu": found.clipped_fvu if found and site.kind == "fixed" else None,
        "nonfinite": found and found.nonfinite,
        "nonfinite_rows": found and list(found.nonfinite_rows),
    }


def _in_work(store: Store) -> dict[str, Any]:
    """Buckets with an intent: being written, or left by an attempt that died; and the age of the newest."""
    if store.complete:
        return {"buckets_in_work": 0, "newest_attempt_s": None}
    exist = set(store.index.buckets.tolist())
    listed = [k for k in store.storage.list(record.COMMITS) if record.bucket_of(k) not in exist]
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-info") as pool:
        seen = [s for s in pool.map(store.storage.stat, listed) if s]
    newest = max(time.time() - max(s.modified for s in seen), 0.0) if seen else None
    return {"buckets_in_work": len(seen), "newest_attempt_s": newest}
