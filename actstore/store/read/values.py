"""Rows of a store as values, whatever they are stored as: what copying and exporting read.

Bits stay bits: bf16 is only ever widened, which is exact, `fixed` codes become float32 through the site's calibration,
and float32 rounds to nearest even where bf16 is asked for.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.store.format import fixed
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.spec import BITS, FLOATS
from actstore.store.read.store import Store


class Values:
    """One array of a store, decoded chunk by chunk; safe to use from several threads."""

    def __init__(self, store: Store, name: str, dtype: np.dtype[Any] | None = None) -> None:
        """Read `name` as bf16 bits (uint16) or float32; None: bits for `bf16`, float32 for other sites, else int32."""
        self._store, self._name = store, name
        self._calibration: fixed.Calibration | None = None
        self.dtype = np.dtype("<i4")
        if name in store.sites:
            kind = store.sites[name].kind
            self.dtype = dtype or (BITS if kind == "bf16" else FLOATS)
            if kind == "fixed" and len(store.index.buckets):
                self._calibration = store.calibration(name)

    def chunk(self, place: int, chunk: int) -> NDArray[Any]:
        """Chunk `chunk` of the bucket at row `place` of the index [rows there, ...]."""
        return self.convert(self._store.read_chunk(self._name, place, chunk))

    def convert(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Decoded rows [n, ...] as `dtype`."""
        if self._calibration is not None:
            rows = fixed.dequantise(rows, self._calibration)
        if rows.dtype == self.dtype:
            return rows
        if rows.dtype == BITS:
            return (rows.astype(np.uint32) << np.uint32(16)).view(FLOATS)
        return rows.astype(BFLOAT16).view(BITS)


class Rows(Protocol):
    """Rows of one array, in memory or elsewhere: what a bucket's writer needs of a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, d] or [n]."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""
        ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """A run of rows."""
        ...


class BucketRows:
    """One array of one bucket in stored order, read as it is sliced: the `Rows` that `write_arrays` takes."""

    def __init__(self, values: Values, store: Store, name: str, place: int) -> None:
        """The bucket is at row `place` of the store's index."""
        first, stop = store.spec.bucket_range(int(store.index.buckets[place]))
        self._values, self._place, self._chunk_rows = values, place, store.spec.chunk_rows
        self.shape = (stop - first, *store.index.arrays[name].array.shape[1:])
        self.dtype = values.dtype

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """A run of rows; each chunk that it touches is read once."""
        start, stop, _ = rows.indices(self.shape[0])
        parts: list[NDArray[Any]] = []
        for chunk in range(start // self._chunk_rows, -(-stop // self._chunk_rows)):
            first = chunk * self._chunk_rows
            parts.append(self._values.chunk(self._place, chunk)[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *parts])
