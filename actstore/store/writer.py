"""Writing a store: create it, write buckets, finalise.

Any number of writers may work on one store without talking to each other. A bucket becomes visible by the creation
of its commit record and by nothing else; the creation succeeds once. What a dead attempt left behind is overwritten
by the next one and never read before that.
"""

import os
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError, mismatch
from actstore.store import codec, manifest, record, shard, stats
from actstore.store.spec import (
    ATTRIBUTE,
    GROUP_KEY,
    PROVENANCE_ARRAYS,
    RAW_DTYPES,
    ArraySpec,
    StoreSpec,
    arrays,
    dump,
    group_metadata,
    load_sealed,
    spec_from_json,
)
from actstore.store.storage import Storage, open_storage


class StoreWriter:
    """Writes buckets of one store; make it with `create_store` or `open_writer`."""

    def __init__(self, storage: Storage, spec: StoreSpec, *, threads: int | None = None) -> None:
        """Write to `storage` as `spec` says, encoding in `threads` threads (default: one a core)."""
        self.storage = storage
        self.spec = spec
        self.threads = threads or os.cpu_count() or 1
        self._arrays = arrays(spec)

    @property
    def url(self) -> str:
        """Where the store is; `open_writer(url)` reopens it in another process."""
        return self.storage.url

    @property
    def buckets(self) -> int:
        """Number of buckets of the finished store."""
        return self.spec.buckets

    def bucket_range(self, bucket: int) -> tuple[int, int]:
        """First row and the row after the last of a bucket."""
        return self.spec.bucket_range(bucket)

    def permutation(self, bucket: int) -> NDArray[np.int64]:
        """Stored place, within the bucket, of each of its rows [rows of the bucket]."""
        return self.spec.permutation(bucket)

    def committed(self) -> set[int]:
        """Buckets that are committed now."""
        return manifest.committed_buckets(self.storage, self.spec)

    def write_bucket(
        self,
        bucket: int,
        sites: Mapping[str, NDArray[Any]],
        *,
        sequence: NDArray[np.int32],
        position: NDArray[np.int32],
        token_id: NDArray[np.int32],
    ) -> record.CommitRecord | None:
        """Store a bucket and commit it.

        Every array is in stored order (see `permutation`): `sites[name]` is [n, d], as bfloat16 bits (uint16) for
        `bf16` and float32 for `f32`; the others are int32 [n]. Returns the record, or None if another attempt
        committed the bucket first, in which case nothing was changed.
        """
        data = {**sites, "sequence": sequence, "position": position, "token_id": token_id}
        first, stop = self.spec.bucket_range(bucket)
        self._check(data, stop - first)
        key = record.commit_key(bucket)
        if self.storage.exists(key):
            return None
        shards: dict[str, tuple[record.ShardRecord, ...]] = {}
        sums: dict[str, stats.Sums] = {}
        with ThreadPoolExecutor(self.threads, thread_name_prefix="actstore-encode") as pool:
            for name, array in self._arrays.items():
                rows = data[name]
                starts = range(0, stop - first, array.shard_rows)
                first_shard = first // array.shard_rows
                jobs = [
                    pool.submit(self._write_shard, array, first_shard + i, rows[s : s + array.shard_rows])
                    for i, s in enumerate(starts)
                ]
                done = [job.result() for job in jobs]
                shards[name] = tuple(s for s, _ in done)
                if name in self.spec.sites:
                    sums[name] = stats.merge([p for _, p in done if p is not None])
        made = record.CommitRecord(
            bucket=bucket, attempt=secrets.token_hex(8), rows=stop - first, shards=shards, stats=sums
        )
        return made if self.storage.create(key, record.to_bytes(made)) else None

    def _check(self, data: Mapping[str, NDArray[Any]], rows: int) -> None:
        if set(data) != set(self._arrays):
            raise ValueError(f"arrays are {sorted(data)}, the store has {sorted(self._arrays)}")
        for name, array in self._arrays.items():
            raw = np.dtype("<i4") if name in PROVENANCE_ARRAYS else RAW_DTYPES[self.spec.sites[name].encoding]
            shape = (rows, *array.shape[1:])
            if data[name].shape != shape or data[name].dtype != raw:
                raise ValueError(f"{name} is {data[name].dtype}{data[name].shape}, expected {raw}{shape}")

    def _write_shard(
        self, array: ArraySpec, index: int, rows: NDArray[Any]
    ) -> tuple[record.ShardRecord, stats.Sums | None]:
        chunks: list[bytes] = []
        parts: list[stats.Sums] = []
        for start in range(0, len(rows), array.chunk_rows):
            chunk = np.ascontiguousarray(rows[start : start + array.chunk_rows])
            if array.name in self.spec.sites:
                parts.append(stats.sums(chunk))
            if len(chunk) < array.chunk_rows:
                padding = np.zeros((array.chunk_rows - len(chunk), *chunk.shape[1:]), chunk.dtype)
                chunk = np.concatenate([chunk, padding])
            chunks.append(codec.encode(chunk, array.codec))
        data = shard.build(chunks, array.chunks_per_shard)
        self.storage.put(array.shard_key(index), data)
        made = record.ShardRecord(crc32c=codec.crc32c(data), chunks=tuple(len(c) for c in chunks))
        return made, stats.merge(parts) if parts else None

    def finalise(self) -> None:
        """Consolidate all commit records into a manifest, so that opening is one read; harmless to repeat."""
        manifest.consolidate(self.storage, self.spec)


def create_store(url: str | os.PathLike[str], spec: StoreSpec, *, threads: int | None = None) -> StoreWriter:
    """Create a store, or open it for more writing if it is there with exactly this spec.

    Raises `MismatchError` naming every field that differs, `StoreError` if something else lives at the URL.
    """
    storage = open_storage(url)
    created = not storage.exists(GROUP_KEY)
    if not created and (found := read_spec(storage)) != spec:
        raise mismatch(
            f"the store at {storage.url}",
            _comparable(found),
            _comparable(spec),
            remedy="Use the same settings to continue it, or another --out.",
        )
    for array in arrays(spec).values():
        key = f"{array.name}/zarr.json"
        if created or not storage.exists(key):
            storage.put(key, dump(array.metadata()))
    if created and not storage.create(GROUP_KEY, group_metadata(spec)):
        return create_store(url, spec, threads=threads)  # somebody else was first: compare with theirs
    return StoreWriter(storage, spec, threads=threads)


def open_writer(url: str | os.PathLike[str], *, threads: int | None = None) -> StoreWriter:
    """Open an existing store for writing."""
    storage = open_storage(url)
    return StoreWriter(storage, read_spec(storage), threads=threads)


def read_spec(storage: Storage) -> StoreSpec:
    """The spec of the store in `storage`; `StoreError` if there is none."""
    if not storage.exists(GROUP_KEY):
        raise StoreError(
            f"no activation store at {storage.url}: it has no {GROUP_KEY}. Make one with: actstore capture"
        )
    where = f"{storage.url}/{GROUP_KEY}"
    parsed = load_sealed(storage.get(GROUP_KEY), where)
    attributes = parsed.get("attributes") if isinstance(parsed, dict) else None
    return spec_from_json(attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None, where)


def _comparable(spec: StoreSpec) -> dict[str, object]:
    """The spec as dotted names with plain values, for comparing field by field."""
    sites = {name: f"{s.encoding}[{s.d}]" for name, s in spec.sites.items()}
    return _flat({**vars(spec), "sites": sites})


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
