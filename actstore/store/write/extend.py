"""Changing how many rows a store has: fixing an open-ended number, and extending a finished store.

The group's spec is replaced by compare-and-swap, after the arrays' metadata, so whoever reads the number of rows finds
arrays that have them. Nothing that is committed changes. An extension starts at a new bucket: the last one may be
short, its rows were shuffled as they are, and the places behind it stay empty (`short_buckets`). Readers see the store
as it was until the extension is finalised.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from actstore.errors import StoreError, mismatch
from actstore.store.format import manifest
from actstore.store.format.spec import GROUP_KEY, StoreSpec, group_metadata, metadata_objects
from actstore.store.storage import Storage
from actstore.store.write.attempt import SWAPS


def change_spec(storage: Storage, change: Callable[[StoreSpec], StoreSpec]) -> StoreSpec:
    """Replace the group's spec by `change` of it; returns what it is then. Harmless to repeat."""
    for _ in range(SWAPS):
        seen = storage.stat(GROUP_KEY)
        found = manifest.read_spec(storage)
        spec = change(found)
        for key, data in metadata_objects(spec).items():
            storage.put(key, data)
        if spec == found or (seen and storage.replace(GROUP_KEY, group_metadata(spec), seen.version)):
            return spec
    raise StoreError(f"{storage.url}/{GROUP_KEY} changed {SWAPS} times while rows was being set; try again")


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
        if not manifest.load_current(storage).complete:
            raise StoreError(f"{storage.url} is unfinished; finish it with the command that began it, then extend it")
        _, end = spec.bucket_range(spec.buckets - 1)
        first = spec.buckets * spec.bucket_rows
        short = ((spec.buckets - 1, end % spec.bucket_rows),) if end < first else ()
        entry = {"first_bucket": spec.buckets, "rows": rows, **about}
        return replace(
            spec,
            rows=first + rows,
            short_buckets=spec.short_buckets + short,
            provenance={**spec.provenance, manifest.EXTENSIONS: [*made, entry]},
        )

    return change_spec(storage, changed)


def extensions(spec: StoreSpec) -> list[dict[str, Any]]:
    """What the store was extended with, in order; `StoreError` if its provenance can't be so."""
    found: Any = spec.provenance.get(manifest.EXTENSIONS, [])
    firsts = [0]
    for e in found if isinstance(found, list) else [None]:
        first, rows = (e.get("first_bucket"), e.get("rows")) if isinstance(e, dict) else (None, None)
        if type(first) is not int or type(rows) is not int or not firsts[-1] < first < spec.buckets:
            raise StoreError(f"provenance {manifest.EXTENSIONS} is {str(found)[:80]}, expected ascending first buckets")
        firsts.append(first)
    return found
