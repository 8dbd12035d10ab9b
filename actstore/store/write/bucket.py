"""Writing a store: create it, write buckets, finalise.

Any number of writers may work on one store without talking to each other. An attempt at a bucket begins by putting its
intent at the bucket's commit key, writes the shards under their final names, and commits by replacing its intent with
the record. Shards are put create-only, or over exactly the leftover that was there while the intent was still this
attempt's. So an attempt that was overtaken can neither commit nor change a shard any more, whenever it wakes up
(`docs/decisions/0005-commit.md` has the argument). Encoding and putting overlap in threads.
"""

import os
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import EncodingError, mismatch
from actstore.store.format import encoder, fixed, manifest, record, stats
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
from actstore.store.storage import LocalStorage, Storage, check_conditional_writes, open_storage
from actstore.store.write.attempt import Attempt, OvertakenError
from actstore.store.write.extend import change_spec

LOCAL_PUTS, REMOTE_PUTS = 2, 8
"""Shards that are being put while others are encoded; each has a buffer of its own."""


@dataclass
class WriteTimes:
    """Seconds of threads, summed over shards: what tells a slow encoder from a slow storage."""

    encode_s: float = 0.0
    put_s: float = 0.0


class Rows(Protocol):
    """Rows of one array, in memory or elsewhere: what `write_bucket` needs of a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, d] or [n]."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `write_bucket`."""
        ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """A run of rows."""
        ...


