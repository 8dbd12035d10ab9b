"""Freeing what dead attempts left behind, without ever touching what is committed or alive.

Garbage is: shards of buckets that are not committed and on which no attempt has worked for a while, tables that no part
of the manifest names any more, and, in a directory, old partial files. What has a name that is not the store's is
reported and left alone.

A bucket with leftovers is first taken over, as an attempt would do it, by compare-and-swap against the intent whose age
was judged (`write/protocol.py`). From then on the earlier attempt can't commit, however alive it is. gc's intent stays;
the next attempt takes it over in turn. That attempt may come at any moment, so a leftover is not deleted, which no
object store does conditionally and which could hit the new attempt's shard. It is replaced, by compare-and-swap, by an
empty shard of a few hundred bytes, which zarr reads as fill values and the next attempt writes over. Tables and partial
files have names of their own, so they are deleted; partial files never within ten minutes of their last byte, because
their writer may live. Ages compare this machine's clock with the times that the storage states.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from actstore.store.format import manifest, record
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.format.shard import tail, tail_bytes
from actstore.store.format.spec import (
    EVENTS,
    GROUP_KEY,
    ArraySpec,
    StoreSpec,
    arrays,
    calibration_key,
    metadata_objects,
)
from actstore.store.read.index import committed, read_head, read_part, read_spec
from actstore.store.storage import LocalStorage, Storage, open_storage
from actstore.store.write import protocol
from actstore.store.write.protocol import NotWritten

PARTIAL_NAME = re.compile(r".+\.[0-9a-f]{16}\.partial")
"""What `LocalStorage` calls its partial files; no other file is deleted."""
_PARTIAL_SECONDS = 600
_WORKERS = 16
_PART = re.compile(rf"{manifest.MANIFEST}/[0-9]{{6,}}-[0-9]{{8,}}\.json")


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One object to free."""

    key: str
    size: int
    why: str


@dataclass(kw_only=True)
class Report:
    """What `collect` found, and freed if it was asked to."""

    deleted: bool
    """Whether `garbage` was freed, or would be."""
    garbage: list[Garbage] = field(default_factory=list[Garbage])
    kept: list[str] = field(default_factory=list[str])
    """Buckets whose leftovers stay, with the reason."""
    unknown: dict[str, int] = field(default_factory=dict[str, int])
    """Sizes of objects that are not the store's; never touched."""

    @property
    def bytes(self) -> int:
        """Sum of the sizes of all garbage."""
        return sum(g.size for g in self.garbage)


class Names:
    """What the names below a store's root stand for."""

    def __init__(self, spec: StoreSpec) -> None:
        """Names in a store of this spec."""
        self._arrays = arrays(spec)
        self._own = {GROUP_KEY, manifest.HEAD_KEY, *metadata_objects(spec), *map(calibration_key, spec.sites)}

    def shard(self, key: str) -> tuple[ArraySpec, int] | None:
        """Array and number of the shard of this name, within the rows or beyond; None for other names."""
        name, _, rest = key.partition("/c/")
        array, number = self._arrays.get(name), rest.partition("/")[0]
        if array is None or not (number.isascii() and number.isdigit()) or len(number) > 18:
            return None
        return (array, int(number)) if array.shard_key(int(number)) == key else None

    def manifest(self, key: str) -> bool:
        """Whether the name is that of a part of the manifest, or of a table."""
        table = manifest.TABLE.fullmatch(key)
        return bool(_PART.fullmatch(key)) or (table is not None and table[1] in self._arrays)

    def other(self, key: str) -> bool:
        """Whether the name is that of any other object of a store: metadata, commits, calibrations, tokens, logs."""
        logs_or_tokens = key.startswith(("tokens/", f"{EVENTS}/"))
        return key in self._own or logs_or_tokens or self.manifest(key) or record.bucket_of(key) is not None


