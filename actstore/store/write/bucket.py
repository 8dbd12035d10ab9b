"""Writing buckets: encode the shards in threads, put them, commit.

Any number of writers may work on one store without talking to each other; `write/protocol.py` says how. Encoding and
putting overlap in threads.

A `fixed` site is calibrated on the first bucket that is written, so later values may lie outside its codes. They are
clipped and counted. A bucket whose clipping alone adds more FVU than the encoding promised is refused before it is
committed: below that the added FVU stays under twice what was asked for, above it the store would not be what it says.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, TypeVar

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import EncodingError, StoreError, mismatch
from actstore.store.format import encoder, fixed, manifest, record, stats
from actstore.store.format.record import CommitRecord
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.spec import (
    GROUP_KEY,
    PROVENANCE_ARRAYS,
    RAW_DTYPES,
    ArraySpec,
    StoreSpec,
    arrays,
    calibration_key,
    comparable,
    group_metadata,
    metadata_objects,
)
from actstore.store.read.index import committed, read_spec
from actstore.store.read.values import Rows
from actstore.store.storage import LocalStorage, Storage, check_conditional_writes, open_storage
from actstore.store.storage.base import Buffers
from actstore.store.write import protocol
from actstore.store.write.extend import change_spec, write_metadata
from actstore.store.write.finalise import finalise
from actstore.store.write.protocol import Attempt, NotWritten, Steps

LOCAL_PUTS, REMOTE_PUTS = 2, 8
"""Shards that are being put while others are encoded; each has a buffer of its own."""
_LISTERS = 16

Job = TypeVar("Job")
Put = Callable[[str, Buffers], None]
"""Puts a shard, by key and content, for the attempt that holds the bucket."""


class _TakenOverError(Exception):
    """Another attempt has taken the bucket over."""


def write_shards(
    storage: Storage,
    steps: Steps[Attempt | NotWritten],
    jobs: Mapping[str, Sequence[Job]],
    store: Callable[[str, Job, str, Put], encoder.Encoded],
    describe: Callable[[str, dict[str, list[encoder.Encoded]]], CommitRecord],
    *,
    workers: int,
) -> CommitRecord | NotWritten:
    """One attempt at a bucket, from its first `steps` to its record; `jobs` are its shards, by array.

    `store(array, job, attempt id, put)` makes and puts one shard, in `workers` threads at once; `describe(attempt id,
    what store returned, by array)` is the record.
    """
    attempt = protocol.run(storage, steps)
    if isinstance(attempt, NotWritten):
        return attempt

    def put(key: str, data: Buffers) -> None:
        if not protocol.run(storage, protocol.put(attempt, key, data)):
            raise _TakenOverError

    shards = [(name, job) for name, listed in jobs.items() for job in listed]
    stored: dict[str, list[encoder.Encoded]] = {name: [] for name in jobs}
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="actstore-shards") as pool:
            made = pool.map(lambda s: store(s[0], s[1], attempt.id, put), shards)  # an error cancels what is left
            for (name, _), one in zip(shards, made, strict=True):
                stored[name].append(one)
    except _TakenOverError:
        return NotWritten.TAKEN_OVER
    committed = describe(attempt.id, stored)
    done = protocol.run(storage, protocol.commit(attempt, record.to_bytes(committed)))
    return committed if done else NotWritten.TAKEN_OVER


@dataclass
class WriteTimes:
    """Seconds of threads, summed over shards: what tells a slow encoder from a slow storage."""

    encode_s: float = 0.0
    put_s: float = 0.0


class StoreWriter:
    """Writes buckets of one store; make it with `create_store` or `open_writer`."""

    def __init__(
        self,
        storage: Storage,
        spec: StoreSpec,
        *,
        threads: int | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Write to `storage` as `spec` says, encoding in `threads` threads (default: one for each core).

        Every commit record keeps `versions`, those of the libraries that computed the rows.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, expected 1 or more")
        self.versions = dict(versions or {})
        self.storage = storage
        self.spec = spec
        self.threads = threads or os.cpu_count() or 1
        self._arrays = arrays(spec)
        self._calibrations: dict[str, fixed.Calibration] = {}
        self.puts = LOCAL_PUTS if isinstance(storage, LocalStorage) else REMOTE_PUTS

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
        """Buckets that are committed now; one listing."""
        return set(committed(self.storage, self.spec).tolist())

    def is_committed(self, bucket: int) -> bool:
        """Whether a bucket is committed now; one request."""
        seen = self.storage.stat(record.commit_key(bucket))
        return seen is not None and seen.size > record.INTENT_BYTES

    def write_arrays(
        self,
        bucket: int,
        data: Mapping[str, Rows],
        *,
        condemned: str | None = None,
        times: WriteTimes | None = None,
    ) -> CommitRecord | NotWritten:
        """Store a bucket and commit it; returns its record, or why it was not committed.

        Every array is in stored order (see `permutation`): sites are [n, d], as bfloat16 bits (uint16) for `bf16`,
        float32 for `f32`, either for `fixed`; `sequence`, `position` and `token_id` are int32 [n]. `times` is added to.

        A committed bucket is written again if its commit object still has the version `condemned`. Raises
        `EncodingError` for a value that has no code, and for values that `fixed` would clip beyond what it promises.
        """
        first, stop = self.spec.bucket_range(bucket)
        self._check(data, stop - first)
        attempt_id = protocol.new_id()
        steps = (
            protocol.begin(bucket, attempt_id)
            if condemned is None
            else protocol.take_over(bucket, attempt_id, condemned)
        )
        encoding, seconds = threading.Semaphore(self.threads), list[tuple[float, float]]()

        def store(name: str, start: int, attempt: str, put: Put) -> encoder.Encoded:
            array, buffer = self._arrays[name], self._buffers.get()
            try:
                with encoding:
                    began = time.perf_counter()
                    rows = data[name][start : start + array.shard_rows]
                    made = self.encode(array, rows, bucket, start, buffer, attempt)
                    encoded = time.perf_counter()
                put(array.shard_key((first + start) // array.shard_rows), [buffer[: made.size].data])
            finally:
                self._buffers.put(buffer)
            seconds.append((encoded - began, time.perf_counter() - encoded))
            return made

        def describe(attempt: str, shards: dict[str, list[encoder.Encoded]]) -> CommitRecord:
            sums = {s: self._sums(bucket, [e.sums for e in shards[s] if e.sums]) for s in self.spec.sites}
            self._check_clipping(bucket, sums)
            return CommitRecord(
                bucket=bucket,
                attempt=attempt,
                rows=stop - first,
                arrays={name: encoder.chunks(found) for name, found in shards.items()},
                calibration={name: fixed.digest(fixed.to_bytes(c)) for name, c in self._calibrations.items()},
                stats=sums,
                versions=self.versions,
            )

        for name in self._fixed_sites():
            self._calibration(name, bucket, data[name])
        jobs = {name: range(0, stop - first, array.shard_rows) for name, array in self._arrays.items()}
        made = write_shards(self.storage, steps, jobs, store, describe, workers=self.threads + self.puts)
        if times:
            times.encode_s += sum(s for s, _ in seconds)
            times.put_s += sum(s for _, s in seconds)
        return made

    def _check_clipping(self, bucket: int, sums: Mapping[str, stats.Sums]) -> None:
        for site in self._fixed_sites():
            added, eps = sums[site].clipped_fvu(), self.spec.sites[site].eps
            if added > eps:
                raise EncodingError(
                    f"bucket {bucket} of {site}: {sums[site].saturated} values lie outside the range of "
                    f"{self.spec.sites[site].encoding}, which the first bucket set; clipping them would add an FVU of "
                    f"{added:.2g}. Use bf16, a larger EPS or larger buckets; or store bf16 and re-encode the store "
                    "with actstore cp, which takes the range of all rows"
                )

    def _check(self, data: Mapping[str, Rows], rows: int) -> None:
        if set(data) != set(self._arrays):
            raise ValueError(f"arrays are {sorted(data)}, the store has {sorted(self._arrays)}")
        for name, array in self._arrays.items():
            allowed = (np.dtype("<i4"),) if name in PROVENANCE_ARRAYS else RAW_DTYPES[self.spec.sites[name].kind]
            shape = (rows, *array.shape[1:])
            if data[name].shape != shape or data[name].dtype not in allowed:
                expected = " or ".join(f"{dtype}{shape}" for dtype in allowed)
                raise ValueError(f"{name} is {data[name].dtype}{data[name].shape}, expected {expected}")

    def _sums(self, bucket: int, parts: list[stats.Sums]) -> stats.Sums:
        """A site's sums over a bucket, from those of its shards in order; rows are named by their row number."""
        found = reduce(stats.add, parts)
        rows = self._row_numbers(bucket, np.array(found.nonfinite_rows, np.int64))
        return structs.replace(found, nonfinite_rows=tuple(sorted(rows.tolist())))

    def _row_numbers(self, bucket: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of stored places of a bucket."""
        first, stop = self.spec.bucket_range(bucket)
        return first + keyed.invert(places, stop - first, keyed.key(self.spec.seed, "bucket", bucket))

    @cached_property
    def _buffers(self) -> "queue.SimpleQueue[NDArray[np.uint8]]":
        """Memory for the shards in flight, kept from bucket to bucket."""
        size = max(encoder.buffer_bytes(array) for array in self._arrays.values())
        free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for _ in range(self.threads + self.puts):
            free.put(np.empty(size, np.uint8))
        return free

    def encode(
        self, array: ArraySpec, rows: NDArray[Any], bucket: int, start: int, out: NDArray[np.uint8], attempt: str
    ) -> encoder.Encoded:
        """One shard of a bucket: rows from place `start` of it to the start of `out`, see `encode_shard`."""
        try:
            is_fixed, is_site = array.name in self._fixed_sites(), array.name in self.spec.sites
            calibration = self._calibration(array.name, bucket, rows) if is_fixed else None
            return encoder.encode_shard(array, rows, out, attempt, with_sums=is_site, calibration=calibration)
        except encoder.NotFiniteError as e:
            raise self._not_finite(array.name, bucket, start + e.row) from e

    def _not_finite(self, site: str, bucket: int, place: int) -> EncodingError:
        row = int(self._row_numbers(bucket, np.array([place]))[0])
        return EncodingError(
            f"row {row} of {site} holds NaN or infinity, which {self.spec.sites[site].encoding} can't store; leave the "
            "row out, or use encoding bf16 or f32"
        )

    def _fixed_sites(self) -> list[str]:
        return [name for name, site in self.spec.sites.items() if site.kind == "fixed"]

    def _calibration(self, site: str, bucket: int, rows: Rows) -> fixed.Calibration:
        """The site's calibration: as stored, else made from this bucket's rows and stored, once for all writers."""
        if site not in self._calibrations:
            key, d, eps = calibration_key(site), self.spec.sites[site].d, self.spec.sites[site].eps
            if not self.storage.exists(key):
                parts: list[stats.Sums] = []
                for start in range(0, rows.shape[0], self.spec.chunk_rows):
                    part = np.ascontiguousarray(rows[start : start + self.spec.chunk_rows])
                    bad = fixed.first_not_finite(stats.as_bits(part))
                    if bad is not None:
                        raise self._not_finite(site, bucket, start + bad)
                    parts.append(stats.sums(part))
                sample = np.ascontiguousarray(rows[: fixed.CALIBRATION_ROWS])
                self.storage.create(key, fixed.to_bytes(fixed.calibrate(reduce(stats.add, parts), eps, sample)))
            self._calibrations[site] = fixed.from_bytes(self.storage.get(key, 16 * d), d, f"{self.url}/{key}")
        return self._calibrations[site]

    def fix_rows(self, rows: int) -> None:
        """Set the final number of rows of a store that was created open-ended, or with more than it got.

        Committed buckets stay as they are, so `rows` can't be less than they hold. Harmless to repeat.
        """
        spec = replace(self.spec, rows=rows)
        committed = self.committed()
        last = max(committed, default=-1)
        if rows > self.spec.rows or (last >= 0 and rows < self.spec.bucket_range(last)[1]):
            raise ValueError(f"rows is {rows}, but {self.spec.rows} are planned and buckets up to {last} are committed")

        def changed(found: StoreSpec) -> StoreSpec:
            if found not in (self.spec, spec):
                raise mismatch(f"the store at {self.url}", comparable(found), comparable(self.spec), "Open it again.")
            return spec

        self.spec = change_spec(self.storage, changed)
        self._arrays = arrays(self.spec)

    def finalise(self, *, rewritten: frozenset[int] = frozenset()) -> bool:
        """Consolidate the commit records, so that opening is one read; harmless to repeat.

        Returns whether the store is complete. `rewritten` buckets were committed anew since they were consolidated.
        """
        return finalise(self.storage, self.spec, rewritten=rewritten)


def remarks(made: CommitRecord) -> list[str]:
    """What a user should know of a bucket that was written, a line each."""
    return [line for site, s in made.stats.items() for line in s.remarks(f"bucket {made.bucket} of {site}")]


def create_store(url: str | os.PathLike[str], spec: StoreSpec, *, threads: int | None = None) -> StoreWriter:
    """Create a store, or open it for more writing if it is there with exactly this spec.

    Raises `MismatchError` naming every field that differs, `StoreError` if something else lives at the URL or the
    object store has no conditional writes.
    """
    storage = open_storage(url)
    writer = StoreWriter(storage, spec, threads=threads)
    check_conditional_writes(storage, GROUP_KEY)
    if not storage.exists(GROUP_KEY):
        _begin_store(storage, spec)
    if (found := read_spec(storage)) != spec:
        raise mismatch(
            f"the store at {storage.url}",
            comparable(found),
            comparable(spec),
            remedy="Use the same settings to continue it, or another place.",
        )
    write_metadata(storage)
    return writer


def _begin_store(storage: Storage, spec: StoreSpec) -> None:
    """Write all metadata, the group last: it decides, should several create a store here at once.

    Objects of someone else that have the names of the store's are refused: they would be written over. A store that
    was begun, or has lost its group, has all its array metadata, unchanged.
    """
    metadata = metadata_objects(spec)
    names = [*arrays(spec), record.COMMITS, manifest.MANIFEST, "calibration", "tokens"]
    with ThreadPoolExecutor(_LISTERS, thread_name_prefix="actstore-list") as pool:
        there = {key for found in pool.map(storage.list, names) for key in found}
    foreign = [key for key, data in metadata.items() if key in there and storage.get(key, METADATA_LIMIT) != data]
    if metadata.keys() - there:
        foreign += sorted(there - metadata.keys())
    if foreign and not storage.exists(GROUP_KEY):  # else another writer has created the store meanwhile
        raise StoreError(f"{storage.url}: {foreign[0]} is there and of no store; delete it, or choose an empty place")
    for key, data in metadata.items():
        storage.create(key, data)
    storage.create(GROUP_KEY, group_metadata(spec))


def open_writer(
    url: str | os.PathLike[str], *, threads: int | None = None, versions: Mapping[str, str] | None = None
) -> StoreWriter:
    """Open an existing store for writing; `versions` as in `StoreWriter`."""
    storage = open_storage(url)
    return StoreWriter(storage, read_spec(storage), threads=threads, versions=versions)
