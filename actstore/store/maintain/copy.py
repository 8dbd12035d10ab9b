"""Copying a store from one place to another, as it is or in another encoding or codec; the same call continues.

As it is means: identical chunks, each checked against its committed crc32c on the way, each bucket committed through
the protocol of `write/`, and equal fingerprints at the end. Another codec re-encodes the same elements, so
that values and statistics stay exactly what they were; another encoding decodes and writes values anew. Row order never
changes. At most `_WORKERS` shards are in memory (another encoding: what `write_arrays` holds, which is as bounded).

`move` deletes the source once everything at the destination has been read back, and only a finished source, which
nobody can be writing. It first marks the source as moved, which makes it unreadable in one step, and deletes the mark
last: an interrupted move leaves no store that looks whole, and the same call finishes it.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from msgspec import structs

from actstore.errors import StoreError
from actstore.progress import Progress
from actstore.store.format import codec as codecs
from actstore.store.format import fixed, record
from actstore.store.format.encoder import Encoded, chunks
from actstore.store.format.shard import tail
from actstore.store.format.spec import (
    GROUP_KEY,
    OPEN_ENDED,
    PROVENANCE_ARRAYS,
    RAW_DTYPES,
    SiteSpec,
    StoreSpec,
    arrays,
    calibration_key,
)
from actstore.store.maintain.move import move_away, moving, remove
from actstore.store.maintain.shards import Shard, shards
from actstore.store.read.index import read_record, read_spec
from actstore.store.read.store import Store, open_store
from actstore.store.read.values import BucketRows, Values
from actstore.store.storage import LocalStorage, Storage, open_storage
from actstore.store.write import protocol
from actstore.store.write.bucket import Put, StoreWriter, create_store, write_shards
from actstore.store.write.protocol import NotWritten

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
    nonfinite: int
    """Rows with NaN or infinity at the destination, over all sites: its encoding may have a smaller range."""
    saturated: int
    """Values at the destination that `fixed` has clipped."""
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
        nonfinite=sum(s.nonfinite for s in copied.index.stats.values()),
        saturated=sum(s.saturated for s in copied.index.stats.values()),
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
        self.tokens = source.storage.list(_TOKENS)
        total = source.stored_bytes + sum(self.tokens.values())
        self.step = progress.step("copy", total=total, unit="B")
        self.done, self.counting = 0, threading.Lock()

    def run(self) -> tuple[int, int]:
        """Copy; returns how many buckets and bytes this run copied."""
        self._calibrations()
        there, copied = self.writer.committed(), 0
        buckets = self.source.index.buckets
        skipped = int(self.source.spec.bucket_sizes(buckets[np.isin(buckets, list(there))]).sum())
        self.step.skip(self.source.stored_bytes * skipped // max(self.source.rows, 1))
        for place, bucket in enumerate(buckets.tolist()):
            if bucket not in there:
                copied += self._bucket(bucket) if self.same_encodings else self._encode(place, bucket)
        self.step.skip(self.source.stored_bytes - self.step.done)  # what was there is known by its rows only
        self._tokens()
        self.writer.finalise()
        return copied, self.done

    def _advance(self, size: int) -> None:
        with self.counting:
            self.done += size
            self.step.advance(size)

    def _calibrations(self) -> None:
        """Those of sites that stay in their encoding; of others from the statistics of all rows, not of a sample."""
        for site, made in self.writer.spec.sites.items():
            key = calibration_key(site)
            if made.kind != "fixed" or not self.source.rows:
                continue
            if made == self.source.sites[site]:
                data = fixed.to_bytes(self.source.calibration(site))
                if not self.destination.create(key, data) and self.destination.get(key, len(data)) != data:
                    raise StoreError(f"{self.destination.url}/{key} is another calibration; copy to an empty place")
            elif self.destination.exists(key):
                continue
            elif not (sums := self.source.index.stats[site]).nonfinite:  # else the writer names the row
                sample = BucketRows(self._values(site), self.source, site, 0)[: fixed.CALIBRATION_ROWS]
                self.destination.create(key, fixed.to_bytes(fixed.calibrate(sums, made.eps, sample)))

    def _bucket(self, bucket: int) -> bool:
        """Copy shards one by one; False if another copy was at the bucket."""
        committed = read_record(self.source.storage, self.source.spec, bucket)
        jobs: dict[str, list[Shard]] = {name: [] for name in committed.arrays}
        for shard in shards(self.source.spec, committed):
            jobs[shard.array.name].append(shard)

        def describe(attempt: str, stored: dict[str, list[Encoded]]) -> record.CommitRecord:
            arrays = {name: chunks(found) for name, found in stored.items()}
            return structs.replace(committed, attempt=attempt, arrays=arrays)

        begin = protocol.begin(bucket, protocol.new_id())
        made = write_shards(self.destination, begin, jobs, self._shard, describe, workers=_WORKERS)
        return not isinstance(made, NotWritten)

    def _shard(self, _: str, shard: Shard, attempt: str, put: Put) -> Encoded:
        """Check a shard, and put it in the destination's codec."""
        data = memoryview(self.source.storage.get_range(shard.key, 0, shard.size))
        old, new, pieces = shard.array, self.writer.spec.codec, list[bytes | memoryview]()
        where, decoded = f"{self.source.url}/{shard.key}", np.empty(old.chunk_bytes, np.uint8)
        for chunk, crc, what in shard.read(lambda at, size: data[at : at + size], where):
            if new == old.codec:
                codecs.check_chunk(chunk, new, old.chunk_bytes, what, committed=crc)
                pieces.append(chunk)
            else:
                codecs.decode_into(chunk, old.codec, decoded, what, committed=crc)
                elements = codecs.merge(decoded, old.codec, np.dtype(f"<u{old.dtype.itemsize}"))
                pieces.append(codecs.encode(elements, new))
        lengths = list(map(len, pieces))
        crcs = [int.from_bytes(p[-codecs.CRC_BYTES :], "little") for p in pieces]
        put(shard.key, [*pieces, tail(lengths, old.chunks_per_shard, attempt)])
        self._advance(shard.size)
        return Encoded(size=sum(lengths), lengths=lengths, crc32c=crcs, sums=None)

    def _encode(self, place: int, bucket: int) -> bool:
        """Write a bucket's values in other encodings; False if somebody else was at the bucket."""
        names = arrays(self.source.spec)
        rows = {name: BucketRows(self._values(name), self.source, name, place) for name in names}
        made = self.writer.write_arrays(bucket, rows)
        self._advance(read_record(self.source.storage, self.source.spec, bucket).stored_bytes(self.source.spec))
        return not isinstance(made, NotWritten)

    def _values(self, name: str) -> Values:
        if name in PROVENANCE_ARRAYS:
            return Values(self.source, name)
        allowed = RAW_DTYPES[self.writer.spec.sites[name].kind]
        return Values(self.source, name, allowed[0] if len(allowed) == 1 else None)

    def _tokens(self) -> None:
        """Everything of the token table, its group last; what is there already must be the same."""
        group, there = f"{_TOKENS}/{GROUP_KEY}", self.destination.list(_TOKENS)
        missing = [key for key, size in self.tokens.items() if there.get(key) != size and key != group]

        def put(key: str) -> int:
            data = self.source.storage.get(key)
            if not self.destination.create(key, data) and (
                self.destination.size(key) != len(data) or self.destination.get(key) != data
            ):
                raise StoreError(f"{self.destination.url}/{key} is of another token table; copy to an empty place")
            return len(data)

        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-copy") as pool:
            for size in pool.map(put, missing):
                self._advance(size)
        if group in self.tokens:
            self.step.skip(sum(self.tokens.values()) - sum(self.tokens[key] for key in (*missing, group)))
            self._advance(put(group))
