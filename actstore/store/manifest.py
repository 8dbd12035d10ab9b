"""The manifest: all commit records in one parquet file, so that opening a store is one read and no listing.

`manifest/<n>-<crc32c>.parquet` has one row a bucket: `bucket`, `attempt`, and per array `<array>/crc32c` and
`<array>/chunks` (stored bytes of every chunk of the bucket, in order). The file's schema metadata holds the merged
statistics. Its name holds its crc32c, which readers check. A new manifest gets the next number; readers take the
greatest. Buckets committed after it are read from their own records.
"""

import io
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import IntegrityError, StoreError
from actstore.store import codec, record, stats
from actstore.store.shard import index_bytes
from actstore.store.spec import ArraySpec, StoreSpec, arrays
from actstore.store.storage import Storage

STATS_KEY = b"actstore.stats"
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class ArrayIndex:
    """Where every chunk of one array lies."""

    array: ArraySpec
    chunks: NDArray[np.uint32]
    """Stored bytes [committed buckets, chunks per bucket]; 0 where a short bucket has none."""
    crc32c: NDArray[np.uint32]
    """Of every object [committed buckets, shards per bucket]."""

    def locate(self, place: int, bucket: int, chunk: int) -> tuple[str, int, int]:
        """Object, offset and length of chunk `chunk` of the bucket at row `place` of the index."""
        per_shard = self.array.chunks_per_shard
        within, slot = divmod(chunk, per_shard)
        lengths = self.chunks[place, within * per_shard : within * per_shard + slot + 1]
        shards_per_bucket = self.chunks.shape[1] // per_shard
        key = self.array.shard_key(bucket * shards_per_bucket + within)
        return key, int(lengths[:-1].sum(dtype=np.int64)), int(lengths[-1])


@dataclass(frozen=True, kw_only=True)
class Index:
    """All committed buckets of a store."""

    buckets: NDArray[np.int64]
    """Committed bucket numbers, ascending."""
    attempts: tuple[str, ...]
    arrays: dict[str, ArrayIndex]
    stats: dict[str, stats.Sums]
    """Per site, over all committed buckets; empty when nothing is committed."""

    def stored_bytes(self) -> int:
        """Bytes of all committed objects, shard indexes included."""
        return sum(
            int(a.chunks.sum(dtype=np.int64)) + int(_present(a).sum()) * index_bytes(a.array.chunks_per_shard)
            for a in self.arrays.values()
        )


def _present(index: ArrayIndex) -> NDArray[np.bool_]:
    """Which shards exist [committed buckets, shards per bucket]."""
    return index.chunks[:, :: index.array.chunks_per_shard] > 0


def manifest_keys(storage: Storage) -> list[str]:
    """Manifests, oldest first."""
    return [k for k in storage.list("manifest") if k.endswith(".parquet")]


def _bucket_of(key: str) -> int:
    stem = key.removeprefix("commits/").removesuffix(".json")
    if not stem.isdigit():
        raise StoreError(f"{key}: not the name of a commit record")
    return int(stem)


def committed_buckets(storage: Storage, spec: StoreSpec) -> set[int]:
    """Numbers of the committed buckets, by listing."""
    found = {_bucket_of(k) for k in storage.list("commits")}
    if found and max(found) >= spec.buckets:
        raise StoreError(f"{record.commit_key(max(found))}: the store has {spec.buckets} buckets")
    return found


def _read_records(storage: Storage, spec: StoreSpec, buckets: Iterable[int]) -> list[record.CommitRecord]:
    def read(bucket: int) -> record.CommitRecord:
        return record.from_bytes(storage.get(record.commit_key(bucket)), spec, bucket)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-records") as pool:
        return list(pool.map(read, buckets))


