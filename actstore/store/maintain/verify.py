"""Checking a store: every fact against every other place that states it, and every stored byte when asked.

Shallow: the group, array metadata, calibrations, the manifest against the commit records, and by one listing that
every object is there with its size. Deep also reads every shard, chunk by chunk in bounded memory, checks and decodes
it. Each damaged object is named once. Nothing is changed.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from actstore.errors import ActstoreError, IntegrityError, MissingError, StoreError
from actstore.store.format import codec, fixed, manifest, record
from actstore.store.format.record import CommitRecord, Intent
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.spec import GROUP_KEY, OPEN_ENDED, StoreSpec, calibration_key, metadata_objects
from actstore.store.maintain.shards import shards
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


@contextmanager
def _noting(damage: list[Damage], key: str) -> Generator[None]:
    """Note what is raised inside as damage of an object."""
    try:
        yield
    except ActstoreError as e:
        damage.append(Damage(key=key, problem=str(e)))


def _compare(storage: Storage, expected: Mapping[str, bytes], problem: str) -> Iterator[Damage]:
    """Those of the objects that are not what they should be."""
    damage: list[Damage] = []
    for key, data in expected.items():
        with _noting(damage, key):
            if storage.get(key, METADATA_LIMIT) != data:
                raise StoreError(problem)
    yield from damage


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
    damage = found.damage
    damage.extend(_compare(storage, metadata_objects(spec), f"is not the array metadata that {GROUP_KEY} asks for"))
    head = _head(storage, spec, damage)
    wanted = _listed(sizes, spec, head, damage)
    begin(int(spec.bucket_sizes(np.array(sorted(wanted), np.int64)).sum()))
    parts = manifest.HeadBuilder(spec)
    size, whole = manifest.part_buckets(spec), True
    for number in range(-(-(max(wanted, default=-1) + 1) // size)):
        first, stop = manifest.part_range(spec, number)
        records = _records(storage, spec, [b for b in range(first, stop) if b in wanted], head, damage)
        found.buckets += len(records)
        part = _part(storage, spec, number, records, sizes, must=head is not None, damage=damage)
        whole &= part is not None and len(records) == stop - first
        if part is not None:
            parts.add(part)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-verify") as pool:
            for r, problems in pool.map(lambda r: (r, _check_bucket(storage, spec, r, sizes.get, deep=deep)), records):
                damage.extend(problems)
                advance(r.rows)
    merged = parts.head(np.array(sorted(wanted), np.int64))
    if head is not None and whole and head.spec == spec and manifest.head_bytes(head) != manifest.head_bytes(merged):
        damage.append(Damage(key=manifest.HEAD_KEY, problem="does not agree with the commit records"))
    damage.extend(_calibrations(storage, spec, merged.calibration))
    found.remarks = [line for site, s in merged.stats.items() for line in s.remarks(site)]
    return found


def _head(storage: Storage, spec: StoreSpec, damage: list[Damage]) -> manifest.Head | None:
    with _noting(damage, manifest.HEAD_KEY):
        head = read_head(storage)
        if head is not None and not agrees(head.spec, spec):
            raise StoreError(f"describes another store than {GROUP_KEY}")
        return head
    return None


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
    found: list[CommitRecord] = []

    def read(bucket: int) -> CommitRecord | Intent | ActstoreError:
        try:
            return record.from_bytes(storage.get(record.commit_key(bucket), METADATA_LIMIT), spec, bucket)
        except ActstoreError as e:
            return e

    with ThreadPoolExecutor(_READERS, thread_name_prefix="actstore-records") as pool:
        for bucket, outcome in zip(buckets, pool.map(read, buckets), strict=True):
            with _noting(damage, record.commit_key(bucket)):
                if isinstance(outcome, ActstoreError):
                    raise outcome
                if isinstance(outcome, CommitRecord):
                    found.append(outcome)
                elif head is not None and bucket < head.spec.buckets:
                    raise StoreError(f"is an intent, but {manifest.HEAD_KEY} knows the bucket as committed")
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
    if len(records) == len(range(*manifest.part_range(spec, number))) and (must or key in sizes):
        objects = {manifest.table_key(n, number, crc): data for n, (crc, data) in tables.items()}
        expected = {key: manifest.part_bytes(part), **objects}
        damage.extend(_compare(storage, expected, "does not agree with the commit records"))
    return part


def _calibrations(storage: Storage, spec: StoreSpec, expected: Mapping[str, int]) -> list[Damage]:
    damage: list[Damage] = []
    for site, crc in expected.items():
        key = calibration_key(site)
        with _noting(damage, key):
            data = storage.get(key, METADATA_LIMIT)
            fixed.from_bytes(data, spec.sites[site].d, key)
            if fixed.digest(data) != crc:
                raise IntegrityError("is not the calibration that the commit records name")
    return damage


def verify_bucket(storage: Storage, spec: StoreSpec, bucket: int) -> list[Damage]:
    """Read one bucket that should be committed, and check all of it."""
    damage: list[Damage] = []
    with _noting(damage, record.commit_key(bucket)):
        committed = read_record(storage, spec, bucket)
        return _check_bucket(storage, spec, committed, lambda k: s.size if (s := storage.stat(k)) else None, deep=True)
    return damage


def _check_bucket(
    storage: Storage, spec: StoreSpec, committed: CommitRecord, size: Callable[[str], int | None], *, deep: bool
) -> list[Damage]:
    """Check the shards of a committed bucket, given the sizes of objects; `deep` also reads and decodes them."""
    damage: list[Damage] = []
    for shard in shards(spec, committed):
        with _noting(damage, shard.key):
            stored = size(shard.key)
            if stored is None:
                raise MissingError("is missing")
            if stored != shard.size:
                raise IntegrityError(f"has {stored} bytes, its commit record says {shard.size}")
            if deep:
                buffer = np.empty(shard.array.chunk_bytes, np.uint8)
                for data, crc, where in shard.read(partial(storage.get_range, shard.key), shard.key):
                    codec.decode_into(data, shard.array.codec, buffer, where, committed=crc)
    return damage
