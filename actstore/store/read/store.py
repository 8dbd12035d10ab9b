"""Reading a store: what it holds, where each chunk lies, and its arrays through zarr.

Only committed buckets exist here. `stream/` reads chunks through `Index.locate`; `store[name]` is a zarr array for
everything else. Its chunks come from `read_chunk`, because zarr alone reads a lost shard as zeros, and takes an intact
chunk in the wrong place. Places behind a short bucket hold no row: they read as NaN, -1 or `GAP_CODE`, never as zero. A
chunk of a bucket that is not committed raises `StoreError`.
"""

import asyncio
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import MemoryStore, WrapperStore

from actstore.errors import IntegrityError, StoreError, warn
from actstore.store.format import codec, fixed
from actstore.store.format.sealed import dump
from actstore.store.format.spec import (
    BITS,
    GROUP_KEY,
    OPEN_ENDED,
    PROVENANCE_ARRAYS,
    SiteSpec,
    StoreSpec,
    calibration_key,
    group_metadata,
)
from actstore.store.format.stats import SiteStats, summarise
from actstore.store.read.index import Index, Location, load
from actstore.store.storage import Storage, open_storage

if TYPE_CHECKING:
    from actstore.store.read.sequences import Pool, SequenceIndex, Sequences


class Store:
    """An activation store as it was when it was opened; read-only."""

    def __init__(self, storage: Storage, index: Index | None = None) -> None:
        """Read the index of committed buckets, unless it is given: one GET if the store is finished."""
        self.storage = storage
        self.index = load(storage) if index is None else index
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
        return self.index.rows

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

    @property
    def fingerprint(self) -> str:
        """Hash of the spec and of the crc32c of every committed chunk: equal content, equal fingerprint."""
        return self.index.fingerprint

    def snapshot(self) -> dict[str, Any]:
        """What `reopen` needs, as JSON values, to open the store as it is here, whatever is committed later."""
        return {
            "url": self.url,
            "fingerprint": self.fingerprint,
            "spec": group_metadata(self.spec).decode(),
            "buckets": None if self.complete else self.index.buckets.tolist(),
        }

    def stats(self, site: str) -> SiteStats:
        """Statistics of a site over all committed rows."""
        self.check_site(site)
        if not len(self.index.buckets):
            raise StoreError(
                f"{self.url} has no committed bucket yet, so it has no statistics; let a capture finish one"
            )
        return summarise(self.index.stats[site])

    def remarks(self, sites: Iterable[str] | None = None) -> list[str]:
        """What a user of these sites (default: all) should know, a line each; empty if all is as expected."""
        names = self.sites if sites is None else sites
        found = [line for site in names if site in self.index.stats for line in self.index.stats[site].remarks(site)]
        if not self.complete:
            planned = "an open-ended number of" if self.spec.rows == OPEN_ENDED else str(self.spec.planned_rows)
            found.append(f"the store is unfinished: {self.rows} of {planned} rows are committed")
        return found

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

    def owner(self, name: str) -> "Store":  # noqa: ARG002  of joined stores it depends on the name
        """The store that holds array `name`."""
        return self

    def check_site(self, site: str) -> None:
        """`ValueError` unless the store holds `site`."""
        if site not in self.sites:
            raise ValueError(f"the store at {self.url} has no site {site!r}; it has {', '.join(sorted(self.sites))}")

    def read_chunk(self, name: str, place: int, chunk: int) -> NDArray[Any]:
        """Chunk `chunk` of the bucket at row `place` of the index, checked and decoded [rows there, ...].

        bf16 comes as its bits (uint16), `fixed` as its codes (int16).
        """
        bucket, array = int(self.index.buckets[place]), self.index.arrays[name].array
        first, stop = self.spec.bucket_range(bucket)
        rows = self._whole_chunk(name, place, chunk)
        return rows[: min(array.chunk_rows, stop - first - chunk * array.chunk_rows)]

    def _whole_chunk(self, name: str, place: int, chunk: int) -> NDArray[Any]:
        """`read_chunk` with the rows that fill up the last one [chunk_rows, ...]."""
        at = self.index.arrays[name].locate(place, int(self.index.buckets[place]), chunk)
        return self.decode_chunk(name, at, self.owner(name).storage.get_range(at.key, at.offset, at.length))

    def decode_chunk(self, name: str, at: Location, data: bytes | memoryview) -> NDArray[Any]:
        """Check and decode the stored bytes of a chunk of array `name` [chunk_rows, ...], see `read_chunk`."""
        array = self.index.arrays[name].array
        decoded = np.empty(array.chunk_bytes, np.uint8)
        what = f"{self.owner(name).url}/{at.key} chunk at byte {at.offset}"
        codec.decode_into(data, array.codec, decoded, what, committed=at.crc32c)
        dtype = BITS if array.dtype.name == "bfloat16" else array.dtype
        return codec.merge(decoded, array.codec, dtype).reshape(array.chunk_rows, *array.shape[1:])

    def chunk_at(self, name: str, number: int) -> NDArray[Any] | None:
        """Chunk `number` of the array, counted over all buckets, whole; None behind the rows of a short bucket."""
        bucket, chunk = divmod(number, self.spec.bucket_rows // self.spec.chunk_rows)
        first, stop = self.spec.bucket_range(bucket)
        rows = stop - first - chunk * self.spec.chunk_rows
        if rows <= 0:
            return None
        place = self.index.place(bucket)
        if place is None:
            raise StoreError(
                f"{self.url}: rows {first} to {stop - 1} (bucket {bucket}) are not committed, so {name} can't be read "
                f"there; the store is unfinished, it has {self.rows} rows"
            )
        found = self._whole_chunk(name, place, chunk)
        found[rows:] = self.gap(name)[0]
        return found

    def take(self, numbers: ArrayLike, sites: str | Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Rows by number, in the order asked and as often as asked.

        Rows are numbered by (sequence, position) before buckets permute them (docs/format.md), from 0 to `spec.rows`;
        they come as {site: [n, d]} with `sequence`, `position` and `token_id` [n] int32. bf16 sites are
        `ml_dtypes.bfloat16`, f32 and fixed sites float32. Memory: the result and 0.5 GiB.

        Args:
            numbers: row numbers [n].
            sites: one site or several, default all.

        Raises:
            ValueError: for a site or a row that the store does not have, and a number that is not whole.
            StoreError: for a row that is not committed, and for bytes that can't be read or are damaged.

        """
        from actstore.store.read.rows import committed_rows, read_rows, site_names

        return read_rows(self, committed_rows(self, numbers), [*site_names(self, sites), *PROVENANCE_ARRAYS])

    def sequence(self, number: int, sites: str | Sequence[str] | None = None) -> dict[str, Any]:
        """The kept rows of one sequence, by position: {site: [n, d]} as in `take`, `position` and `token_id` [n].

        "sequence" is its number. Its rows lie in most chunks of their bucket: `sequences` reads many far sooner.

        Raises:
            ValueError: for a site or a sequence that the store does not have.
            StoreError: if sequences don't ascend with row numbers or are unknown, if this one may go on in a bucket
                that is not committed, and for bytes that can't be read or are damaged.

        """
        return self._sequence_index.read(number, sites)

    def sequences(
        self,
        sites: str | Sequence[str] | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        start: int = 0,
        pool: "Pool | None" = None,
        pairs: bool = False,
    ) -> "Sequences":
        """An iterator over all sequences, each whole and once, as `sequence` returns them.

        Memory: a bucket of these sites, 0.5 GiB, and the pieces of sequences whose other bucket is still to come:
        one piece, or with `shuffle` up to two for each bucket that was read.

        Args:
            sites: one site or several, default all.
            shuffle: buckets in an order keyed by `seed`, and the sequences within each too; else ascending.
            seed: key of the order.
            start: pass over so many sequences of this order: those that a run which was stopped had already.
            pool: a site is one vector [d]: "last", the last kept token's, or "mean", in float64 rounded to float32.
            pairs: every array is two, whose rows i are kept positions p and p + 1 of the sequence.

        Returns:
            The iterator. Its `left_out` counts sequences that may go on in buckets that are not committed.

        Raises:
            ValueError, StoreError: as `sequence`, at once; bytes that can't be read raise when their turn comes.

        """
        from actstore.store.read.sequences import Sequences

        found = Sequences(self._sequence_index, sites, shuffle=shuffle, seed=seed, start=start, pool=pool, pairs=pairs)
        if found.left_out:
            warn(f"{self.url}: {found.left_out} sequences are left out, since buckets beside theirs are not committed")
        return found

    @cached_property
    def _sequence_index(self) -> "SequenceIndex":
        from actstore.store.read.sequences import SequenceIndex

        return SequenceIndex(self)

    def gap(self, name: str) -> tuple[Any, Any]:
        """What stands for no row in decoded chunks of an array, and as zarr's fill value."""
        return _GAPS[self.sites[name].kind] if name in self.sites else (NO_ROW, NO_ROW)

    def __getitem__(self, name: str) -> zarr.Array[Any]:
        """A site, or `sequence`, `position`, `token_id`, as a zarr array; a damaged chunk raises `IntegrityError`."""
        if name not in (*self.sites, *PROVENANCE_ARRAYS):
            self.check_site(name)
        return zarr.open_array(DecodedChunks(self, name), mode="r")


NO_ROW = -1
"""What `sequence`, `position` and `token_id` read as where there is no row."""
GAP_CODE = -(1 << 15)
"""What a `fixed` site's codes read as where there is no row."""
_GAPS: dict[Any, tuple[Any, Any]] = {"bf16": (0x7FC0, "NaN"), "f32": (np.nan, "NaN"), "fixed": (GAP_CODE, GAP_CODE)}
"""By encoding: what stands for no row in decoded chunks, and as zarr's fill value."""


class DecodedChunks(WrapperStore[MemoryStore]):
    """What zarr reads of one array: metadata of unsharded, plain chunks, and chunks as `Store` checks and decodes."""

    def __init__(self, store: Store, name: str) -> None:
        """Array `name` of `store`."""
        array = store.index.arrays[name].array
        grid = {"name": "regular", "configuration": {"chunk_shape": [array.chunk_rows, *array.shape[1:]]}}
        plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
        fill = store.gap(name)[1]
        metadata = dump({**array.metadata(), "chunk_grid": grid, "codecs": plain, "fill_value": fill})
        super().__init__(MemoryStore({GROUP_KEY: cpu.Buffer.from_bytes(metadata)}, read_only=True))
        self.store, self.name = store, name

    def __eq__(self, value: object) -> bool:
        """Whether it is the same array of the same store."""
        return isinstance(value, DecodedChunks) and (value.store.url, value.name) == (self.store.url, self.name)

    def __hash__(self) -> int:
        """Of what `__eq__` compares."""
        return hash((self.store.url, self.name))

    def __str__(self) -> str:
        """Where the array is."""
        return f"{self.store.url}/{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        """The receiving process opens the store itself."""
        return _reopen, (self.store.snapshot(), self.name)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The metadata or a whole chunk; None for a chunk that holds no row."""
        if not key.startswith("c/"):
            return await super().get(key, prototype, byte_range)
        if byte_range is not None:
            raise NotImplementedError("chunks are read as a whole")
        rows = await asyncio.to_thread(self.store.chunk_at, self.name, int(key.split("/")[1]))
        return None if rows is None else prototype.buffer.from_bytes(rows.tobytes())


def _reopen(snapshot: dict[str, Any], name: str) -> DecodedChunks:
    from actstore.store.read.join import reopen

    return DecodedChunks(reopen(snapshot), name)


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open a store read-only; `StoreError` if there is none at `url`."""
    return Store(open_storage(url))
