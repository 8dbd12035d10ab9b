"""The second half of a move: deleting a store whose copy is proven, so that it can be interrupted anywhere.

The source's group is first replaced by a mark, by compare-and-swap against the group that was copied. So an extension
that began meanwhile stops the move, and none can begin after it. Then the manifest goes, and nobody can open the store
any more; records, shards and the rest follow, the mark last. Only objects with names of this store are deleted. The
price is reading the whole destination back before.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from actstore.errors import StoreError
from actstore.progress import Progress
from actstore.store.format import manifest, record
from actstore.store.format.sealed import METADATA_LIMIT, SEAL, UNSEALED, decode, dump
from actstore.store.format.spec import EVENTS, GROUP_KEY, StoreSpec, arrays
from actstore.store.maintain.gc import PARTIAL_NAME, Names
from actstore.store.maintain.verify import verify
from actstore.store.read.index import read_spec
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage, Storage
from actstore.store.storage.local import LOCK

_DELETERS = 16
_MOVED = "actstore_moved"
"""Attribute of the mark: the fingerprint of the store that is being deleted."""


def move_away(source: Store, copied: Store, progress: Progress) -> list[str]:
    """Read the whole destination back, then delete the source; returns what is left there."""
    step = progress.step("verify", total=1, unit="rows")
    found = verify(copied.storage, deep=True, begin=step.expect, advance=step.advance)
    if found.damage or found.buckets != len(source.index.buckets):
        first = f"{found.damage[0].key}: {found.damage[0].problem}" if found.damage else f"{found.buckets} buckets"
        raise StoreError(f"{copied.url} is not the whole store ({first}); nothing was deleted at {source.url}")
    storage = source.storage
    seen = storage.stat(GROUP_KEY)
    if seen is None or read_spec(storage) != source.spec or not _mark(storage, source.fingerprint, seen.version):
        raise StoreError(
            f"{source.url} was changed while it was copied, so nothing was deleted there; run the same command again "
            "when its extension is finished"
        )
    return remove(storage, source.spec)


def _mark(storage: Storage, fingerprint: str, version: str) -> bool:
    mark = {_MOVED: {SEAL: UNSEALED, "fingerprint": fingerprint}}
    group = dump({"zarr_format": 3, "node_type": "group", "attributes": mark})
    return storage.replace(GROUP_KEY, group, version)


class _Mark(msgspec.Struct):
    fingerprint: str


class _Attributes(msgspec.Struct):
    actstore_moved: _Mark


class _Group(msgspec.Struct):
    attributes: _Attributes


def moving(storage: Storage) -> str | None:
    """The fingerprint of the store that a move has begun to delete here; None if there is no such thing."""
    try:
        return decode(storage.get(GROUP_KEY, METADATA_LIMIT), _Group, GROUP_KEY).attributes.actstore_moved.fingerprint
    except StoreError:
        return None


def remove(storage: Storage, spec: StoreSpec) -> list[str]:
    """Delete a marked store, from what makes it readable to what it holds; returns the objects that are not its own."""
    storage.delete(manifest.HEAD_KEY)
    names, left = Names(spec), list[str]()
    records, others = list[str](), list[str]()
    for key in storage.list(""):
        if not (names.shard(key) or names.other(key)):
            left.append(key)
        elif key != GROUP_KEY:
            (records if key.startswith(f"{record.COMMITS}/") else others).append(key)
    with ThreadPoolExecutor(_DELETERS, thread_name_prefix="actstore-delete") as pool:
        for keys in (records, others):
            for _ in pool.map(storage.delete, keys):
                pass
    storage.delete(GROUP_KEY)
    if isinstance(storage, LocalStorage):
        _prune(storage, [*arrays(spec), record.COMMITS, manifest.MANIFEST, "calibration", "tokens", EVENTS])
    return left


def _prune(storage: LocalStorage, folders: list[str]) -> None:
    """Remove a deleted store's partial files and empty directories; nothing outside its root."""
    for path in storage.partials():
        if PARTIAL_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for top in folders:
        if not (storage.root / top).is_symlink():
            for folder, _, _ in os.walk(storage.root / top, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
    if {path.name for path in storage.root.iterdir()} <= {LOCK}:
        (storage.root / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            storage.root.rmdir()
