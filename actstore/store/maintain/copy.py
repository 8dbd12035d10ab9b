"""Copying a store from one place to another, as it is or in another encoding or codec; the same call continues.

As it is means: identical chunks, each checked against its committed crc32c on the way, each bucket committed through
the protocol of `write/`, and equal fingerprints at the end. Another codec re-encodes the same elements, so
that values and statistics stay exactly what they were; another encoding decodes and writes values anew. Row order never
changes. At most `_WORKERS` shards are in memory (another encoding: what `write_arrays` holds, which is as bounded).

`move` deletes the source once everything at the destination has been read back, and only a finished source, which
nobody can be writing. It first marks the source as moved, which makes it unreadable in one step, and deletes the mark
last: an interrupted move leaves no store that looks whole, and the same call finishes it.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from msgspec import structs

from actstore.errors import IntegrityError, StoreError
from actstore.progress import Progress
from actstore.store.format import codec as codecs
from actstore.store.format import fixed, record, shard
from actstore.store.format.spec import (
    GROUP_KEY,
    OPEN_ENDED,
    PROVENANCE_ARRAYS,
    RAW_DTYPES,
    ArraySpec,
    SiteSpec,
    StoreSpec,
    arrays,
    calibration_key,
)
from actstore.store.maintain.move import move_away, moving, remove
from actstore.store.read.index import read_record, read_spec
from actstore.store.read.store import Store, open_store
from actstore.store.read.values import BucketRows, Values
from actstore.store.storage import LocalStorage, Storage, open_storage
from actstore.store.write import protocol
from actstore.store.write.bucket import StoreWriter, create_store
from actstore.store.write.protocol import Attempt, NotWritten

_WORKERS = 4
"""Shards in flight."""
_TOKENS = "tokens"
_ALIASES = {"s3a": "s3", "gcs": "gs"}


@dataclass(frozen=True, kw_only=True)
class CopySummary:
    """What a copy did."""

    buckets: int
    """Committed at the destination."""
    planned_buckets: int | None
    """None if the store is open-ended."""
    buckets_copied: int
    """By this run."""
    bytes_copied: int
    """Read from the source by this run."""
    fingerprint: str
    """Of the destination."""
    moved: bool
    left: list[str] = field(default_factory=list[str])
    """What a move left at the source because it is not the store's."""
    seconds: float


def copy(
    source: str | Path,
    destination: str | Path,
    *,
    encoding: str | None = None,
    codec: codecs.CodecName | None = None,
    move: bool = False,
    progress: Progress | None = None,
) -> CopySummary:
    """Copy the committed buckets, calibrations and tokens of a store; run it again to continue.

    `encoding` applies to all sites. An unfinished source is copied as far as it is, and continued by the next call; in
    another encoding or codec only if no bucket was committed since the first one, because the copy names its source by
    fingerprint. With another encoding, saturated values that stay in the same `fixed` encoding are not counted again.

    Raises `MismatchError` if the destination is another store, `IntegrityError` naming the first damaged chunk, whose
    bucket is not committed.
    """
    began, progress = time.monotonic(), progress or Progress()
    storage = open_storage(source)
    _check_apart(storage, open_storage(destination))
    if (moved := moving(storage)) is not None:
        return _finish_move(storage, destination, moved, began, move=move)
    store = open_store(source)
    if move and not (store.complete and read_spec(storage) == store.spec):
        raise StoreError(f"{store.url} is unfinished and may still be written; finish it, or copy it without --move")
    writer = _open_destination(destination, _target(store, encoding, codec))
    buckets, done = _Copy(store, writer, progress).run()
    copied = open_store(destination)
    _check_equal(store, copied)
    left = move_away(store, copied, progress) if move else []
    return _summary(copied, began, buckets_copied=buckets, bytes_copied=done, moved=move, left=left)


def _summary(
    copied: Store, began: float, *, buckets_copied: int, bytes_copied: int, moved: bool, left: list[str]
) -> CopySummary:
    return CopySummary(
        buckets=len(copied.index.buckets),
        planned_buckets=None if copied.spec.rows == OPEN_ENDED else copied.spec.buckets,
        buckets_copied=buckets_copied,
        bytes_copied=bytes_copied,
        fingerprint=copied.fingerprint,
        moved=moved,
        left=left,
        seconds=time.monotonic() - began,
    )


