"""Checking a store: every fact against every other place that states it, and every stored byte when asked.

Shallow: the group, array metadata, calibrations, the manifest against the commit records, and by one listing that
every object is there with its size. Deep also reads every shard, chunk by chunk in bounded memory, checks and decodes
it. Each damaged object is named once. Nothing is changed.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from actstore.errors import ActstoreError, IntegrityError, MissingError, StoreError
from actstore.store.format import codec, fixed, manifest, record, shard
from actstore.store.format.record import CommitRecord, Intent
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.spec import (
    GROUP_KEY,
    OPEN_ENDED,
    ArraySpec,
    StoreSpec,
    arrays,
    calibration_key,
    metadata_objects,
)
from actstore.store.read.index import agrees, read_head, read_record, read_spec
from actstore.store.storage import Storage

_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged object."""

    key: str
    problem: str


@dataclass(kw_only=True)
class Findings:
    """What `verify` found."""

    buckets: int
    """Committed."""
    planned_buckets: int | None
    """None if the store is open-ended."""
    damage: list[Damage] = field(default_factory=list[Damage])
    remarks: list[str] = field(default_factory=list[str])
    """What is as it was written, and yet worth knowing: rows with NaN or infinity, clipped values."""

    @property
    def complete(self) -> bool:
        """Whether every planned bucket is committed."""
        return self.buckets == self.planned_buckets


