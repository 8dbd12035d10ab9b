"""Stores read as one: row-aligned stores, such as one a layer, or a base and a tuned model over the same tokens."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from actstore.errors import StoreError, mismatch
from actstore.store.format.fixed import Calibration
from actstore.store.format.sealed import dump
from actstore.store.format.spec import PROVENANCE_ARRAYS, SiteSpec, spec_from_bytes
from actstore.store.read.index import ArrayIndex, Index, load_as
from actstore.store.read.store import Store, open_store

_GEOMETRY = ("rows", "bucket_rows", "chunk_rows", "seed", "short_buckets")
"""Fields of a spec that decide which row lies where."""


class JoinedStore(Store):
    """Several stores as one: their sites side by side, row by row. Provenance is the first one's."""

    def __init__(self, stores: Sequence[tuple[str, Store]]) -> None:
        """Join named stores; a site is called `name:site`, or by its own name if the store's name is empty."""
        self.stores = list(stores)
        first = stores[0][1]
        self._of = {name: (first, name) for name in PROVENANCE_ARRAYS}
        for name, store in stores:
            _check_aligned(first, store)
            for site in store.sites:
                called = f"{name}:{site}" if name else site
                if called in self._of:
                    raise ValueError(
                        f"{store.url} and {self._of[called][0].url} both hold {called}; name the stores: "
                        f'actstore.join({{"base": url, "tuned": url}}) has base:{called} and tuned:{called}'
                    )
                self._of[called] = store, site
        sites = {name: of for name, of in self._of.items() if name not in PROVENANCE_ARRAYS}
        prints = dump({"joined": [[name, store.fingerprint] for name, store in stores]})
        index = Index(
            spec=first.spec,
            buckets=first.index.buckets,
            arrays=_Arrays(self._of),
            stored={name: store.index.stored[own] for name, (store, own) in self._of.items()},
            calibration={n: s.index.calibration[own] for n, (s, own) in sites.items() if own in s.index.calibration},
            stats={n: s.index.stats[own] for n, (s, own) in sites.items() if own in s.index.stats},
            versions=first.index.versions,
            fingerprint=hashlib.blake2b(prints, digest_size=16).hexdigest(),
        )
        super().__init__(first.storage, index)

    @property
    def url(self) -> str:
        """Where the stores are."""
        return " & ".join(store.url for _, store in self.stores)

    @property
    def sites(self) -> dict[str, SiteSpec]:
        """Width and encoding by name."""
        return {name: s.sites[own] for name, (s, own) in self._of.items() if name not in PROVENANCE_ARRAYS}

    def owner(self, name: str) -> Store:
        """The store that holds array `name`."""
        return self._of[name][0]

    def calibration(self, site: str) -> Calibration:
        """See `Store`."""
        self.check_site(site)
        store, own = self._of[site]
        return store.calibration(own)

    def snapshot(self) -> dict[str, Any]:
        """See `Store`."""
        return {"joined": [(name, store.snapshot()) for name, store in self.stores]}


class _Arrays(Mapping[str, ArrayIndex]):
    """The arrays of joined stores, each read from its store when it is first asked for."""

    def __init__(self, of: Mapping[str, tuple[Store, str]]) -> None:
        self._of = of

    def __getitem__(self, name: str) -> ArrayIndex:
        store, own = self._of[name]
        return store.index.arrays[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _check_aligned(first: Store, other: Store) -> None:
    """`MismatchError`, field by field, unless two stores have the same rows in the same places."""
    if other is first:
        return
    here, there = ({name: getattr(s.spec, name) for name in _GEOMETRY} for s in (first, other))
    for found, store in ((here, first), (there, other)):
        buckets = store.index.buckets
        found["committed buckets"] = f"{len(buckets)}, of {store.spec.buckets}"
        tokens = store.provenance.get("tokens")
        found["token table"] = tokens.get("fingerprint") if isinstance(tokens, dict) else None
    if here == there and not np.array_equal(first.index.buckets, other.index.buckets):
        there["committed buckets"] += ", others"
    if here == there:
        apart = [name for name in PROVENANCE_ARRAYS if not _same(first, other, name)]
        here |= dict.fromkeys(apart, "as stored there")
        there |= dict.fromkeys(apart, "other values")
    if here != there:
        remedy = f"Only stores with the same rows in the same places can be joined; the other one is {first.url}."
        raise mismatch(f"the rows of {other.url}", there, here, remedy)


def _same(first: Store, other: Store, name: str) -> bool:
    """Whether an array of provenance holds the same values in both stores."""
    here, there = first.index.arrays[name], other.index.arrays[name]
    if here.array.codec == there.array.codec and np.array_equal(here.crc32c, there.crc32c):
        return True
    places, chunks = np.nonzero(here.chunks)
    return all(
        np.array_equal(first.read_chunk(name, p, c), other.read_chunk(name, p, c))
        for p, c in zip(places.tolist(), chunks.tolist(), strict=True)
    )


def join(stores: Sequence[str | os.PathLike[str] | Store] | Mapping[str, str | os.PathLike[str] | Store]) -> Store:
    """Row-aligned stores as one, for `ActivationDataset` and to be read.

    Args:
        stores: URLs or open stores whose sites have different names; or {name: store}, whose sites are then called
            `name:site`, such as base:resid_post.12 and tuned:resid_post.12.

    Raises:
        MismatchError: if the stores don't hold the same rows in the same places, field by field.
        ValueError: if there is none, or two sites would have one name.

    """
    named = list(stores.items()) if isinstance(stores, Mapping) else [("", store) for store in stores]
    opened = [(name, store if isinstance(store, Store) else open_store(store)) for name, store in named]
    if not opened:
        raise ValueError("stores is empty, expected row-aligned stores to join")
    return JoinedStore(opened)


def reopen(snapshot: dict[str, Any], *, grown: bool = False) -> Store:
    """The store of a `snapshot`; `StoreError` if what it held is there no more. `grown`: the store as it is now."""
    if "joined" in snapshot:
        return JoinedStore([(name, reopen(one, grown=grown)) for name, one in snapshot["joined"]])
    store = open_store(snapshot["url"])
    if grown:
        return store
    if store.fingerprint != snapshot["fingerprint"]:
        spec = spec_from_bytes(snapshot["spec"].encode(), f"the snapshot of {store.url}")
        buckets = np.arange(spec.buckets) if snapshot["buckets"] is None else np.array(snapshot["buckets"], np.int64)
        store = Store(store.storage, load_as(store.storage, spec, buckets))
    if store.fingerprint != snapshot["fingerprint"]:
        raise StoreError(f"{store.url}: holds other rows than when it was opened first; open it again and plan anew")
    return store
