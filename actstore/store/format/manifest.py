"""The manifest: all commit records in one parquet file, so that opening a finished store is one GET and no listing.

`manifest.parquet` has one row a bucket: `bucket`, `attempt`, and per array `<array>/crc32c` and `<array>/chunks`
(stored bytes of every chunk of the bucket, in order). Its metadata holds the store's spec, the crc32c of calibrations,
the merged statistics, and the seal of the whole file. It is replaced by compare-and-swap. A store that it does not
cover is completed from the commit records of the other buckets; without it the records say the same.
"""

import io
import json
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import IntegrityError, MissingError, StoreError
from actstore.store.format import record, stats
from actstore.store.format.codec import max_stored
from actstore.store.format.parquet_pages import page_sizes
from actstore.store.format.shard import index_bytes
from actstore.store.format.spec import (
    ATTRIBUTE,
    GROUP_KEY,
    METADATA_LIMIT,
    SEAL,
    ArraySpec,
    StoreSpec,
    arrays,
    check_seal,
    load_sealed,
    parse_json,
    seal,
    spec_from_json,
)
from actstore.store.storage import Storage

MANIFEST_KEY = "manifest.parquet"
EXTENSIONS = "extensions"
"""Field of a store's provenance: what each extension was made of."""
MANIFEST_LIMIT = 1 << 32
"""Bytes of a manifest that a reader will read; `spec.MAX_INDEX` keeps it below."""
_READERS = 16
_SWAPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """One stored chunk."""

    key: str
    offset: int
    length: int
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class ArrayIndex:
    """Where every chunk of one array lies."""

    array: ArraySpec
    chunks: NDArray[np.uint32]
    """Stored bytes [committed buckets, chunks per bucket]; 0 where a short bucket has none."""
    crc32c: NDArray[np.uint32]
    """Of every chunk [committed buckets, chunks per bucket]."""

    def locate(self, place: int, bucket: int, chunk: int) -> Location:
        """Where chunk `chunk` of the bucket at row `place` of the index lies."""
        per_shard = self.array.chunks_per_shard
        within, slot = divmod(chunk, per_shard)
        lengths = self.chunks[place, within * per_shard : within * per_shard + slot + 1]
        shards_per_bucket = self.chunks.shape[1] // per_shard
        key = self.array.shard_key(bucket * shards_per_bucket + within)
        return Location(
            key=key,
            offset=int(lengths[:-1].sum(dtype=np.int64)),
            length=int(lengths[-1]),
            crc32c=int(self.crc32c[place, chunk]),
        )


@dataclass(frozen=True, kw_only=True)
class Index:
    """All committed buckets of a store."""

    spec: StoreSpec
    buckets: NDArray[np.int64]
    """Committed bucket numbers, ascending."""
    attempts: tuple[str, ...]
    arrays: Mapping[str, ArrayIndex]
    calibration: dict[str, int]
    """Per `fixed` site, crc32c of its calibration; empty when nothing is committed."""
    stats: dict[str, stats.Sums] | None
    """Per site, over all committed buckets; None where that takes reading the records (`merged_stats`)."""

    @property
    def complete(self) -> bool:
        """Whether every bucket is committed."""
        return len(self.buckets) == self.spec.buckets

    def place(self, bucket: int) -> int | None:
        """Row of a bucket in the index; None if it is not committed."""
        i = int(np.searchsorted(self.buckets, bucket))
        return i if i < len(self.buckets) and self.buckets[i] == bucket else None

    def stored_bytes(self) -> int:
        """Bytes of all committed objects, shard indexes included."""
        return sum(
            int(a.chunks.sum(dtype=np.int64))
            + int((a.chunks[:, :: a.array.chunks_per_shard] > 0).sum()) * index_bytes(a.array.chunks_per_shard)
            for a in self.arrays.values()
        )


def read_spec(storage: Storage) -> StoreSpec:
    """The spec of the store in `storage`, from its group; `StoreError` if there is none."""
    where = f"{storage.url}/{GROUP_KEY}"
    try:
        parsed = load_sealed(storage.get(GROUP_KEY, METADATA_LIMIT), where)
    except MissingError as e:
        raise StoreError(
            f"no activation store at {storage.url}: it has no {GROUP_KEY}. Make one with: actstore capture"
        ) from e
    attributes = parsed.get("attributes") if isinstance(parsed, dict) else None
    return spec_from_json(attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None, where)