def collect(url: str | Path, *, older_than: float = 24.0, delete: bool = False) -> Report:
    """Find garbage older than `older_than` hours, and free it if `delete`.

    Committed buckets, tokens and metadata are never touched. Raises `StoreError` for a store whose metadata is damaged:
    there nothing is known to be garbage.
    """
    if not (math.isfinite(older_than) and older_than >= 0):
        raise ValueError(f"older_than is {older_than}, expected a number of hours, 0 or more")
    storage = open_storage(url)
    report = Report(deleted=delete)
    spec, head = read_spec(storage), read_head(storage)
    before = time.time() - 3600 * older_than
    exist, names = set(committed(storage, spec).tolist()), Names(spec)
    if head is not None:  # also where their records are damaged
        exist |= set(range(head.spec.buckets))
    leftovers: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    tables: dict[str, int] = {}
    for key, size in storage.list("").items():
        found = names.shard(key)
        if found is not None:
            array, number = found
            bucket = number * array.shard_rows // spec.bucket_rows
            if bucket not in exist and size != tail_bytes(array.chunks_per_shard):
                leftovers[bucket][key] = size, array.chunks_per_shard
        elif names.manifest(key):
            tables[key] = size
        elif not names.other(key):
            report.unknown[key] = size
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-gc") as pool:
        jobs = [_Bucket(storage, spec, bucket, shards) for bucket, shards in sorted(leftovers.items())]
        for garbage, kept in pool.map(lambda b: b.collect(before, delete=delete), jobs):
            report.garbage += garbage
            report.kept += kept
    report.garbage += _old_tables(storage, spec, head, tables, before, delete=delete)
    if isinstance(storage, LocalStorage):
        _partials(storage, report, before)
    return report


@dataclass(frozen=True)
class _Bucket:
    """A bucket that is not committed, with the shards that lie there."""

    storage: Storage
    spec: StoreSpec
    bucket: int
    shards: Mapping[str, tuple[int, int]]
    """Size of each object, and chunks that it has room for."""

    def collect(self, before: float, *, delete: bool) -> tuple[list[Garbage], list[str]]:
        """What to free here, freed if `delete`, and the reason if something stays."""
        key = record.commit_key(self.bucket)
        seen = self.storage.stat(key)
        if seen is not None:
            data = self.storage.get(key, METADATA_LIMIT)
            if len(data) > record.INTENT_BYTES:
                return [], [f"bucket {self.bucket} was committed just now"]
            record.from_bytes(data, self.spec, self.bucket)  # a damaged object is no intent: it may have been a record
        dated = [seen] if seen else [self.storage.stat(shard) for shard in self.shards]
        newest = max((s.modified for s in dated if s), default=0.0)
        if newest > before:
            return [], [f"bucket {self.bucket} was worked on {max(time.time() - newest, 0) / 3600:.2f} hours ago"]
        beyond = self.bucket >= self.spec.buckets
        why = "beyond the store's rows" if beyond else f"of bucket {self.bucket}, which nobody committed"
        garbage = [Garbage(key=shard, size=size, why=why) for shard, (size, _) in self.shards.items()]
        if not delete:
            return garbage, []
        steps = protocol.take_over(self.bucket, protocol.new_id("gc-"), seen.version if seen else None)
        attempt = protocol.run(self.storage, steps)
        for i, (shard, (_, capacity)) in enumerate(self.shards.items()):
            if isinstance(attempt, NotWritten) or not protocol.run(
                self.storage, protocol.put_over(attempt, shard, tail((), capacity, attempt.id))
            ):
                return garbage[:i], [f"bucket {self.bucket} is being written"]
        return garbage, []


def _old_tables(
    storage: Storage,
    spec: StoreSpec,
    head: manifest.Head | None,
    objects: Mapping[str, int],
    before: float,
    *,
    delete: bool,
) -> Iterator[Garbage]:
    """Parts and tables of the manifest that neither the head nor a part of the store as it is names."""
    used: set[str] = set()
    if head is not None:
        used |= {manifest.part_key(head.spec, number) for number in range(manifest.num_parts(head.spec))}
        used |= {manifest.table_key(n, i, crc) for n, crcs in head.tables.items() for i, crc in enumerate(crcs)}
    for number in range(manifest.num_parts(spec) if objects else 0):
        if (key := manifest.part_key(spec, number)) in objects and (part := read_part(storage, spec, number)):
            used |= {key, *(manifest.table_key(n, number, crc) for n, crc in part.tables.items())}
    for key in objects.keys() - used:
        old = storage.stat(key)
        if old is not None and old.modified <= before:
            yield Garbage(key=key, size=objects[key], why="a table that no manifest names")
            if delete:
                storage.delete(key)


def _partials(storage: LocalStorage, report: Report, before: float) -> None:
    """Old partial files of killed writers."""
    for path in storage.partials():
        key = path.relative_to(storage.root).as_posix()
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        if not PARTIAL_NAME.fullmatch(path.name):
            report.unknown[key] = found.st_size
        elif found.st_mtime <= min(before, time.time() - _PARTIAL_SECONDS):
            report.garbage.append(Garbage(key=key, size=found.st_size, why="a write that was never finished"))
            if report.deleted:
                path.unlink(missing_ok=True)
