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
from actstore.store.format.spec import METADATA_LIMIT, StoreSpec, arrays, metadata_objects
from actstore.store.maintain.gc import Names
from actstore.store.maintain.verify import Damage
from actstore.store.storage import Storage
from actstore.store.write.bucket import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Condemned:
    """Damage, sorted by what it takes to mend it."""

    buckets: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    """Damaged objects of each bucket that must be captured again."""
    derived: list[str] = field(default_factory=list[str])
    """Objects that follow from others."""
    lost: list[Damage] = field(default_factory=list[Damage])
    """What nothing can bring back."""


def condemned(spec: StoreSpec, damage: list[Damage]) -> Condemned:
    """Sort what `verify` found."""
    found, names, derived = Condemned(), Names(spec), {manifest.MANIFEST_KEY, *metadata_objects(spec)}
    for d in damage:
        shard = names.shard(d.key)
        if shard is not None:
            array, number = shard
            found.buckets.setdefault(number * array.shard_rows // spec.bucket_rows, []).append(d.key)
        elif d.key.startswith(f"{record.COMMITS}/") and names.other(d.key):
            found.buckets.setdefault(int(d.key.removeprefix(f"{record.COMMITS}/")[:-5]), []).append(d.key)
        elif d.key in derived:
            found.derived.append(d.key)
        else:
            found.lost.append(d)
    return found


def mend_metadata(storage: Storage, spec: StoreSpec, keys: list[str]) -> None:
    """Put the array metadata among `keys` anew."""
    objects = metadata_objects(spec)
    for key in keys:
        if key in objects:
            storage.put(key, objects[key])


def mend_bucket(writer: StoreWriter, bucket: int, data: Mapping[str, NDArray[Any]], keys: tuple[str, ...]) -> bool:
    """Put the damaged shards `keys` of a committed bucket again, given all its rows in stored order, by array.

    False, and nothing was put, if a shard is not what its commit record says, or that is damaged too.
    """
    shards = [(a, k) for k in keys for a in arrays(writer.spec).values() if k.startswith(f"{a.name}/c/")]
    if len(shards) < len(keys):
        return False
    try:
        seen = record.from_bytes(writer.storage.get(record.commit_key(bucket), METADATA_LIMIT), writer.spec, bucket)
    except StoreError:
        return False
    if not isinstance(seen, record.CommitRecord):
        return False
    first, _ = writer.spec.bucket_range(bucket)
    buffer = np.empty(max(encoder.buffer_bytes(a) for a, _ in shards), np.uint8)
    for put in (False, True):
        for array, key in shards:
            within = int(key.split("/")[2]) - first // array.shard_rows
            start = within * array.shard_rows
            made = writer.encode(array, data[array.name][start : start + array.shard_rows], bucket, start, buffer)
            if made.shard != seen.shards[array.name][within]:
                return False
            if put:
                writer.storage.put(key, [buffer[: made.size].data])
    return True
