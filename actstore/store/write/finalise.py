"""Consolidating commit records into the manifest (`format/manifest.py`), part by part.

Parts are independent of each other, so many workers can make them, while the store is still being written. Every part
and the head follow from the commit records alone: whoever makes one of them again makes the same bytes.
"""

from contextlib import suppress

import numpy as np

from actstore.errors import MissingError, StoreError
from actstore.store.format import manifest
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.spec import StoreSpec
from actstore.store.read.index import committed, read_part, read_records
from actstore.store.storage import Storage
from actstore.store.write.protocol import SWAPS


def missing_parts(storage: Storage, spec: StoreSpec) -> list[int]:
    """Parts whose buckets are all committed, and that are not consolidated yet."""
    there = storage.list(manifest.MANIFEST)
    counts = np.bincount(committed(storage, spec) // manifest.part_buckets(spec))
    full = [n for n, count in enumerate(counts.tolist()) if count == len(range(*manifest.part_range(spec, n)))]
    return [n for n in full if manifest.part_key(spec, n) not in there]


def write_part(storage: Storage, spec: StoreSpec, number: int) -> None:
    """Consolidate a part whose buckets are all committed."""
    key = manifest.part_key(spec, number)
    for _ in range(SWAPS):
        seen = storage.stat(key)  # before the records: a part that others made of newer ones stays
        buckets = np.arange(*manifest.part_range(spec, number))
        builder = manifest.PartBuilder(spec, number, buckets)
        for r in read_records(storage, spec, buckets.tolist()):
            builder.add(r)
        tables: dict[str, int] = {}
        for name, data in builder.files():
            tables[name] = manifest.crc32c(data)
            table = manifest.table_key(name, number, tables[name])
            if not storage.create(table, data) and storage.get(table, manifest.TABLE_LIMIT) != data:
                storage.put(table, data)  # its name says what it holds, so that one is damaged
        data = manifest.part_bytes(builder.part(tables))
        if _swap(storage, key, data, seen.version if seen else None):
            return
    raise StoreError(f"{storage.url}/{key} changed {SWAPS} times while it was being written; try again")


def finalise(storage: Storage, spec: StoreSpec, *, rewritten: frozenset[int] = frozenset()) -> bool:
    """Make the parts that are missing and, if the store is complete, the head; returns whether it is.

    Parts of `rewritten` buckets are made anew.
    """
    stale = {bucket // manifest.part_buckets(spec) for bucket in rewritten}
    for number in sorted({*missing_parts(storage, spec), *stale}):
        write_part(storage, spec, number)
    return write_head(storage, spec)


def write_head(storage: Storage, spec: StoreSpec) -> bool:
    """Make the head of the manifest from its parts; False if the store is not complete, or a part is missing."""
    for _ in range(SWAPS):
        seen = storage.stat(manifest.HEAD_KEY)
        head = manifest.HeadBuilder(spec)
        for number in range(manifest.num_parts(spec)):
            part = read_part(storage, spec, number)
            if part is None:
                return False
            head.add(part)
        data = manifest.head_bytes(head.head(np.arange(spec.buckets)))
        if _swap(storage, manifest.HEAD_KEY, data, seen.version if seen else None):
            return True
    raise StoreError(f"{storage.url}/{manifest.HEAD_KEY} changed {SWAPS} times while it was being written; try again")


def _swap(storage: Storage, key: str, data: bytes, version: str | None) -> bool:
    """Put an object unless it changed since `version`; harmless if it is this object already."""
    if version is not None:
        with suppress(MissingError):
            if storage.get(key, METADATA_LIMIT) == data:
                return True
    return storage.create(key, data) if version is None else storage.replace(key, data, version)
