"""Checking a store: every fact against every other place that states it, and every stored byte when asked.

Shallow: the group, array metadata, calibrations, the manifest against the commit records, and by one listing that
every object is there with its size. Deep also reads every shard, chunk by chunk in bounded memory, checks and decodes
it. Each damaged object is named once. Nothing is changed.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from actstore.errors import ActstoreError, IntegrityError, MissingError
from actstore.store.format import codec, fixed, manifest, record, shard
from actstore.store.format.spec import (
    GROUP_KEY,
    METADATA_LIMIT,
    ArraySpec,
    StoreSpec,
    arrays,
    calibration_key,
    metadata_objects,
)
from actstore.store.storage import Storage

_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged object."""

    key: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `verify` found."""

    buckets: int
    """Committed."""
    damage: list[Damage]


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
    spec = manifest.read_spec(storage)
    found = list(_metadata(storage, spec))
    known, damage = _manifest(storage, spec)
    found.extend(damage)
    records: dict[int, record.CommitRecord] = {}
    expected = set(known.buckets.tolist()) if known else set[int]()
    for key, bucket, outcome in _records(storage, spec, expected):
        if isinstance(outcome, record.CommitRecord):
            records[bucket] = outcome
        elif isinstance(outcome, ActstoreError):
            found.append(Damage(key=key, problem=str(outcome)))
        elif bucket in expected:
            found.append(Damage(key=key, problem=f"is an intent, but {manifest.MANIFEST_KEY} knows it as committed"))
    found.extend(_disagreements(known, records))
    found.extend(_calibrations(storage, spec, records))
    begin(sum(r.rows for r in records.values()))
    sizes = storage.list("")
    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-verify") as pool:
        for r, problems in pool.map(lambda r: (r, _bucket(storage, spec, r, sizes, deep=deep)), records.values()):
            found.extend(problems)
            advance(r.rows)
    return Findings(buckets=len(records), damage=found)


def _metadata(storage: Storage, spec: StoreSpec) -> Iterator[Damage]:
    for key, expected in metadata_objects(spec).items():
        try:
            if storage.get(key, METADATA_LIMIT) != expected:
                yield Damage(key=key, problem=f"is not the array metadata that {GROUP_KEY} asks for")
        except ActstoreError as e:
            yield Damage(key=key, problem=str(e))


def _manifest(storage: Storage, spec: StoreSpec) -> tuple[manifest.Index | None, list[Damage]]:
    key = manifest.MANIFEST_KEY
    try:
        index = manifest.read_manifest(storage)
    except ActstoreError as e:
        return None, [Damage(key=key, problem=str(e))]
    if index is not None and not manifest.agrees(index, spec):
        return None, [Damage(key=key, problem=f"describes another store than {GROUP_KEY}")]
    return index, []


def _records(
    storage: Storage, spec: StoreSpec, expected: set[int]
) -> Iterator[tuple[str, int, record.CommitRecord | record.Intent | ActstoreError]]:
    """Every commit object that is there or should be, parsed or with what is wrong with it."""

    def read(item: tuple[str, int]) -> tuple[str, int, record.CommitRecord | record.Intent | ActstoreError]:
        key, bucket = item
        try:
            return key, bucket, record.from_bytes(storage.get(key, METADATA_LIMIT), spec, bucket)
        except ActstoreError as e:
            return key, bucket, e

    wanted = {record.commit_key(b): b for b in expected}
    for key in storage.list(record.COMMITS):
        try:
            bucket = record.bucket_of(key, spec)
            if bucket is not None:
                wanted[key] = bucket
        except ActstoreError as e:
            yield key, -1, e
    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-records") as pool:
        yield from pool.map(read, sorted(wanted.items()))


def _disagreements(known: manifest.Index | None, records: dict[int, record.CommitRecord]) -> Iterator[Damage]:
    """The manifest against the records of its buckets."""
    if known is None:
        return
    of_manifest = [records[b] for b in known.buckets.tolist() if b in records]
    if len(of_manifest) < len(known.buckets):
        return  # the missing records are named already
    again = manifest.index_of(known.spec, of_manifest)
    try:
        if manifest.to_parquet(again) != manifest.to_parquet(known):
            yield Damage(key=manifest.MANIFEST_KEY, problem="does not agree with the commit records")
    except ActstoreError as e:
        yield Damage(key=manifest.MANIFEST_KEY, problem=str(e))


def _calibrations(storage: Storage, spec: StoreSpec, records: dict[int, record.CommitRecord]) -> Iterator[Damage]:
    for site, expected in next(iter(records.values())).calibration.items() if records else ():
        key, d = calibration_key(site), spec.sites[site].d
        try:
            data = storage.get(key, METADATA_LIMIT)
            fixed.from_bytes(data, d, key)
            if fixed.digest(data) != expected:
                yield Damage(key=key, problem="is not the calibration that the commit records name")
        except ActstoreError as e:
            yield Damage(key=key, problem=str(e))
        for r in records.values():
            if r.calibration[site] != expected:
                yield Damage(key=record.commit_key(r.bucket), problem=f"names another calibration of {site}")


def _bucket(
    storage: Storage, spec: StoreSpec, committed: record.CommitRecord, sizes: dict[str, int], *, deep: bool
) -> list[Damage]:
    found: list[Damage] = []
    first, _ = spec.bucket_range(committed.bucket)
    for array in arrays(spec).values():
        for i, expected in enumerate(committed.shards[array.name]):
            key = array.shard_key(first // array.shard_rows + i)
            try:
                size = sum(expected.chunks) + shard.index_bytes(array.chunks_per_shard)
                if key not in sizes:
                    raise MissingError("is missing")
                if sizes[key] != size:
                    raise IntegrityError(f"has {sizes[key]} bytes, its commit record says {size}")
                if deep:
                    _shard(storage, key, array, expected)
            except ActstoreError as e:
                found.append(Damage(key=key, problem=str(e)))
    return found


def _shard(storage: Storage, key: str, array: ArraySpec, expected: record.ShardRecord) -> None:
    buffer = np.empty(array.chunk_bytes, np.uint8)
    offset = 0
    for length, crc in zip(expected.chunks, expected.crc32c, strict=True):
        data = storage.get_range(key, offset, length)
        codec.decode_into(data, array.codec, buffer, f"{key} chunk at byte {offset}", committed=crc)
        offset += length
    footer = bytes(storage.get_range(key, offset, shard.index_bytes(array.chunks_per_shard)))
    shard.check_footer(footer, expected.chunks, array.chunks_per_shard, key)
