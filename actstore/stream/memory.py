"""The pipeline's memory on the host: a pool of decoded chunks, and batches gathered from it by native threads."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.stream.columns import Batch, Column
from actstore.stream.gather import gather, gather_as


class Recycler:
    """Arrays by purpose, lent again once nobody else refers to them: fresh memory costs a page fault every 4 KiB.

    A tensor or view made of an array refers to it, so what a consumer keeps is never touched.
    """

    def __init__(self) -> None:
        """Own nothing yet."""
        self._arrays: dict[str, list[NDArray[Any]]] = {}

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of unspecified content."""
        owned = self._arrays.setdefault(purpose, [])
        for i in range(len(owned)):
            # one reference from the list, one from the call
            if sys.getrefcount(owned[i]) == 2 and owned[i].shape == shape and owned[i].dtype == dtype:
                return owned[i]
        free = [a for a in owned if sys.getrefcount(a) > 3]
        self._arrays[purpose] = [*free, made := np.empty(shape, dtype)]
        return made


class HostMemory:
    """Chunks and batches in the memory of this process."""

    parallel = True
    """Whether several threads may gather at a time."""

    def __init__(
        self,
        columns: Mapping[str, Column],
        buffers: int,
        recycler: Recycler,
        lend: Callable[[int], Batch] | None = None,
    ) -> None:
        """Room for `buffers` chunks. `lend` makes the memory of a batch of n rows; by default the recycler does."""
        self._columns, self._recycler = columns, recycler
        self._lend = lend
        self._pool = {
            n: recycler.empty(f"pool/{n}", (buffers, c.index.array.chunk_bytes), np.dtype(np.uint8))
            for n, c in columns.items()
        }

    def chunk(self, name: str, buffer: int) -> NDArray[np.uint8]:
        """Where a chunk is decoded to [bytes of a chunk]."""
        return self._pool[name][buffer]

    def loaded(self, name: str, buffer: int) -> None:
        """A chunk has been decoded."""

    def batch(self, rows: int) -> Batch:
        """The memory of a batch."""
        return self._recycled(rows) if self._lend is None else self._lend(rows)

    def _recycled(self, rows: int) -> Batch:
        return {
            n: self._recycler.empty(n, (rows, *c.shape), c.host_type) for n, c in self._columns.items() if c.deliver
        }

    def gather(self, batch: Batch, start: int, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        """Fill rows of a batch from `start` on: row `row[i]` of the chunk in buffer `buffer[i]`."""
        for name, out in batch.items():
            column, array = self._columns[name], self._columns[name].index.array
            target = out[start : start + len(row)].reshape(len(row), -1)
            settings: dict[str, Any] = {"planes": array.codec == "planes", "calibration": column.calibration}
            if column.raw:
                gather(self._pool[name], buffer, row, target, **settings)
            else:
                gather_as(
                    self._pool[name],
                    buffer,
                    row,
                    target,
                    itemsize=array.dtype.itemsize,
                    factor=column.factor,
                    **settings,
                )

    def finish(self, batch: Batch, rows: int) -> dict[str, Tensor]:
        """The batch, of which `rows` are filled, as tensors."""
        return {n: as_tensor(a[:rows], self._columns[n].dtype) for n, a in batch.items()}


def as_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A tensor over the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
