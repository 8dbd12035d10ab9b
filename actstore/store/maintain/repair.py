"""What `verify` condemns: which of it follows from the rest of the store, and which must be captured again.

Array metadata and the manifest follow from the group and the commit records, and are made anew. Shards and commit
records of a bucket need its rows. If these come out as they were, chunk by chunk of the damaged shards, only the
damaged objects are put; otherwise (another GPU, another library) the whole bucket is written and committed anew, so
that its sites stay rows of one pass. Calibrations and token tables can't be made again, and are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.store.format import encoder, manifest, record
from actstore.store.format.record import CommitRecord
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.spec import StoreSpec, metadata_objects
from actstore.store.maintain.gc import Names
from actstore.store.maintain.shards import shards
from actstore.store.maintain.verify import Damage
from actstore.store.storage import Storage
from actstore.store.write import protocol
from actstore.store.write.bucket import StoreWriter
from actstore.store.write.extend import write_metadata
from actstore.store.write.protocol import Attempt


@dataclass(frozen=True, kw_only=True)
class Condemned:
    """Damage, sorted by what it takes to repair it."""

    buckets: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    """Damaged objects of each bucket that must be captured again."""
    derived: list[str] = field(default_factory=list[str])
    """Objects that follow from others."""
    lost: list[Damage] = field(default_factory=list[Damage])
    """What nothing can bring back."""


def condemned(spec: StoreSpec, damage: list[Damage]) -> Condemned:
    """Sort what `verify` found."""
    found, names, derived = Condemned(), Names(spec), {manifest.HEAD_KEY, *metadata_objects(spec)}
    for d in damage:
        shard = names.shard(d.key)
        if shard is not None:
            array, number = shard
            found.buckets.setdefault(number * array.shard_rows // spec.bucket_rows, []).append(d.key)
        elif (bucket := record.bucket_of(d.key)) is not None:
            found.buckets.setdefault(bucket, []).append(d.key)
        elif d.key in derived or names.manifest(d.key):
            found.derived.append(d.key)
        else:
            found.lost.append(d)
    return found


def restore_derived(storage: Storage, spec: StoreSpec, keys: list[str]) -> None:
    """Write damaged array metadata anew, and delete what is damaged of the manifest, which finalising makes again.

    With a table goes its part: a part that is there counts as made.
    """
    for key in keys:
        if key.startswith(manifest.MANIFEST):
            storage.delete(key)
        if (number := manifest.part_of(key)) is not None:
            storage.delete(manifest.part_key(spec, number))
    write_metadata(storage)


def commit_version(storage: Storage, bucket: int) -> str | None:
    """The version of a bucket's commit object, None if it is missing: what a repair of it may replace."""
    seen = storage.stat(record.commit_key(bucket))
    return seen.version if seen else None


def replace_shards(
    writer: StoreWriter, bucket: int, data: Mapping[str, NDArray[Any]], keys: tuple[str, ...], version: str | None
) -> bool:
    """Put the damaged shards `keys` of a committed bucket again, given all its rows in stored order, by array.

    False, and nothing was put, if a shard is not what its commit record says, or the record is damaged or has another
    version by now. As in the commit protocol, a shard replaces only what was there while the record was.
    """
    storage = writer.storage
    if version is None or commit_version(storage, bucket) != version:
        return False
    try:
        content = storage.get(record.commit_key(bucket), METADATA_LIMIT)
        seen = record.from_bytes(content, writer.spec, bucket)
    except StoreError:
        return False
    damaged = [s for s in shards(writer.spec, seen) if s.key in keys] if isinstance(seen, CommitRecord) else []
    if len(damaged) < len(keys):
        return False
    holder = Attempt(bucket, protocol.new_id(), version, content)
    buffer = np.empty(max(encoder.buffer_bytes(s.array) for s in damaged), np.uint8)
    for put in (False, True):
        for s in damaged:
            rows = data[s.array.name][s.start : s.start + s.array.shard_rows]
            made = writer.encode(s.array, rows, bucket, s.start, buffer, holder.id)
            if (made.lengths, made.crc32c) != (s.chunks.stored.tolist(), s.chunks.crc32c.tolist()):
                return False
            if put and not protocol.run(storage, protocol.put(holder, s.key, [buffer[: made.size].data])):
                return False
    return True