def load(storage: Storage) -> Index:
    """The index: from the manifest if it covers the store, with the records of other buckets if not."""
    known = read_manifest(storage)
    return known if known is not None and known.complete else _completed(storage, read_spec(storage), known)


def load_current(storage: Storage) -> Index:
    """The index of the store as its group is now: while a finished store is extended, readers see what it was."""
    known, spec = read_manifest(storage), read_spec(storage)
    return known if known is not None and known.complete and known.spec == spec else _completed(storage, spec, known)


def _completed(storage: Storage, spec: StoreSpec, known: Index | None) -> Index:
    if known is None:
        return load_records(storage, spec)
    if not agrees(known, spec):
        raise StoreError(
            f"{storage.url}: {MANIFEST_KEY} and {GROUP_KEY} describe different stores; see: actstore verify"
        )
    have = set(known.buckets.tolist())
    return _together(spec, known, _index(spec, read_records(storage, spec, listed_buckets(storage, spec) - have)))


def agrees(known: Index, spec: StoreSpec) -> bool:
    """Whether a manifest is of the store that the group describes, whose rows may have been fixed or extended since."""
    if len(known.buckets) and known.buckets[-1] >= spec.buckets:
        return False
    same_rows = (known.spec.bucket_sizes(known.buckets) == spec.bucket_sizes(known.buckets)).all()
    return bool(same_rows) and extents_apart(known.spec) == extents_apart(spec)


def extents_apart(spec: StoreSpec) -> StoreSpec:
    """The spec without what may change: how many rows it has, and what it was extended with."""
    provenance = {k: v for k, v in spec.provenance.items() if k != EXTENSIONS}
    return replace(spec, rows=1, short_buckets=(), provenance=provenance)


def load_records(storage: Storage, spec: StoreSpec) -> Index:
    """The index from the commit records alone."""
    return index_of(spec, read_records(storage, spec, listed_buckets(storage, spec)))


def index_of(spec: StoreSpec, records: list[record.CommitRecord]) -> Index:
    """The index of these records, statistics included."""
    return replace(_index(spec, records), stats=_merged(spec, records))


def listed_buckets(storage: Storage, spec: StoreSpec) -> set[int]:
    """Buckets that have a commit object, committed or intent."""
    found = (record.bucket_of(k, spec) for k in storage.list(record.COMMITS))
    return {bucket for bucket in found if bucket is not None}


def read_records(storage: Storage, spec: StoreSpec, buckets: Iterable[int]) -> list[record.CommitRecord]:
    """Records of those of the buckets that are committed, ascending."""

    def read(bucket: int) -> record.CommitRecord | record.Intent:
        return record.from_bytes(storage.get(record.commit_key(bucket), METADATA_LIMIT), spec, bucket)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-records") as pool:
        return [r for r in pool.map(read, sorted(buckets)) if isinstance(r, record.CommitRecord)]


def merged_stats(storage: Storage, index: Index) -> dict[str, stats.Sums]:
    """Statistics over all committed buckets; one GET a bucket unless the index has them."""
    if index.stats is not None:
        return index.stats
    return _merged(index.spec, read_records(storage, index.spec, index.buckets.tolist()))


def _merged(spec: StoreSpec, records: list[record.CommitRecord]) -> dict[str, stats.Sums]:
    return {s: stats.merge([r.stats[s] for r in records]) for s in spec.sites} if records else {}


