"""Reading a store: what it holds, where each chunk lies, and its arrays through zarr.

Only committed buckets exist here. `stream/` reads chunks through `Index.locate`; `store[name]` is the plain zarr
array for everything else (uncommitted buckets read as zeros there: that is zarr's rule for missing chunks).
"""

import hashlib
import os
import warnings
from functools import cached_property
from typing import Any

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray

from actstore.errors import IntegrityError, StoreError
from actstore.store import codec, fixed, manifest
from actstore.store.spec import (
    BITS,
    GROUP_KEY,
    PROVENANCE_ARRAYS,
    SiteSpec,
    StoreSpec,
    calibration_key,
    dump,
    metadata_objects,
)
from actstore.store.stats import SiteStats, Sums, summarise
from actstore.store.storage import LocalStorage, Storage, open_storage


class Store:
    """An activation store as it was when it was opened; read-only."""

    def __init__(self, storage: Storage) -> None:
        """Read the index of committed buckets: one GET if the store is finished."""
        self.storage = storage
        self.index = manifest.load(storage)
        self.spec: StoreSpec = self.index.spec

    @property
    def url(self) -> str:
        """Where the store is."""
        return self.storage.url

    @property
    def sites(self) -> dict[str, SiteSpec]:
        """Width and encoding by site name."""
        return self.spec.sites

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, tokens and versions, as recorded at capture."""
        return self.spec.provenance

    @property
    def rows(self) -> int:
        """Committed rows."""
        full = len(self.index.buckets) * self.spec.bucket_rows
        short = self.spec.buckets * self.spec.bucket_rows - self.spec.rows
        has_last = len(self.index.buckets) > 0 and int(self.index.buckets[-1]) == self.spec.buckets - 1
        return full - (short if has_last else 0)

    @property
    def complete(self) -> bool:
        """Whether every planned row is committed."""
        return self.index.complete

    @property
    def stored_bytes(self) -> int:
        """Bytes of all committed objects: data, provenance and shard indexes."""
        return self.index.stored_bytes()

    @property
    def raw_bytes(self) -> int:
        """Bytes of the sites' committed activations before compression: float32 for `f32` sites, else bfloat16."""
        return self.rows * sum(s.d * (4 if s.kind == "f32" else 2) for s in self.sites.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the spec and of the crc32c of every committed chunk: equal content, equal fingerprint."""
        h = hashlib.blake2b(dump(self.spec.to_json()), digest_size=16)
        h.update(self.index.buckets.astype("<i8").tobytes())
        for name in sorted(self.index.arrays):
            h.update(self.index.arrays[name].crc32c.astype("<u4", copy=False).data)
        h.update(np.array([crc for _, crc in sorted(self.index.calibration.items())], "<u4").tobytes())
        return h.hexdigest()

    def stats(self, site: str) -> SiteStats:
        """Statistics of a site over all committed rows."""
        self.check_site(site)
        if not len(self.index.buckets):
            raise StoreError(
                f"{self.url} has no committed bucket yet, so it has no statistics; let a capture finish one"
            )
        return summarise(self._sums[site])

    @cached_property
    def _sums(self) -> dict[str, Sums]:
        return manifest.merged_stats(self.storage, self.index)

    def calibration(self, site: str) -> fixed.Calibration:
        """Steps and offsets of a `fixed` site; `IntegrityError` unless they are what the buckets were written with."""
        self.check_site(site)
        if site not in self.index.calibration:
            raise ValueError(f"{site} is stored as {self.sites[site].encoding}, which has no calibration")
        key, d = calibration_key(site), self.sites[site].d
        data = self.storage.get(key, 16 * d)
        found = fixed.from_bytes(data, d, f"{self.url}/{key}")
        if fixed.digest(data) != self.index.calibration[site]:
            raise IntegrityError(f"{self.url}/{key}: is not the calibration that {site} was written with")
        return found

    def check_site(self, site: str) -> None:
        """`ValueError` unless the store holds `site`."""
        if site not in self.sites:
            raise ValueError(f"the store at {self.url} has no site {site!r}; it has {', '.join(sorted(self.sites))}")

    def read_chunk(self, name: str, place: int, chunk: int) -> NDArray[Any]:
        """Chunk `chunk` of the bucket at row `place` of the index, checked and decoded [rows there, ...].

        bf16 comes as its bits (uint16), `fixed` as its codes (int16).
        """
        where = self.index.arrays[name]
        array = where.array
        bucket = int(self.index.buckets[place])
        at = where.locate(place, bucket, chunk)
        decoded = np.empty(array.chunk_bytes, np.uint8)
        data = self.storage.get_range(at.key, at.offset, at.length)
        what = f"{self.url}/{at.key} chunk at byte {at.offset}"
        codec.decode_into(data, array.codec, decoded, what, committed=at.crc32c)
        dtype = BITS if array.dtype.name == "bfloat16" else array.dtype
        rows = codec.merge(decoded, array.codec, dtype).reshape(array.chunk_rows, *array.shape[1:])
        first, stop = self.spec.bucket_range(bucket)
        return rows[: min(array.chunk_rows, stop - first - chunk * array.chunk_rows)]

    def __getitem__(self, name: str) -> zarr.Array[Any]:
        """The zarr array of a site or of `sequence`, `position`, `token_id`."""
        if name not in (*self.sites, *PROVENANCE_ARRAYS):
            self.check_site(name)
        key = f"{name}/{GROUP_KEY}"
        if self.storage.get(key, 1 << 20) != metadata_objects(self.spec)[key]:
            raise IntegrityError(f"{self.url}/{key}: is not the array metadata that the store's spec asks for")
        local = isinstance(self.storage, LocalStorage)
        root = self.url if local else zarr.storage.FsspecStore.from_url(self.url, read_only=True)
        with warnings.catch_warnings():
            # zarr warns that numcodecs.shuffle is outside its specification; the format says so itself.
            warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
            return zarr.open_array(root, path=name, mode="r")


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open a store read-only; `StoreError` if there is none at `url`."""
    return Store(open_storage(url))
