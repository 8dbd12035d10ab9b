"""The second half of a move: deleting a store whose copy is proven, so that it can be interrupted anywhere.

The source's manifest is deleted first, and its group replaced by a mark: from then on nobody can open it, and whoever
looks finds what happened. Records, shards and the rest go next, the mark last. Only objects with names of this store
are deleted. The price is reading the whole destination back before.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actstore.errors import StoreError
from actstore.progress import Progress
from actstore.store.format import manifest, record
from actstore.store.format.spec import (
    EVENTS,
    GROUP_KEY,
    METADATA_LIMIT,
    SEAL,
    UNSEALED,
    StoreSpec,
    arrays,
    dump,
    load_sealed,
)
from actstore.store.maintain.gc import PARTIAL_NAME, Names
from actstore.store.maintain.verify import verify
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
    return remove(source.storage, source.spec, source.fingerprint)


def moving(storage: Storage) -> str | None:
    """The fingerprint of the store that a move has begun to delete here; None if there is no such thing."""
    try:
        parsed = load_sealed(storage.get(GROUP_KEY, METADATA_LIMIT), GROUP_KEY)
        return str(parsed["attributes"][_MOVED]["fingerprint"])
    except (StoreError, KeyError, TypeError):
        return None


def remove(storage: Storage, spec: StoreSpec, fingerprint: str) -> list[str]:
    """Delete a store, from what makes it readable to what it holds; returns the objects that are not the store's."""
    mark = {_MOVED: {SEAL: UNSEALED, "fingerprint": fingerprint}}
    storage.delete(manifest.MANIFEST_KEY)  # until the mark is there the store is whole, opened from its records
    storage.put(GROUP_KEY, dump({"zarr_format": 3, "node_type": "group", "attributes": mark}))
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
        _prune(storage, [*arrays(spec), record.COMMITS, "calibration", "tokens", EVENTS])
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