def _finish_move(storage: Storage, destination: str | Path, moved: str, began: float, *, move: bool) -> CopySummary:
    """Delete what an interrupted move left, if the destination is where it went."""
    copied = open_store(destination)
    origin = copied.provenance.get("copied_from")
    same = copied.fingerprint == moved or (isinstance(origin, dict) and origin.get("fingerprint") == moved)
    if not (move and same and copied.complete):
        raise StoreError(
            f"{storage.url} is what an interrupted move left of the store {moved}; finish it with the same command"
        )
    left = remove(storage, copied.spec)
    return _summary(copied, began, buckets_copied=0, bytes_copied=0, moved=True, left=left)


def _check_apart(source: Storage, destination: Storage) -> None:
    a, b = _place(source), _place(destination)
    if a == b[: len(a)] or b == a[: len(b)]:
        raise ValueError(f"{source.url} and {destination.url} are the same place, or one is inside the other")


def _place(storage: Storage) -> tuple[str, ...]:
    """Scheme and path, one part each, spelled in one way."""
    if isinstance(storage, LocalStorage):
        return ("file", *storage.root.resolve().parts)
    scheme, _, rest = storage.url.partition("://")
    if scheme == "local":
        return ("file", *Path(rest).resolve().parts)
    return (_ALIASES.get(scheme, scheme), *(p for p in rest.split("/") if p))


def _target(store: Store, encoding: str | None, codec: codecs.CodecName | None) -> StoreSpec:
    """The destination's spec: the source's own, or one that says what it was copied from."""
    sites = {n: SiteSpec(d=s.d, encoding=encoding or s.encoding) for n, s in store.sites.items()}
    spec = replace(store.spec, sites=sites, codec=codec or store.spec.codec)
    if spec == store.spec:
        return spec
    origin = {"fingerprint": store.fingerprint, "encoding": {n: s.encoding for n, s in store.sites.items()}}
    if "copied_from" in store.provenance:
        origin["copied_from"] = store.provenance["copied_from"]
    return replace(spec, provenance={**store.provenance, "copied_from": origin})


def _open_destination(url: str | Path, spec: StoreSpec) -> StoreWriter:
    """Create the destination, or continue one that was begun before an open-ended source got its number of rows."""
    storage = open_storage(url)
    if storage.exists(GROUP_KEY):
        found = read_spec(storage)
        if found.rows > spec.rows and replace(found, rows=spec.rows) == spec:
            StoreWriter(storage, found).fix_rows(spec.rows)
    return create_store(url, spec)


def _check_equal(source: Store, copied: Store) -> None:
    missing = sorted(set(source.index.buckets.tolist()) - set(copied.index.buckets.tolist()))
    if missing:
        raise StoreError(f"{copied.url}: somebody else is writing bucket {missing[0]}; copy again when he is done")
    if copied.spec == source.spec and copied.fingerprint != source.fingerprint:
        raise StoreError(
            f"{copied.url} has fingerprint {copied.fingerprint}, {source.url} has {source.fingerprint}: there are "
            "buckets in it that are not the source's; copy to an empty place"
        )


