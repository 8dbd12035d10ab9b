"""Freeing what dead attempts left behind, without ever touching what is committed or alive.

Garbage is: shards of buckets that nobody committed and nobody has been at for a while, shards beyond the store's rows,
and, in a directory, old partial files. Only objects with the name of a shard of this store are touched; what has any
other name is reported and left alone.

A bucket with leftovers is first taken over, as an attempt would do it: gc puts its own intent at the commit key, by
compare-and-swap against the intent whose age it judged. From then on the earlier attempt can't commit, however alive it
is. gc's intent stays; the next attempt takes it over in turn. That attempt may come at any moment, so a leftover is not
deleted, which no object store does conditionally and which could hit the new attempt's shard: it is replaced, by
compare-and-swap, by an empty shard of a few hundred bytes, which zarr reads as zeros and the next attempt writes over.
Shards beyond the rows belong to no bucket, so they and partial files are deleted; partial files never within ten
minutes of their last byte, because their writer may live. Ages compare this machine's clock with the times that the
storage states.
"""

import math
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from actstore.errors import MissingError
from actstore.store.format import manifest, record
from actstore.store.format.shard import footer, index_bytes
from actstore.store.format.spec import EVENTS, GROUP_KEY, METADATA_LIMIT, ArraySpec, StoreSpec, arrays, calibration_key
from actstore.store.storage import LocalStorage, Stat, Storage, open_storage

PARTIAL_NAME = re.compile(r".+\.[0-9a-f]{16}\.partial")
"""What `LocalStorage` calls its partial files; no other file is deleted."""
_PARTIAL_SECONDS = 600
_WORKERS = 16


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
        self.spec = spec
        self._arrays = arrays(spec)

    def shard(self, key: str) -> tuple[ArraySpec, int] | None:
        """Array and number of the shard of this name, within the rows or beyond; None for other names."""
        name, _, rest = key.partition("/c/")
        array, number = self._arrays.get(name), rest.partition("/")[0]
        if array is None or not (number.isascii() and number.isdigit()) or len(number) > 18:
            return None
        return (array, int(number)) if array.shard_key(int(number)) == key else None

    def other(self, key: str) -> bool:
        """Whether the name is that of any other object of a store: metadata, commits, calibrations, tokens, logs."""
        if key in (GROUP_KEY, manifest.MANIFEST_KEY) or key.startswith(("tokens/", f"{EVENTS}/")):
            return True
        if key.startswith(f"{record.COMMITS}/"):
            stem = key.removeprefix(f"{record.COMMITS}/").removesuffix(".json")
            number = int(stem) if stem.isascii() and stem.isdigit() and len(stem) <= 18 else -1
            return 0 <= number < self.spec.buckets and record.commit_key(number) == key
        owner = key.removeprefix("calibration/").removesuffix(f"/{GROUP_KEY}")
        return any(key == calibration_key(s) for s in self.spec.sites) or (
            key.endswith(f"/{GROUP_KEY}") and owner in self._arrays
        )


