"""Changing how many rows a store has: fixing an open-ended number, and extending a finished store.

The group's spec is replaced by compare-and-swap, and decides. The arrays' metadata, which repeats its number of rows
for plain zarr readers, follows it: each object is replaced by compare-and-swap too, after the spec was read. So when
several change a store at once, the last one to write metadata has read the last spec.

Nothing that is committed changes. An extension starts at a new bucket: the last one may be short, its rows were
shuffled as they are, and the places behind it stay empty (`short_buckets`). Readers see the store as it was until the
extension is finalised.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from actstore.errors import StoreError, mismatch
from actstore.store.format.spec import GROUP_KEY, StoreSpec, group_metadata, metadata_objects, spec_from_bytes
from actstore.store.read.index import EXTENSIONS, load_current, read_spec
from actstore.store.storage import Storage
from actstore.store.write.protocol import SWAPS, ContendedError, Request, Steps, run

_WORKERS = 16


def change_spec(storage: Storage, change: Callable[[StoreSpec], StoreSpec]) -> StoreSpec:
    """Replace the group's spec by `change` of it; returns what it is then. Harmless to repeat."""
    where = f"{storage.url}/{GROUP_KEY}"
    spec = run(storage, swap_spec(lambda data: change(spec_from_bytes(data, where))))
    write_metadata(storage)
    return spec


def swap_spec(change: Callable[[bytes], StoreSpec]) -> Steps[StoreSpec]:
    """Replace the group by the one of the spec that `change` makes of its content."""
    for _ in range(SWAPS):
        version = yield Request("version", GROUP_KEY)
        present = yield Request("get", GROUP_KEY)
        spec = change(present or b"")
        wanted = group_metadata(spec)
        if wanted == present or (version and (yield Request("replace", GROUP_KEY, wanted, version))):
            return spec
    raise ContendedError(GROUP_KEY)


def write_metadata(storage: Storage) -> None:
    """Make the metadata of every array what the group's spec asks for."""
    where = f"{storage.url}/{GROUP_KEY}"
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="actstore-metadata") as pool:
        keys = metadata_objects(read_spec(storage))
        list(pool.map(lambda key: run(storage, swap_metadata(key, where)), keys))


def swap_metadata(key: str, where: str) -> Steps[None]:
    """Make one array's metadata what the group asks for.

    Read the version before the group, so that the metadata of a later spec is not replaced by ours.
    """
    for _ in range(SWAPS):
        version = yield Request("version", key)
        group = yield Request("get", GROUP_KEY)
        wanted = metadata_objects(spec_from_bytes(group or b"", where))[key]
        if (yield Request("get", key)) == wanted:
            return
        put = Request("create", key, wanted) if version is None else Request("replace", key, wanted, version)
        if (yield put):
            return
    raise ContendedError(key)


def extend(storage: Storage, rows: int, about: Mapping[str, Any]) -> StoreSpec:
    """Plan `rows` more rows in new buckets of a finished store, or find that they are planned already.

    `about` says what they are made of (`provenance["extensions"]` records it, with `first_bucket` and `rows`): an
    extension with the same `about` is continued, not repeated. `StoreError` if the store is unfinished.
    """

    def changed(spec: StoreSpec) -> StoreSpec:
        made = extensions(spec)
        for e in made:
            if {k: v for k, v in e.items() if k not in ("first_bucket", "rows")} == about:
                if e["rows"] != rows:
                    raise mismatch("the extension", {"rows": e["rows"]}, {"rows": rows}, "Use the same settings.")
                return spec
        if not load_current(storage).complete:
            raise StoreError(f"{storage.url} is unfinished; finish it with the command that began it, then extend it")
        _, end = spec.bucket_range(spec.buckets - 1)
        first = spec.buckets * spec.bucket_rows
        short = ((spec.buckets - 1, end % spec.bucket_rows),) if end < first else ()
        entry = {"first_bucket": spec.buckets, "rows": rows, **about}
        return replace(
            spec,
            rows=first + rows,
            short_buckets=spec.short_buckets + short,
            provenance={**spec.provenance, EXTENSIONS: [*made, entry]},
        )

    return change_spec(storage, changed)


def extensions(spec: StoreSpec) -> list[dict[str, Any]]:
    """What the store was extended with, in order; `StoreError` if its provenance can't be so."""
    found: Any = spec.provenance.get(EXTENSIONS, [])
    firsts = [0]
    for e in found if isinstance(found, list) else [None]:
        first, rows = (e.get("first_bucket"), e.get("rows")) if isinstance(e, dict) else (None, None)
        if type(first) is not int or type(rows) is not int or not firsts[-1] < first < spec.buckets:
            raise StoreError(f"provenance {EXTENSIONS} is {str(found)[:80]}, expected ascending first buckets")
        firsts.append(first)
    return found