class _Copy:
    """One run: what is missing at the destination, bucket by bucket."""

    def __init__(self, source: Store, writer: StoreWriter, progress: Progress) -> None:
        self.source, self.writer, self.destination = source, writer, writer.storage
        self.same_encodings = source.sites == writer.spec.sites
        self.arrays = arrays(writer.spec)
        self.tokens = source.storage.list(_TOKENS)
        total = source.stored_bytes + sum(self.tokens.values())
        self.step = progress.step("copy", total=total, unit="B")
        self.done = 0

    def run(self) -> tuple[int, int]:
        """Copy; returns how many buckets and bytes this run copied."""
        self._calibrations()
        there, copied = self.writer.committed(), 0
        for place, bucket in enumerate(self.source.index.buckets.tolist()):
            if bucket in there:
                self.step.skip(_bucket_bytes(self.source, place))
            elif self.same_encodings:
                copied += self._bucket(bucket)
            else:
                copied += self._encode(place, bucket)
        self._tokens()
        self.writer.finalise()
        return copied, self.done

    def _advance(self, size: int) -> None:
        self.done += size
        self.step.advance(size)

    def _calibrations(self) -> None:
        """Those of sites that stay in their encoding; of others from the statistics of all rows, not of a sample."""
        for site, made in self.writer.spec.sites.items():
            if made.kind == "fixed" and made != self.source.sites[site] and self.source.rows:
                sums = self.source.index.stats[site]
                if not sums.nonfinite:  # else the writer names the row
                    sample = BucketRows(self._values(site), self.source, site, 0)[: fixed.CALIBRATION_ROWS]
                    calibration = fixed.calibrate(sums, made.eps, sample)
                    self.destination.create(calibration_key(site), fixed.to_bytes(calibration))
        for site, crc in self.source.index.calibration.items():
            if self.writer.spec.sites[site] != self.source.sites[site]:
                continue
            key, d = calibration_key(site), self.source.sites[site].d
            data = self.source.storage.get(key, 16 * d)
            fixed.from_bytes(data, d, f"{self.source.url}/{key}")
            if fixed.digest(data) != crc:
                raise IntegrityError(f"{self.source.url}/{key}: is not the calibration that {site} was written with")
            if not self.destination.create(key, data) and self.destination.get(key, 16 * d) != data:
                raise StoreError(f"{self.destination.url}/{key} is another calibration; copy to an empty place")

    def _bucket(self, bucket: int) -> bool:
        """Copy shards one by one; False if another copy was at the bucket."""
        committed = read_record(self.source.storage, self.source.spec, bucket)
        attempt = protocol.run(self.destination, protocol.begin(bucket, protocol.new_id()))
        if isinstance(attempt, NotWritten):
            return False
        jobs = [
            (name, i) for name in self.arrays for i in range(len(record.shard_chunks(self.arrays[name], committed)))
        ]

        def put(job: tuple[str, int]) -> tuple[int, record.Chunks]:
            key, size, pieces, made = self._shard(*job, committed, attempt)
            if not protocol.run(self.destination, protocol.put(attempt, key, pieces)):
                raise _TakenOverError
            return size, made

        made: dict[str, list[record.Chunks]] = {name: [] for name in self.arrays}
        try:
            with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-copy") as pool:
                for (name, _), (size, one) in zip(jobs, pool.map(put, jobs), strict=True):
                    made[name].append(one)
                    self._advance(size)
        except _TakenOverError:
            return False
        chunks = {name: _joined(found) for name, found in made.items()}
        data = record.to_bytes(structs.replace(committed, attempt=attempt.id, arrays=chunks))
        return protocol.run(self.destination, protocol.commit(attempt, data))

    def _shard(
        self, name: str, i: int, committed: record.CommitRecord, attempt: Attempt
    ) -> tuple[str, int, list[bytes | memoryview], record.Chunks]:
        """Name, bytes at the source, and pieces of a checked shard in the destination's codec, with its chunks."""
        store, array = self.source, self.source.index.arrays[name].array
        expected = record.shard_chunks(array, committed)[i]
        key = array.shard_key(committed.bucket * store.spec.bucket_rows // array.shard_rows + i)
        size = int(expected.stored.sum(dtype=np.int64)) + shard.tail_bytes(array.chunks_per_shard)
        pieces: list[bytes | memoryview] = []
        pieces += _checked_chunks(store.storage.get_range(key, 0, size), expected, array, f"{store.url}/{key}")
        if self.writer.spec.codec != array.codec:
            pieces = _recode(pieces, expected, array, self.arrays[name], f"{store.url}/{key}")
        made = record.Chunks(
            stored=np.array(list(map(len, pieces)), np.uint32),
            crc32c=np.array([int.from_bytes(p[-codecs.CRC_BYTES :], "little") for p in pieces], np.uint32),
        )
        tail = shard.tail(made.stored.tolist(), array.chunks_per_shard, attempt.id)
        return key, size, [*pieces, tail], made

    def _encode(self, place: int, bucket: int) -> bool:
        """Write a bucket's values in other encodings; False if somebody else was at the bucket."""
        rows = {name: BucketRows(self._values(name), self.source, name, place) for name in self.arrays}
        made = self.writer.write_arrays(bucket, rows)
        self._advance(_bucket_bytes(self.source, place))
        return not isinstance(made, NotWritten)

    def _values(self, name: str) -> Values:
        if name in PROVENANCE_ARRAYS:
            return Values(self.source, name)
        allowed = RAW_DTYPES[self.writer.spec.sites[name].kind]
        return Values(self.source, name, allowed[0] if len(allowed) == 1 else None)

    def _tokens(self) -> None:
        """Everything of the token table, its group last; what is there already must be the same."""
        group = f"{_TOKENS}/{GROUP_KEY}"
        there = self.destination.list(_TOKENS)

        def put(key: str) -> int:
            size = self.tokens[key]
            if there.get(key) != size or key == group:
                data = self.source.storage.get(key)
                if not self.destination.create(key, data) and (
                    self.destination.size(key) != size or (key == group and self.destination.get(key) != data)
                ):
                    raise StoreError(f"{self.destination.url}/{key} is of another token table; copy to an empty place")
            return size

        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-copy") as pool:
            for size in pool.map(put, [key for key in self.tokens if key != group]):
                self._advance(size)
        if group in self.tokens:
            self._advance(put(group))
        there = self.destination.list(_TOKENS)
        for key, size in self.tokens.items():
            if there.get(key) != size:
                raise StoreError(f"{self.destination.url}/{key} has {there.get(key)} bytes, expected {size}")


def _joined(shards: list[record.Chunks]) -> record.Chunks:
    stored, crcs = (np.concatenate([getattr(c, name) for c in shards]) for name in ("stored", "crc32c"))
    return record.Chunks(stored=stored, crc32c=crcs)


class _TakenOverError(Exception):
    """Another copy has taken the bucket over."""


def _bucket_bytes(store: Store, place: int) -> int:
    """Stored bytes of a bucket."""
    total = 0
    for a in store.index.arrays.values():
        shards = int(np.count_nonzero(a.chunks[place, :: a.array.chunks_per_shard]))
        total += int(a.chunks[place].sum(dtype=np.int64)) + shards * shard.tail_bytes(a.array.chunks_per_shard)
    return total


def _checked_chunks(data: bytes | memoryview, expected: record.Chunks, array: ArraySpec, what: str) -> list[memoryview]:
    """The chunks of a shard, each with the crc32c it was committed with; its index is checked too."""
    view, chunks, offset = memoryview(data), list[memoryview](), 0
    for length, crc in zip(expected.stored.tolist(), expected.crc32c.tolist(), strict=True):
        chunk = view[offset : offset + length]
        where = f"{what} chunk at byte {offset}"
        codecs.check_crc(chunk[: -codecs.CRC_BYTES], chunk[-codecs.CRC_BYTES :], where, committed=crc)
        chunks.append(chunk)
        offset += length
    shard.check_tail(bytes(view[offset:]), expected.stored.tolist(), array.chunks_per_shard, what)
    return chunks


def _recode(
    chunks: list[bytes | memoryview], expected: record.Chunks, old: ArraySpec, new: ArraySpec, what: str
) -> list[bytes | memoryview]:
    """The same elements in another codec: each chunk as it is stored."""
    decoded, pieces, offset = np.empty(old.chunk_bytes, np.uint8), list[bytes | memoryview](), 0
    for chunk, crc in zip(chunks, expected.crc32c.tolist(), strict=True):
        codecs.decode_into(chunk, old.codec, decoded, f"{what} chunk at byte {offset}", committed=crc)
        elements = codecs.merge(decoded, old.codec, np.dtype(f"<u{old.dtype.itemsize}"))
        pieces.append(codecs.encode(elements, new.codec))
        offset += len(chunk)
    return pieces
