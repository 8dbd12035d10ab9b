"""The index of a store: which buckets exist, and where each of their chunks lies.

A finished store is opened from the head of its manifest, one GET; the tables of an array are fetched when it is first
asked for. Of an unfinished store the commit objects are listed, and what no part of the manifest covers is read from
their records.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from actstore.errors import MissingError, StoreError
from actstore.store.format import manifest, record, stats
from actstore.store.format.record import Chunks, CommitRecord
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.shard import stored_bytes
from actstore.store.format.spec import GROUP_KEY, ArraySpec, StoreSpec, arrays, spec_from_bytes
from actstore.store.storage import Storage

EXTENSIONS = "extensions"
"""Field of a store's provenance: what each extension was made of."""
_READERS = 16


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
    """Stored bytes [committed buckets, chunks of a full bucket]; 0 where a short bucket has none."""
    crc32c: NDArray[np.uint32]
    """Of every chunk [committed buckets, chunks of a full bucket]."""

    def locate(self, place: int, bucket: int, chunk: int) -> Location:
        """Where chunk `chunk` of the bucket at row `place` of the index lies."""
        per_shard = self.array.chunks_per_shard
        within, slot = divmod(chunk, per_shard)
        lengths = self.chunks[place, within * per_shard : within * per_shard + slot + 1]
        shards_per_bucket = self.chunks.shape[1] // per_shard
        return Location(
            key=self.array.shard_key(bucket * shards_per_bucket + within),
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
    arrays: Mapping[str, ArrayIndex]
    stored: dict[str, int]
    """Bytes of each array's committed chunks."""
    calibration: Mapping[str, int]
    """Per `fixed` site, crc32c of its calibration; empty when nothing is committed."""
    stats: dict[str, stats.Sums]
    """Per site, over all committed buckets; empty when nothing is committed."""
    versions: dict[str, tuple[str, ...]]
    """Versions that computed the rows, by library."""
    fingerprint: str

    @property
    def complete(self) -> bool:
        """Whether every bucket is committed."""
        return len(self.buckets) == self.spec.buckets

    @property
    def rows(self) -> int:
        """Committed rows."""
        return int(self.spec.bucket_sizes(self.buckets).sum())

    def place(self, bucket: int) -> int | None:
        """Row of a bucket in the index; None if it is not committed."""
        i = int(np.searchsorted(self.buckets, bucket))
        return i if i < len(self.buckets) and self.buckets[i] == bucket else None

    def num_shards(self, array: ArraySpec) -> int:
        """Committed shards of an array."""
        return int((-(-self.spec.bucket_sizes(self.buckets) // array.shard_rows)).sum())

    def array_bytes(self, array: ArraySpec) -> int:
        """Bytes of an array's committed shards."""
        return stored_bytes(self.stored[array.name], self.num_shards(array), array.chunks_per_shard)

    def stored_bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(map(self.array_bytes, arrays(self.spec).values()))


def read_spec(storage: Storage) -> StoreSpec:
    """The spec of the store in `storage`, from its group; `StoreError` if there is none."""
    data = _get(storage, GROUP_KEY)
    if data is None:
        raise StoreError(
            f"no activation store at {storage.url}: it has no {GROUP_KEY}. Make one with: actstore capture"
        )
    return spec_from_bytes(data, f"{storage.url}/{GROUP_KEY}")


def _get(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key, METADATA_LIMIT)
    except MissingError:
        return None


def read_head(storage: Storage) -> manifest.Head | None:
    """The head of the manifest; None if there is none."""
    data = _get(storage, manifest.HEAD_KEY)
    return None if data is None else manifest.head_from_bytes(data, f"{storage.url}/{manifest.HEAD_KEY}")


def load(storage: Storage) -> Index:
    """The index: from the manifest if the store is finished; while it is extended, of the store as it was."""
    head = read_head(storage)
    return load_current(storage) if head is None else _finished(storage, head)


def load_current(storage: Storage) -> Index:
    """The index of the store as its group describes it now, an extension under way included."""
    head, spec = read_head(storage), read_spec(storage)  # in this order: the group is never behind the head
    if head is not None and head.spec == spec:
        return _finished(storage, head)
    if head is not None and not agrees(head.spec, spec):
        raise StoreError(
            f"{storage.url}: {manifest.HEAD_KEY} and {GROUP_KEY} describe different stores; see: actstore verify"
        )
    try:
        return load_as(storage, spec, committed(storage, spec))
    except StoreError:
        if read_spec(storage) == spec:
            raise
    return load_current(storage)  # its rows were fixed, or it was extended, after the group was read


def committed(storage: Storage, spec: StoreSpec) -> NDArray[np.int64]:
    """Committed buckets, ascending, from one listing."""
    return record.committed_buckets(storage.list(record.COMMITS), spec)


def agrees(known: StoreSpec, spec: StoreSpec) -> bool:
    """Whether `known` describes a finished store that has become `spec` by extensions."""
    buckets = np.arange(known.buckets)
    return (
        known.buckets <= spec.buckets
        and bool((known.bucket_sizes(buckets) == spec.bucket_sizes(buckets)).all())
        and extents_apart(known) == extents_apart(spec)
    )


def extents_apart(spec: StoreSpec) -> StoreSpec:
    """The spec without what may change: how many rows it has, and what it was extended with."""
    provenance = {k: v for k, v in spec.provenance.items() if k != EXTENSIONS}
    return replace(spec, rows=1, short_buckets=(), provenance=provenance)


def read_record(storage: Storage, spec: StoreSpec, bucket: int) -> CommitRecord:
    """The record of a committed bucket; `StoreError` if it is missing or an intent."""
    key = record.commit_key(bucket)
    found = record.from_bytes(storage.get(key, METADATA_LIMIT), spec, bucket)
    if not isinstance(found, CommitRecord):
        raise StoreError(f"{storage.url}/{key}: is an intent, expected the record of a committed bucket")
    return found


def read_records(storage: Storage, spec: StoreSpec, buckets: Iterable[int]) -> Iterator[CommitRecord]:
    """Records of committed buckets, one after another; a few are read ahead."""
    numbers = list(buckets)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-records") as pool:
        for start in range(0, len(numbers), 2 * _READERS):  # else a slow caller would hold them all
            yield from pool.map(lambda b: read_record(storage, spec, b), numbers[start : start + 2 * _READERS])


def read_part(storage: Storage, spec: StoreSpec, number: int) -> manifest.Part | None:
    """A part of the manifest; None if it is missing."""
    key = manifest.part_key(spec, number)
    data = _get(storage, key)
    return None if data is None else manifest.part_from_bytes(data, spec, number, f"{storage.url}/{key}")


class _Tables(Mapping[str, ArrayIndex]):
    """The arrays of an index, each put together when it is first asked for: most readers want one of many."""

    def __init__(self, spec: StoreSpec, parts: list[Callable[[ArraySpec], Chunks]]) -> None:
        """`parts` read the chunks of an array in consecutive buckets [buckets, chunks of a full bucket]."""
        self._parts, self._arrays = parts, arrays(spec)
        self._none = np.empty((0, spec.bucket_rows // spec.chunk_rows), np.uint32)
        self._loaded: dict[str, ArrayIndex] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> ArrayIndex:
        with self._lock:
            if name not in self._loaded:
                array = self._arrays[name]
                with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-tables") as pool:
                    found = list(pool.map(lambda part: part(array), self._parts))
                stored = np.concatenate([self._none, *(c.stored for c in found)])
                crcs = np.concatenate([self._none, *(c.crc32c for c in found)])
                self._loaded[name] = ArrayIndex(array=array, chunks=stored, crc32c=crcs)
            return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _table(storage: Storage, spec: StoreSpec, number: int, tables: Mapping[str, int], array: ArraySpec) -> Chunks:
    """The chunks of an array in a part of the manifest, given the crc32c of the part's tables."""
    key = manifest.table_key(array.name, number, tables[array.name])
    data = storage.get(key, manifest.TABLE_LIMIT)
    counts, width = (
        spec.chunk_counts(np.arange(*manifest.part_range(spec, number))),
        spec.bucket_rows // spec.chunk_rows,
    )
    return manifest.table_from_bytes(data, tables[array.name], array, counts, width, f"{storage.url}/{key}")


def _index(head: manifest.Head, buckets: NDArray[np.int64], parts: list[Callable[[ArraySpec], Chunks]]) -> Index:
    return Index(
        spec=head.spec,
        buckets=buckets,
        arrays=_Tables(head.spec, parts),
        stored=head.stored,
        calibration=head.calibration,
        stats=head.stats,
        versions=head.versions,
        fingerprint=head.fingerprint,
    )


def _finished(storage: Storage, head: manifest.Head) -> Index:
    tables = ({name: int(crcs[n]) for name, crcs in head.tables.items()} for n in range(manifest.num_parts(head.spec)))
    parts = [partial(_table, storage, head.spec, number, here) for number, here in enumerate(tables)]
    return _index(head, np.arange(head.spec.buckets), parts)


def load_as(storage: Storage, spec: StoreSpec, buckets: NDArray[np.int64]) -> Index:
    """The index of these committed buckets: from parts of the manifest where they exist, else commit records."""
    parts, builder = list[Callable[[ArraySpec], Chunks]](), manifest.HeadBuilder(spec)
    for number in np.unique(buckets // manifest.part_buckets(spec)).tolist():
        first, stop = manifest.part_range(spec, number)
        here = buckets[(buckets >= first) & (buckets < stop)]
        part = read_part(storage, spec, number) if len(here) == stop - first else None
        if part is None:
            records = manifest.PartBuilder(spec, number, here)
            for r in read_records(storage, spec, here.tolist()):
                records.add(r)
            part = records.part({})
            parts.append(records.chunks)
        else:
            parts.append(partial(_table, storage, spec, number, part.tables))
        builder.add(part)
    return _index(builder.head(buckets), buckets, parts)
