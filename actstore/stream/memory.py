"""Where decoded chunks and batches lie on the host, and how a batch is gathered from them by native threads."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.stream.columns import Batch, Column, host_type, tensors_of
from actstore.stream.gather import gather, gather_as


@runtime_checkable
class Memory(Protocol):
    """Chunks of one share in numbered buffers, and batches: `HostMemory` or `DeviceMemory`."""

    parallel: bool
    """Whether it pays that several threads gather a batch."""

    def chunk(self, name: str, buffer: int) -> NDArray[np.uint8]:
        """Where the calling thread decodes a chunk to [bytes of a chunk]."""
        ...

    def loaded(self, name: str, buffer: int) -> None:
        """The calling thread has decoded a chunk to where `chunk` said."""
        ...

    def take(self, name: str, buffer: int, chunk: NDArray[np.uint8]) -> None:
        """Use a chunk where it lies; it does not change."""
        ...

    def held(self, name: str, buffer: int) -> NDArray[np.uint8]:
        """The chunk that the calling thread has just brought into a buffer [bytes of a chunk]."""
        ...

    def batch(self, rows: int) -> Any:
        """The memory of a batch."""
        ...

    def gather(self, batch: Any, start: int, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        """Fill rows of a batch from `start` on: row `row[i]` of the chunk in buffer `buffer[i]`."""
        ...

    def finish(self, batch: Any, rows: int) -> Any:
        """What is delivered of a batch, of which `rows` are filled."""
        ...


class Recycler:
    """Arrays by purpose, lent again once nobody else refers to them: fresh memory costs a page fault every 4 KiB.

    A tensor or view made of an array refers to it, so what a consumer keeps is never touched. At most `most` arrays a
    purpose are remembered; what a consumer collects beyond them is its own, and goes when it lets go.
    """

    def __init__(self, most: int) -> None:
        """Own nothing yet."""
        self._most = most
        self._arrays: dict[str, list[NDArray[Any]]] = {}

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of unspecified content."""
        owned = self._arrays.setdefault(purpose, [])
        owned[:] = [a for a in owned if a.shape == shape and a.dtype == dtype]
        for i in range(len(owned)):
            # one reference from the list, one from the call
            if sys.getrefcount(owned[i]) == 2:
                return owned[i]
        made = np.empty(shape, dtype)
        if len(owned) < self._most:
            owned.append(made)
        return made


class HostMemory:
    """Chunks and batches in the memory of this process."""

    parallel = True

    def __init__(
        self,
        columns: Mapping[str, Column],
        buffers: int,
        recycler: Recycler,
        *,
        name: str = "",
        lend: Callable[[int], Batch] | None = None,
    ) -> None:
        """Room for `buffers` chunks, called `name`; none for columns whose chunks are used where they lie.

        `lend` makes the memory of a batch of n rows; by default the recycler does.
        """
        self._recycler, self._lend = recycler, lend
        self._delivered = {n: c for n, c in columns.items() if c.deliver}
        self._tensors = tensors_of(columns)
        self._pool = {
            n: recycler.empty(f"pool {name}/{n}", (buffers, c.index.array.chunk_bytes), np.dtype(np.uint8))
            for n, c in columns.items()
            if not c.in_place
        }
        mapped = columns.keys() - self._pool.keys()
        self._taken = {n: [np.empty(0, np.uint8)] * buffers for n in mapped}
        self._address = {n: addresses(pool) for n, pool in self._pool.items()}
        self._address |= {n: np.zeros(buffers, np.int64) for n in mapped}

    def chunk(self, name: str, buffer: int) -> NDArray[np.uint8]:
        """See `Memory`."""
        return self._pool[name][buffer]

    def loaded(self, name: str, buffer: int) -> None:
        """See `Memory`."""

    def take(self, name: str, buffer: int, chunk: NDArray[np.uint8]) -> None:
        """See `Memory`; the chunk is referred to until the buffer's next one."""
        self._taken[name][buffer] = chunk
        self._address[name][buffer] = chunk.ctypes.data

    def held(self, name: str, buffer: int) -> NDArray[np.uint8]:
        """See `Memory`."""
        return self._pool[name][buffer] if name in self._pool else self._taken[name][buffer]

    def batch(self, rows: int) -> Batch:
        """See `Memory`."""
        if self._lend is not None:
            return self._lend(rows)
        tensors = self._tensors.items()
        return {n: self._recycler.empty(n, (rows, *shape), host_type(dtype)) for n, (shape, dtype) in tensors}

    def gather(self, batch: Batch, start: int, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        """See `Memory`."""
        for name, c in self._delivered.items():
            out = batch[c.target][start : start + len(row)].reshape(len(row), -1)
            which = self._address[name], buffer, row, out, c.index.array, c.calibration
            if c.raw:
                gather(*which, at=c.start)
            else:
                gather_as(*which, c.factor, at=c.start)

    def finish(self, batch: Batch, rows: int) -> dict[str, Tensor]:
        """See `Memory`."""
        return {n: as_tensor(a[:rows], self._tensors[n][1]) for n, a in batch.items()}


def addresses(pool: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where each chunk of a pool [chunks, bytes of a chunk] begins."""
    return pool.ctypes.data + np.arange(len(pool), dtype=np.int64) * pool.strides[0]


def as_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A tensor over the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