def collect(url: str | Path, *, older_than: float = 24.0, delete: bool = False) -> Report:
    """Find garbage older than `older_than` hours, and free it if `delete`.

    Committed buckets, tokens and metadata are never touched. Raises `StoreError` for a store whose metadata is damaged:
    there nothing is known to be garbage.
    """
    if not (math.isfinite(older_than) and older_than >= 0):
        raise ValueError(f"older_than is {older_than}, expected a number of hours, 0 or more")
    storage = open_storage(url)
    report = Report(deleted=delete)
    index = manifest.load_current(storage)
    before = time.time() - 3600 * older_than
    committed, names = set(index.buckets.tolist()), Names(index.spec)
    leftovers: dict[int, dict[str, int]] = defaultdict(dict)
    beyond: dict[str, int] = {}
    for key, size in storage.list("").items():
        found = names.shard(key)
        if found is None:
            if not names.other(key):
                report.unknown[key] = size
            continue
        array, number = found
        first_row = number * array.shard_rows
        if first_row >= index.spec.rows:
            beyond[key] = size
        elif first_row // index.spec.bucket_rows not in committed and size != index_bytes(array.chunks_per_shard):
            leftovers[first_row // index.spec.bucket_rows][key] = size
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-gc") as pool:
        made = [_Bucket(storage, names, bucket, shards) for bucket, shards in sorted(leftovers.items())]
        for garbage, kept in pool.map(lambda b: b.collect(before, delete=delete), made):
            report.garbage += garbage
            report.kept += kept
    report.garbage += _beyond(storage, beyond, before, delete=delete)
    if isinstance(storage, LocalStorage):
        _partials(storage, report, before)
    return report


@dataclass(frozen=True)
class _Bucket:
    """A bucket that is not committed, with the shards that lie there."""

    storage: Storage
    names: Names
    bucket: int
    shards: Mapping[str, int]

    def collect(self, before: float, *, delete: bool) -> tuple[list[Garbage], list[str]]:
        """What to free here, freed if `delete`, and the reason if something stays."""
        key = record.commit_key(self.bucket)
        seen = self.storage.stat(key)  # before the content whose age it stands for
        present = self._present()
        if isinstance(present, record.CommitRecord):
            return [], [f"bucket {self.bucket} was committed just now"]
        newest = seen.modified if seen else self._newest_shard()
        if newest > before:
            return [], [f"bucket {self.bucket} was worked on {max(time.time() - newest, 0) / 3600:.2f} hours ago"]
        why = f"of bucket {self.bucket}, which nobody committed"
        garbage = [Garbage(key=k, size=size, why=why) for k, size in self.shards.items()]
        if not delete:
            return garbage, []
        intent = self._take_over(seen)
        if intent is None:
            return [], [f"bucket {self.bucket} is being written"]
        for i, g in enumerate(garbage):
            if not self._empty(g.key, intent):
                return garbage[:i], [f"bucket {self.bucket} is being written"]
        return garbage, []

    def _present(self) -> record.CommitRecord | record.Intent | None:
        try:
            data = self.storage.get(record.commit_key(self.bucket), METADATA_LIMIT)
        except MissingError:
            return None
        return record.from_bytes(data, self.names.spec, self.bucket)

    def _newest_shard(self) -> float:
        found = [self.storage.stat(key) for key in self.shards]
        return max((s.modified for s in found if s), default=0.0)

    def _take_over(self, seen: Stat | None) -> bytes | None:
        """gc's own intent in the place of what was seen; None if something else is there by now."""
        key = record.commit_key(self.bucket)
        intent = record.intent_bytes(self.bucket, f"gc-{secrets.token_hex(8)}")
        swapped = self.storage.replace(key, intent, seen.version) if seen else self.storage.create(key, intent)
        return intent if swapped and self._holds(intent) else None

    def _holds(self, intent: bytes) -> bool:
        try:
            return self.storage.get(record.commit_key(self.bucket), METADATA_LIMIT) == intent
        except MissingError:
            return False

    def _empty(self, key: str, intent: bytes) -> bool:
        """Replace a leftover by an empty shard; False if another attempt is at the bucket."""
        found = self.names.shard(key)
        assert found
        # in this order, as in Attempt.put: what was there while the intent was ours is what may be replaced
        seen = self.storage.stat(key)
        if not self._holds(intent):
            return False
        return seen is None or self.storage.replace(key, footer((), found[0].chunks_per_shard), seen.version)


def _beyond(storage: Storage, shards: Mapping[str, int], before: float, *, delete: bool) -> list[Garbage]:
    """Old shards that lie beyond the store's rows, as a larger plan leaves them."""
    garbage: list[Garbage] = []
    for key, size in shards.items():
        seen = storage.stat(key)
        if seen and seen.modified <= before:
            garbage.append(Garbage(key=key, size=size, why="beyond the store's rows"))
            if delete:
                storage.delete(key)
    return garbage


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