class StoreWriter:
    """Writes buckets of one store; make it with `create_store` or `open_writer`."""

    def __init__(self, storage: Storage, spec: StoreSpec, *, threads: int | None = None) -> None:
        """Write to `storage` as `spec` says, encoding in `threads` threads (default: one a core)."""
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
        """Buckets that are committed now."""
        return set(manifest.load_current(self.storage).buckets.tolist())

    def write_bucket(
        self, bucket: int, sites: Mapping[str, Rows], *, sequence: Rows, position: Rows, token_id: Rows
    ) -> record.CommitRecord | None:
        """`write_arrays` of sites and provenance."""
        data = {**sites, "sequence": sequence, "position": position, "token_id": token_id}
        return self.write_arrays(bucket, data)

    def write_arrays(
        self, bucket: int, data: Mapping[str, Rows], *, condemned: bool = False, times: WriteTimes | None = None
    ) -> record.CommitRecord | None:
        """Store a bucket and commit it.

        Every array is in stored order (see `permutation`): sites are [n, d], as bfloat16 bits (uint16) for `bf16`,
        float32 for `f32`, either for `fixed`; provenance is int32 [n]. Returns the record, or None if another attempt
        committed the bucket first or took it over. A `condemned` bucket is written again although it is committed.
        `times` is added to. `EncodingError` names the row whose value has no code.
        """
        first, stop = self.spec.bucket_range(bucket)
        self._check(data, stop - first)
        attempt = Attempt.begin(self.storage, self.spec, bucket, condemned=condemned)
        if attempt is None:
            return None
        calibrations = {name: self._calibration(name, bucket, data[name]) for name in self._fixed_sites()}
        try:
            shards, sums = self._write_shards(bucket, data, attempt, times or WriteTimes())
        except OvertakenError:
            return None
        made = record.CommitRecord(
            bucket=bucket,
            attempt=attempt.id,
            rows=stop - first,
            shards=shards,
            calibration={name: fixed.digest(fixed.to_bytes(c)) for name, c in calibrations.items()},
            stats=sums,
        )
        return made if attempt.commit(record.to_bytes(made)) else None

    def _check(self, data: Mapping[str, Rows], rows: int) -> None:
        if set(data) != set(self._arrays):
            raise ValueError(f"arrays are {sorted(data)}, the store has {sorted(self._arrays)}")
        for name, array in self._arrays.items():
            allowed = (np.dtype("<i4"),) if name in PROVENANCE_ARRAYS else RAW_DTYPES[self.spec.sites[name].kind]
            shape = (rows, *array.shape[1:])
            if data[name].shape != shape or data[name].dtype not in allowed:
                expected = " or ".join(f"{dtype}{shape}" for dtype in allowed)
                raise ValueError(f"{name} is {data[name].dtype}{data[name].shape}, expected {expected}")

    def _write_shards(
        self, bucket: int, data: Mapping[str, Rows], attempt: Attempt, times: WriteTimes
    ) -> tuple[dict[str, tuple[record.ShardRecord, ...]], dict[str, stats.Sums]]:
        """Encode in `threads` threads, put in others; what is encoded but not yet put is bounded."""
        first, stop = self.spec.bucket_range(bucket)
        buffers, failed = self._buffers, threading.Event()
        jobs: dict[str, list[Future[encoder.Encoded]]] = {name: [] for name in self._arrays}
        puts: list[Future[float]] = []
        encoding: list[float] = []

        def put(key: str, buffer: NDArray[np.uint8], size: int) -> float:
            began = time.perf_counter()
            try:
                attempt.put(key, [buffer[:size].data])
                return time.perf_counter() - began
            except BaseException:
                failed.set()
                raise
            finally:
                buffers.put(buffer)

        def encode(array: ArraySpec, start: int, buffer: NDArray[np.uint8]) -> encoder.Encoded:
            began = time.perf_counter()
            try:
                rows = data[array.name][start : start + array.shard_rows]
                made = self.encode(array, rows, bucket, start, buffer)
                encoding.append(time.perf_counter() - began)
            except BaseException:
                failed.set()
                buffers.put(buffer)
                raise
            puts.append(putters.submit(put, array.shard_key((first + start) // array.shard_rows), buffer, made.size))
            return made

        with ThreadPoolExecutor(self.puts, thread_name_prefix="actstore-put") as putters:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="actstore-encode") as encoders:
                for array in self._arrays.values():
                    for start in range(0, stop - first, array.shard_rows):
                        buffer = buffers.get()
                        if failed.is_set():
                            buffers.put(buffer)
                        else:
                            jobs[array.name].append(encoders.submit(encode, array, start, buffer))
            done = {name: [job.result() for job in found] for name, found in jobs.items()}
        times.put_s += sum(finished.result() for finished in puts)
        times.encode_s += sum(encoding)
        shards = {name: tuple(e.shard for e in found) for name, found in done.items()}
        return shards, {s: reduce(stats.add, [e.sums for e in done[s] if e.sums]) for s in self.spec.sites}

    @cached_property
    def _buffers(self) -> "queue.SimpleQueue[NDArray[np.uint8]]":
        """Memory for the shards in flight, kept from bucket to bucket."""
        size = max(encoder.buffer_bytes(array) for array in self._arrays.values())
        free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for _ in range(self.threads + self.puts):
            free.put(np.empty(size, np.uint8))
        return free

    def encode(
        self, array: ArraySpec, rows: NDArray[Any], bucket: int, start: int, out: NDArray[np.uint8]
    ) -> encoder.Encoded:
        """One shard of a bucket: rows from place `start` of it to the start of `out`, see `encode_shard`."""
        try:
            if array.name in PROVENANCE_ARRAYS:
                return encoder.encode_shard(array, rows, out)
            site = self.spec.sites[array.name]
            calibration = self._calibration(array.name, bucket, rows) if site.kind == "fixed" else None
            return encoder.encode_shard(array, rows, out, with_sums=True, calibration=calibration)
        except encoder.NotFiniteError as e:
            raise self._not_finite(array.name, bucket, start + e.row) from e

    def _not_finite(self, site: str, bucket: int, place: int) -> EncodingError:
        first, stop = self.spec.bucket_range(bucket)
        key = keyed.key(self.spec.seed, "bucket", bucket)
        row = first + int(keyed.invert(place, stop - first, key)[0])
        return EncodingError(
            f"row {row} of {site} holds NaN or infinity, which {self.spec.sites[site].encoding} can't store; leave the "
            "row out, or use encoding bf16 or f32"
        )

    def _fixed_sites(self) -> list[str]:
        return [name for name, site in self.spec.sites.items() if site.kind == "fixed"]

    def _calibration(self, site: str, bucket: int, rows: Rows) -> fixed.Calibration:
        """The site's calibration: as stored, else made from this bucket's rows and stored, once for all writers."""
        if site not in self._calibrations:
            key = calibration_key(site)
            if not self.storage.exists(key):
                parts: list[stats.Sums] = []
                for start in range(0, rows.shape[0], self.spec.chunk_rows):
                    part = np.ascontiguousarray(rows[start : start + self.spec.chunk_rows])
                    bad = fixed.first_not_finite(stats.as_bits(part))
                    if bad is not None:
                        raise self._not_finite(site, bucket, start + bad)
                    parts.append(stats.sums(part))
                sums, eps = reduce(stats.add, parts), self.spec.sites[site].eps
                made = fixed.calibrate(sums, eps, np.ascontiguousarray(rows[: fixed.CALIBRATION_ROWS]))
                self.storage.create(key, fixed.to_bytes(made))
            d = self.spec.sites[site].d
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

    def finalise(self) -> None:
        """Consolidate all commit records into a manifest, so that opening is one read; harmless to repeat."""
        manifest.consolidate(self.storage, self.spec)


def create_store(url: str | os.PathLike[str], spec: StoreSpec, *, threads: int | None = None) -> StoreWriter:
    """Create a store, or open it for more writing if it is there with exactly this spec.

    Raises `MismatchError` naming every field that differs, `StoreError` if something else lives at the URL or the
    object store has no conditional writes.
    """
    storage = open_storage(url)
    metadata = metadata_objects(spec)
    if not storage.exists(GROUP_KEY):
        # the group last: before it there is no store, and whoever creates it decides what the arrays are
        taken = [key for key, data in metadata.items() if not storage.create(key, data)]
        if storage.create(GROUP_KEY, group_metadata(spec)):
            for key in taken:
                storage.put(key, metadata[key])
    if (found := manifest.read_spec(storage)) != spec:
        raise mismatch(
            f"the store at {storage.url}",
            comparable(found),
            comparable(spec),
            remedy="Use the same settings to continue it, or another --out.",
        )
    check_conditional_writes(storage, GROUP_KEY)
    return StoreWriter(storage, spec, threads=threads)


def open_writer(url: str | os.PathLike[str], *, threads: int | None = None) -> StoreWriter:
    """Open an existing store for writing."""
    storage = open_storage(url)
    return StoreWriter(storage, manifest.read_spec(storage), threads=threads)