def _index(spec: StoreSpec, records: list[record.CommitRecord], merged: dict[str, stats.Sums]) -> Index:
    found: dict[str, ArrayIndex] = {}
    for name, array in arrays(spec).items():
        shards = spec.bucket_rows // array.shard_rows
        chunks = np.zeros((len(records), spec.bucket_rows // spec.chunk_rows), np.uint32)
        crcs = np.zeros((len(records), shards), np.uint32)
        for i, r in enumerate(records):
            flat = [c for s in r.shards[name] for c in s.chunks]
            chunks[i, : len(flat)] = flat
            crcs[i, : len(r.shards[name])] = [s.crc32c for s in r.shards[name]]
        found[name] = ArrayIndex(array=array, chunks=chunks, crc32c=crcs)
    return Index(
        buckets=np.array([r.bucket for r in records], np.int64),
        attempts=tuple(r.attempt for r in records),
        arrays=found,
        stats=merged,
    )


def _index_of_records(spec: StoreSpec, records: list[record.CommitRecord]) -> Index:
    merged = {s: stats.merge([r.stats[s] for r in records]) for s in spec.sites} if records else {}
    return _index(spec, records, merged)


def load(storage: Storage, spec: StoreSpec) -> Index:
    """The committed buckets: from the newest manifest if it covers the whole store, else from the records."""
    keys = manifest_keys(storage)
    if keys:
        index = _read(storage, spec, keys[-1])
        if len(index.buckets) == spec.buckets:
            return index
    return _index_of_records(spec, _read_records(storage, spec, sorted(committed_buckets(storage, spec))))


def consolidate(storage: Storage, spec: StoreSpec) -> None:
    """Write a manifest of all commit records, unless the newest one covers them."""
    records = _read_records(storage, spec, sorted(committed_buckets(storage, spec)))
    if not records:
        return
    data = _to_parquet(spec, _index_of_records(spec, records))
    keys = manifest_keys(storage)
    if keys and storage.get(keys[-1]) == data:
        return
    number = _number_and_crc(keys[-1])[0] + 1 if keys else 0
    storage.create(f"manifest/{number:08d}-{codec.crc32c(data):08x}.parquet", data)


def _number_and_crc(key: str) -> tuple[int, int]:
    found = re.fullmatch(r"manifest/(\d{8})-([0-9a-f]{8})\.parquet", key)
    if not found:
        raise StoreError(f"{key}: not the name of a manifest")
    return int(found[1]), int(found[2], 16)


def _read(storage: Storage, spec: StoreSpec, key: str) -> Index:
    data = storage.get(key)
    if codec.crc32c(data) != _number_and_crc(key)[1]:
        raise IntegrityError(f"{key}: is not what its name's crc32c says; delete it, the commit records hold the same")
    return _from_parquet(data, spec, key)


def agrees(storage: Storage, spec: StoreSpec, key: str) -> bool:
    """Whether a manifest says what the commit records of its buckets say."""
    index = _read(storage, spec, key)
    again = _index_of_records(spec, _read_records(storage, spec, index.buckets.tolist()))
    return _to_parquet(spec, index) == _to_parquet(spec, again)


def _to_parquet(spec: StoreSpec, index: Index) -> bytes:
    columns: dict[str, Any] = {"bucket": pa.array(index.buckets), "attempt": pa.array(index.attempts)}
    for name, a in index.arrays.items():
        columns[f"{name}/crc32c"] = pa.array(
            [row[there] for row, there in zip(a.crc32c, _present(a), strict=True)], pa.list_(pa.uint32())
        )
        columns[f"{name}/chunks"] = pa.array([row[row > 0] for row in a.chunks], pa.list_(pa.uint32()))
    merged = json.dumps({s: stats.to_json(index.stats[s]) for s in spec.sites}, sort_keys=True)
    table = pa.table(columns).replace_schema_metadata({STATS_KEY: merged.encode()})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def _from_parquet(data: bytes, spec: StoreSpec, where: str) -> Index:
    try:
        table = pq.read_table(pa.BufferReader(data))
        merged = json.loads((table.schema.metadata or {})[STATS_KEY])
        buckets = table["bucket"].to_numpy().astype(np.int64)
        attempts = tuple(str(a) for a in table["attempt"].to_pylist())
        if not (np.diff(buckets) > 0).all() or not ((buckets >= 0) & (buckets < spec.buckets)).all():
            raise ValueError("bucket numbers are out of order or out of range")
        found = {
            name: _array_index(table, array, buckets, spec, spec.bucket_rows // array.shard_rows)
            for name, array in arrays(spec).items()
        }
        sums = {s: stats.from_json(merged[s], site.d, f"{where} {s}") for s, site in spec.sites.items()}
    except (KeyError, ValueError, TypeError, pa.ArrowException) as e:
        raise StoreError(f"{where}: not a manifest of this store ({e})") from e
    return Index(buckets=buckets, attempts=attempts, arrays=found, stats=sums)


def _array_index(
    table: pa.Table, array: ArraySpec, buckets: NDArray[np.int64], spec: StoreSpec, shards: int
) -> ArrayIndex:
    rows = np.minimum(spec.bucket_rows, spec.rows - buckets * spec.bucket_rows)

    def padded(column: str, counts: NDArray[np.int64], width: int) -> NDArray[np.uint32]:
        lists = table[column].combine_chunks()
        found = np.diff(lists.offsets.to_numpy())
        if (found != counts).any():
            raise ValueError(f"column {column} has {found.tolist()[:5]} entries, expected {counts.tolist()[:5]}")
        out = np.zeros((len(counts), width), np.uint32)
        out[np.arange(width)[None, :] < counts[:, None]] = lists.flatten().to_numpy()
        return out

    chunks = padded(f"{array.name}/chunks", -(-rows // spec.chunk_rows), spec.bucket_rows // spec.chunk_rows)
    crcs = padded(f"{array.name}/crc32c", -(-rows // array.shard_rows), shards)
    return ArrayIndex(array=array, chunks=chunks, crc32c=crcs)