def verify(
    storage: Storage,
    *,
    deep: bool,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Findings:
    """Check a store; `begin` is called with the committed rows, `advance` with the rows of each checked bucket.

    `StoreError` if there is no store, or its group can't be read, which leaves nothing to check against.
    """
    spec = read_spec(storage)
    sizes = storage.list("")
    found = Findings(buckets=0, planned_buckets=None if spec.rows == OPEN_ENDED else spec.buckets)
    found.damage.extend(_metadata(storage, spec))
    head = _head(storage, spec, found.damage)
    wanted = _listed(sizes, spec, head, found.damage)
    begin(int(spec.bucket_sizes(np.array(sorted(wanted), np.int64)).sum()))
    parts = manifest.HeadBuilder(spec)
    size, whole = manifest.part_buckets(spec), True
    for number in range(-(-(max(wanted, default=-1) + 1) // size)):
        first, stop = manifest.part_range(spec, number)
        here = [b for b in range(first, stop) if b in wanted]
        records = _records(storage, spec, here, head, found.damage)
        found.buckets += len(records)
        part = _part(storage, spec, number, records, sizes, must=head is not None, damage=found.damage)
        whole &= part is not None and len(records) == stop - first
        if part is not None:
            parts.add(part)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-verify") as pool:
            for r, problems in pool.map(lambda r: (r, check_bucket(storage, spec, r, sizes, deep=deep)), records):
                found.damage.extend(problems)
                advance(r.rows)
    merged = parts.head(np.array(sorted(wanted), np.int64))
    if head is not None and whole and head.spec == spec and manifest.head_bytes(head) != manifest.head_bytes(merged):
        found.damage.append(Damage(key=manifest.HEAD_KEY, problem="does not agree with the commit records"))
    found.damage.extend(_calibrations(storage, spec, merged.calibration))
    found.remarks = [line for site, s in merged.stats.items() for line in s.remarks(site)]
    return found


def _metadata(storage: Storage, spec: StoreSpec) -> Iterator[Damage]:
    for key, expected in metadata_objects(spec).items():
        try:
            if storage.get(key, METADATA_LIMIT) != expected:
                yield Damage(key=key, problem=f"is not the array metadata that {GROUP_KEY} asks for")
        except ActstoreError as e:
            yield Damage(key=key, problem=str(e))


def _head(storage: Storage, spec: StoreSpec, damage: list[Damage]) -> manifest.Head | None:
    key = manifest.HEAD_KEY
    try:
        head = read_head(storage)
    except ActstoreError as e:
        damage.append(Damage(key=key, problem=str(e)))
        return None
    if head is not None and not agrees(head.spec, spec):
        damage.append(Damage(key=key, problem=f"describes another store than {GROUP_KEY}"))
        return None
    return head


def _listed(sizes: Mapping[str, int], spec: StoreSpec, head: manifest.Head | None, damage: list[Damage]) -> set[int]:
    """Buckets that are committed, or should be."""
    wanted = set(range(head.spec.buckets)) if head else set[int]()
    for key in sizes:
        if key.startswith(f"{record.COMMITS}/"):
            bucket = record.bucket_of(key)
            if bucket is None:
                damage.append(Damage(key=key, problem="not the name of a commit object"))
            elif bucket < spec.buckets:
                wanted.add(bucket)
    return wanted


def _records(
    storage: Storage, spec: StoreSpec, buckets: list[int], head: manifest.Head | None, damage: list[Damage]
) -> list[CommitRecord]:
    """Records of those of the buckets that are committed."""

    def read(bucket: int) -> CommitRecord | Intent | ActstoreError:
        try:
            return record.from_bytes(storage.get(record.commit_key(bucket), METADATA_LIMIT), spec, bucket)
        except ActstoreError as e:
            return e

    found: list[CommitRecord] = []
    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-records") as pool:
        for bucket, outcome in zip(buckets, pool.map(read, buckets), strict=True):
            if isinstance(outcome, CommitRecord):
                found.append(outcome)
            elif isinstance(outcome, ActstoreError):
                damage.append(Damage(key=record.commit_key(bucket), problem=str(outcome)))
            elif head is not None and bucket < head.spec.buckets:
                problem = f"is an intent, but {manifest.HEAD_KEY} knows the bucket as committed"
                damage.append(Damage(key=record.commit_key(bucket), problem=problem))
    return found


def _part(
    storage: Storage,
    spec: StoreSpec,
    number: int,
    records: list[CommitRecord],
    sizes: Mapping[str, int],
    *,
    must: bool,
    damage: list[Damage],
) -> manifest.Part | None:
    """The part as the records say it is, if they don't contradict each other; what is stored must be the same."""
    builder = manifest.PartBuilder(spec, number, np.array([r.bucket for r in records], np.int64))
    for r in records:
        try:
            builder.add(r)
        except IntegrityError as e:
            damage.append(Damage(key=record.commit_key(r.bucket), problem=str(e)))
            return None
    tables = {name: (codec.crc32c(data), data) for name, data in builder.files()}
    part = builder.part({name: crc for name, (crc, _) in tables.items()})
    key = manifest.part_key(spec, number)
    if len(records) < len(range(*manifest.part_range(spec, number))) or not (must or key in sizes):
        return part
    objects = {manifest.table_key(n, number, crc): data for n, (crc, data) in tables.items()}
    for name, expected in {key: manifest.part_bytes(part), **objects}.items():
        try:
            if storage.get(name, METADATA_LIMIT) != expected:
                raise StoreError("does not agree with the commit records")
        except ActstoreError as e:
            damage.append(Damage(key=name, problem=str(e)))
    return part


def _calibrations(storage: Storage, spec: StoreSpec, expected: Mapping[str, int]) -> Iterator[Damage]:
    for site, crc in expected.items():
        key, d = calibration_key(site), spec.sites[site].d
        try:
            data = storage.get(key, METADATA_LIMIT)
            fixed.from_bytes(data, d, key)
            if fixed.digest(data) != crc:
                yield Damage(key=key, problem="is not the calibration that the commit records name")
        except ActstoreError as e:
            yield Damage(key=key, problem=str(e))


def verify_bucket(storage: Storage, spec: StoreSpec, bucket: int) -> list[Damage]:
    """Read one bucket that should be committed, and check all of it."""
    key = record.commit_key(bucket)
    try:
        committed = read_record(storage, spec, bucket)
    except ActstoreError as e:
        return [Damage(key=key, problem=str(e))]
    first, stop = spec.bucket_range(bucket)
    shards = {a: range(first // a.shard_rows, -(-stop // a.shard_rows)) for a in arrays(spec).values()}
    keys = [a.shard_key(i) for a, numbers in shards.items() for i in numbers]
    sizes = {k: seen.size for k in keys if (seen := storage.stat(k))}
    return check_bucket(storage, spec, committed, sizes, deep=True)


def check_bucket(
    storage: Storage, spec: StoreSpec, committed: CommitRecord, sizes: Mapping[str, int], *, deep: bool
) -> list[Damage]:
    """Check the shards of a committed bucket, given the sizes of all objects; `deep` also reads and decodes them."""
    found: list[Damage] = []
    first, _ = spec.bucket_range(committed.bucket)
    for array in arrays(spec).values():
        for i, chunks in enumerate(record.shard_chunks(array, committed)):
            key = array.shard_key(first // array.shard_rows + i)
            try:
                size = int(chunks.stored.sum(dtype=np.int64)) + shard.tail_bytes(array.chunks_per_shard)
                if key not in sizes:
                    raise MissingError("is missing")
                if sizes[key] != size:
                    raise IntegrityError(f"has {sizes[key]} bytes, its commit record says {size}")
                if deep:
                    _read_shard(storage, key, array, chunks)
            except ActstoreError as e:
                found.append(Damage(key=key, problem=str(e)))
    return found


def _read_shard(storage: Storage, key: str, array: ArraySpec, expected: record.Chunks) -> None:
    buffer = np.empty(array.chunk_bytes, np.uint8)
    offset = 0
    for length, crc in zip(expected.stored.tolist(), expected.crc32c.tolist(), strict=True):
        data = storage.get_range(key, offset, length)
        codec.decode_into(data, array.codec, buffer, f"{key} chunk at byte {offset}", committed=crc)
        offset += length
    tail = bytes(storage.get_range(key, offset, shard.tail_bytes(array.chunks_per_shard)))
    shard.check_tail(tail, expected.stored.tolist(), array.chunks_per_shard, key)