def _index(spec: StoreSpec, records: list[record.CommitRecord]) -> Index:
    found: dict[str, ArrayIndex] = {}
    for name, array in arrays(spec).items():
        chunks = np.zeros((len(records), spec.bucket_rows // spec.chunk_rows), np.uint32)
        crcs = np.zeros_like(chunks)
        for i, r in enumerate(records):
            flat = [c for s in r.shards[name] for c in s.chunks]
            chunks[i, : len(flat)] = flat
            crcs[i, : len(flat)] = [c for s in r.shards[name] for c in s.crc32c]
        found[name] = ArrayIndex(array=array, chunks=chunks, crc32c=crcs)
    calibration = records[0].calibration if records else {}
    for r in records:
        if r.calibration != calibration:
            raise IntegrityError(
                f"{record.commit_key(r.bucket)}: its calibration is not that of {record.commit_key(records[0].bucket)}"
            )
    return Index(
        spec=spec,
        buckets=np.array([r.bucket for r in records], np.int64),
        attempts=tuple(r.attempt for r in records),
        arrays=found,
        calibration=calibration,
        stats=None if records else {},
    )


def _together(spec: StoreSpec, a: Index, b: Index) -> Index:
    if not len(b.buckets):
        return replace(a, spec=spec, arrays={n: replace(x, array=b.arrays[n].array) for n, x in a.arrays.items()})
    if len(a.buckets) and a.calibration != b.calibration:
        raise IntegrityError(f"{MANIFEST_KEY}: its calibration is not that of the commit records")
    order = np.argsort(np.concatenate([a.buckets, b.buckets]))
    attempts = (*a.attempts, *b.attempts)
    return replace(
        b,
        buckets=np.concatenate([a.buckets, b.buckets])[order],
        attempts=tuple(attempts[i] for i in order),
        arrays={
            n: ArrayIndex(
                array=y.array,
                chunks=np.concatenate([a.arrays[n].chunks, y.chunks])[order],
                crc32c=np.concatenate([a.arrays[n].crc32c, y.crc32c])[order],
            )
            for n, y in b.arrays.items()
        },
        stats=None,
    )


def consolidate(storage: Storage, spec: StoreSpec) -> None:
    """Write a manifest of all commit records, unless the present one says the same."""
    for _ in range(_SWAPS):
        seen = storage.stat(MANIFEST_KEY)
        index = load_records(storage, spec)
        if not len(index.buckets):
            return
        data = to_parquet(index)
        if seen and seen.size == len(data) and storage.get(MANIFEST_KEY, len(data)) == data:
            return
        if storage.replace(MANIFEST_KEY, data, seen.version) if seen else storage.create(MANIFEST_KEY, data):
            return
    raise StoreError(f"{storage.url}: {MANIFEST_KEY} changed {_SWAPS} times while it was being written; try again")


def read_manifest(storage: Storage) -> Index | None:
    """The index that the manifest holds; None if there is no manifest."""
    try:
        data = storage.get(MANIFEST_KEY, MANIFEST_LIMIT)
    except MissingError:
        return None
    return from_parquet(data, f"{storage.url}/{MANIFEST_KEY}")


def _ragged(table: NDArray[np.uint32], there: NDArray[np.bool_]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(table[there]))


def to_parquet(index: Index) -> bytes:
    """The manifest's content."""
    columns: dict[str, Any] = {"bucket": pa.array(index.buckets), "attempt": pa.array(index.attempts)}
    for name, a in index.arrays.items():
        columns[f"{name}/crc32c"] = _ragged(a.crc32c, a.chunks > 0)
        columns[f"{name}/chunks"] = _ragged(a.chunks, a.chunks > 0)
    assert index.stats is not None
    about = {
        **index.spec.to_json(),
        "calibration": {site: f"{crc:08x}" for site, crc in index.calibration.items()},
        "stats": {site: stats.to_json(s) for site, s in index.stats.items()},
    }
    table, out = pa.table(columns), io.BytesIO()
    # checksums do not repeat, so dictionaries only cost; one row group, so that readers get arrays in one piece
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "store_schema": False}
    with pq.ParquetWriter(out, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata({ATTRIBUTE: json.dumps(about, sort_keys=True, allow_nan=False)})
    return seal(out.getvalue())


def from_parquet(data: bytes, where: str) -> Index:
    """Parse and check a manifest; `IntegrityError` if a byte changed, `StoreError` if it lies."""
    if not check_seal(data, where):
        raise IntegrityError(f"{where}: has no {SEAL}. Delete it and finalise again; the commit records hold the same")
    with _parsing(where):
        # never in Arrow's threads: one that lets go of `data` last, while the interpreter ends, aborts the process
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["attempt"])
        about = parse_json((file.metadata.metadata or {})[ATTRIBUTE.encode()])
        calibration, sums = about.pop("calibration"), about.pop("stats")
        spec = spec_from_json(about, where)
        _check_sizes(spec, data)
        buckets, attempts = _head(file)
        if not (np.diff(buckets) > 0).all() or not ((buckets >= 0) & (buckets < spec.buckets)).all():
            raise ValueError("bucket numbers are out of order or out of range")
        merged = {s: stats.from_json(sums[s], site.d, f"{where} {s}") for s, site in spec.sites.items()}
        rows = int(spec.bucket_sizes(buckets).sum())
        if any(s.rows != rows for s in merged.values()):
            raise ValueError(f"statistics are not of the {rows} rows of its buckets")
        return Index(
            spec=spec,
            buckets=buckets,
            attempts=attempts,
            arrays=_Columns(file, spec, buckets, where),
            calibration={
                s: record.parse_crcs(calibration[s], 1, where)[0]
                for s, site in sorted(spec.sites.items())
                if site.kind == "fixed"
            },
            stats=merged,
        )


def _head(file: pq.ParquetFile) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Buckets and attempts; these as a dictionary, because a file can repeat one long string for next to nothing."""
    head = file.read(columns=["bucket", "attempt"], use_threads=False)
    buckets, attempts = (head[c].unify_dictionaries().combine_chunks() for c in ("bucket", "attempt"))
    if buckets.type != pa.int64() or attempts.type != pa.dictionary(pa.int32(), pa.string()):
        raise ValueError(f"bucket and attempt are {buckets.type} and {attempts.type}, expected int64 and string")
    if buckets.null_count or attempts.null_count:
        raise ValueError("bucket or attempt has no value in some row")
    ids = attempts.dictionary.to_pylist()
    if not all(map(record.is_attempt, ids)):
        raise ValueError("attempt is not a short id in some row")
    return buckets.to_numpy(), tuple(ids[i] for i in attempts.indices.to_pylist())


@contextmanager
def _parsing(where: str) -> Generator[None]:
    try:
        yield
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
        RecursionError,
        pa.ArrowException,
    ) as e:
        raise StoreError(f"{where}: not a manifest of this store ({e})") from e


class _Columns(Mapping[str, ArrayIndex]):
    """The arrays of a manifest, each unpacked and checked when it is first asked for: most readers want one of many."""

    def __init__(self, file: pq.ParquetFile, spec: StoreSpec, buckets: NDArray[np.int64], where: str) -> None:
        self._file, self._specs, self._where = file, arrays(spec), where
        self._rows = spec.bucket_sizes(buckets)
        self._width = spec.bucket_rows // spec.chunk_rows
        self._unpacked: dict[str, ArrayIndex] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> ArrayIndex:
        with self._lock:
            if name not in self._unpacked:
                array = self._specs[name]
                with _parsing(self._where):
                    self._unpacked[name] = self._unpack(array)
            return self._unpacked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _unpack(self, array: ArraySpec) -> ArrayIndex:
        counts = -(-self._rows // array.chunk_rows)
        chunks = self._table(f"{array.name}/chunks", counts)
        if ((chunks > 0).sum(axis=1) != counts).any() or (chunks > max_stored(array.chunk_bytes)).any():
            raise ValueError(f"column {array.name}/chunks has impossible lengths")
        return ArrayIndex(array=array, chunks=chunks, crc32c=self._table(f"{array.name}/crc32c", counts))

    def _table(self, column: str, counts: NDArray[np.int64]) -> NDArray[np.uint32]:
        """A column of lists as a table; short buckets end in zeros."""
        lists = self._file.read(columns=[f"{column}.list.element"], use_threads=False)[column].combine_chunks()
        if lists.type != pa.list_(pa.uint32()) or lists.null_count:
            raise ValueError(f"column {column} is {lists.type}, expected lists of uint32")
        found = np.diff(lists.offsets.to_numpy())
        if len(found) != len(counts) or (found != counts).any():
            raise ValueError(f"column {column} has {found.tolist()[:5]} entries, expected {counts.tolist()[:5]}")
        flat = lists.flatten().to_numpy(zero_copy_only=True)
        if (counts == self._width).all():
            return flat.reshape(-1, self._width)
        out = np.zeros((len(counts), self._width), np.uint32)
        out[np.arange(self._width)[None, :] < counts[:, None]] = flat
        return out


def _check_sizes(spec: StoreSpec, data: bytes) -> None:
    """Refuse to unpack what could not have been so small: half of the numbers are checksums, which do not compress."""
    rows, values, unpacked = page_sizes(data)
    limit = (1 << 27) + 16 * len(data)
    wide = 2 * (spec.bucket_rows // spec.chunk_rows) * len(arrays(spec))
    if not 0 <= rows <= spec.buckets or 4 * rows * wide > limit:
        raise ValueError(f"{rows} rows of {wide} numbers in {len(data)} bytes")
    most = {"bucket": rows, "attempt": rows}
    for name in values:
        if values[name] > most.get(name, rows * wide) or unpacked[name] > limit:
            raise ValueError(f"column {name} has {values[name]} values in {unpacked[name]} bytes")
