"""Checking a store against its commit records: every object there, of the right size and, deep, of the right bytes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from actstore.errors import ActstoreError, IntegrityError
from actstore.store import codec, manifest, record, shard
from actstore.store.reader import Store
from actstore.store.spec import arrays, dump
from actstore.store.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged object."""

    key: str
    problem: str


def verify(store: Store, *, deep: bool, advance: Callable[[int], None] = lambda _: None) -> list[Damage]:
    """Check all committed buckets; `advance` is called with the rows of each.

    Shallow compares object sizes with the commit records. Deep also compares crc32c of every object, decodes every
    chunk, and compares the manifest with the records.
    """
    found = list(_metadata(store))
    with ThreadPoolExecutor(4, thread_name_prefix="actstore-verify") as pool:
        for bucket, problems in pool.map(lambda b: (b, _bucket(store, int(b), deep=deep)), store.index.buckets):
            found.extend(problems)
            first, stop = store.spec.bucket_range(int(bucket))
            advance(stop - first)
    return found


def _metadata(store: Store) -> Iterator[Damage]:
    for array in arrays(store.spec).values():
        key = f"{array.name}/zarr.json"
        try:
            if store.storage.get(key) != dump(array.metadata()):
                yield Damage(key=key, problem="is not the array metadata that this store's group describes")
        except ActstoreError as e:
            yield Damage(key=key, problem=str(e))
    for key in manifest.manifest_keys(store.storage)[-1:]:
        if not manifest.agrees(store.storage, store.spec, key):
            yield Damage(key=key, problem="does not agree with the commit records")


def _bucket(store: Store, bucket: int, *, deep: bool) -> list[Damage]:
    key = record.commit_key(bucket)
    try:
        committed = record.from_bytes(store.storage.get(key), store.spec, bucket)
    except ActstoreError as e:
        return [Damage(key=key, problem=str(e))]
    found: list[Damage] = []
    first, _ = store.spec.bucket_range(bucket)
    for array in arrays(store.spec).values():
        for i, expected in enumerate(committed.shards[array.name]):
            name = array.shard_key(first // array.shard_rows + i)
            try:
                _shard(store.storage, name, expected, array.chunks_per_shard, array.chunk_bytes, array.codec, deep=deep)
            except ActstoreError as e:
                found.append(Damage(key=name, problem=str(e)))
    return found


def _shard(
    storage: Storage,
    key: str,
    expected: record.ShardRecord,
    capacity: int,
    chunk_bytes: int,
    chain: codec.CodecName,
    *,
    deep: bool,
) -> None:
    size = sum(expected.chunks) + shard.index_bytes(capacity)
    if (found := storage.size(key)) != size:
        raise IntegrityError(f"has {found} bytes, its commit record says {size}")
    if not deep:
        return
    data = storage.get(key)
    if (crc := codec.crc32c(data)) != expected.crc32c:
        raise IntegrityError(f"crc32c is {crc:08x}, its commit record says {expected.crc32c:08x}")
    lengths = shard.chunk_lengths(data, capacity, key)
    if tuple(lengths[: len(expected.chunks)]) != expected.chunks:
        raise IntegrityError("its index and its commit record differ")
    buffer = np.empty(chunk_bytes, np.uint8)
    offset = 0
    for length in expected.chunks:
        codec.decode_into(data[offset : offset + length], chain, buffer, f"{key} chunk at byte {offset}")
        offset += length
