"""The pipeline's memory on a GPU: chunks cross the bus as they are decoded, rows are gathered over there.

Chunks are decoded into pinned memory and copied in one piece; merging of byte planes, gather, dequantisation and
change of type are a few torch operations on the device. So the host's memory bandwidth serves decoding only, and the
bus sees contiguous copies. Each thread has two pinned chunks: it decodes one while the other is copied. Everything is
queued on one side stream: a buffer that is copied over was gathered from before. A batch carries an event, for which
the consumer's stream waits; `record_stream` keeps the allocator from giving its memory away while that stream may still
read it (the race that SPDL describes).

The same code runs on device "cpu", which is how it is tested without a GPU.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.stream.columns import STACK, Column, tensors_of

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int16": torch.int16, "int32": torch.int32}


@dataclass
class DeviceBatch:
    """A batch in the making."""

    tensors: dict[str, Tensor]
    ready: Any = None
    """Event after the last gather; None on the CPU."""


@dataclass
class _Staging:
    """Pinned memory for a chunk on its way."""

    memory: Tensor
    copied: Any = None
    """Event after its latest copy."""


class DeviceMemory:
    """Chunks and batches on `device`."""

    parallel = False

    def __init__(self, columns: Mapping[str, Column], buffers: int, device: torch.device) -> None:
        """Room for `buffers` chunks on the device."""
        self._columns, self._device = columns, device
        self._cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._local = threading.local()
        self._order = threading.Lock()
        self._pool = {
            n: torch.empty((buffers, c.index.array.chunk_bytes), dtype=torch.uint8, device=device)
            for n, c in columns.items()
            if c.deliver
        }
        self._steps = {
            n: tuple(
                torch.from_numpy(v.astype(np.float64)).to(device) for v in (c.calibration.scale, c.calibration.offset)
            )
            for n, c in columns.items()
            if c.calibration is not None
        }
        if self._cuda:
            torch.cuda.synchronize(device)  # the pool is allocated on another stream than it is used on

    def chunk(self, name: str, buffer: int) -> NDArray[np.uint8]:  # noqa: ARG002  decoded elsewhere first
        """Pinned memory of the calling thread, which its next chunk but one of this array takes again."""
        staging: dict[str, list[_Staging]] = self._local.__dict__.setdefault("staging", {})
        if name not in staging:
            size = self._columns[name].chunk_bytes
            staging[name] = [_Staging(torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)) for _ in range(2)]
        staging[name].reverse()
        first = staging[name][0]
        if first.copied is not None:
            first.copied.synchronize()
        return first.memory.numpy()

    def loaded(self, name: str, buffer: int) -> None:
        """Copy the calling thread's chunk to its buffer, without waiting for it: rows are gathered behind it."""
        if name not in self._pool:
            return
        staging: _Staging = self._local.staging[name][0]
        if not self._cuda:
            self._pool[name][buffer].copy_(staging.memory)
            return
        with torch.cuda.stream(self._stream):
            self._pool[name][buffer].copy_(staging.memory, non_blocking=True)
            staging.copied = torch.cuda.Event()
            staging.copied.record(self._stream)

    def take(self, name: str, buffer: int, chunk: NDArray[np.uint8]) -> None:
        """Copy a chunk by way of the calling thread's pinned memory."""
        np.copyto(self.chunk(name, buffer), chunk)
        self.loaded(name, buffer)

    def held(self, name: str, buffer: int) -> NDArray[np.uint8]:  # noqa: ARG002  it lies in pinned memory too
        """See `Memory`."""
        return self._local.staging[name][0].memory.numpy()

    def batch(self, rows: int) -> DeviceBatch:
        """The memory of a batch."""
        if not self._cuda:
            return DeviceBatch(self._empty(rows))
        with torch.cuda.stream(self._stream):
            return DeviceBatch(self._empty(rows))

    def _empty(self, rows: int) -> dict[str, Tensor]:
        return {
            n: torch.empty((rows, *shape), dtype=dtype, device=self._device)
            for n, (shape, dtype) in tensors_of(self._columns).items()
        }

    def gather(self, batch: DeviceBatch, start: int, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        """Fill rows of a batch from `start` on: row `row[i]` of the chunk in buffer `buffer[i]`."""
        if not self._cuda:
            self._gather(batch, start, torch.from_numpy(buffer), torch.from_numpy(row))
            return
        with self._order, torch.cuda.stream(self._stream):
            index = torch.from_numpy(np.stack([buffer, row])).pin_memory().to(self._device, non_blocking=True)
            self._gather(batch, start, index[0], index[1])
            batch.ready = torch.cuda.Event()
            batch.ready.record(self._stream)

    def _gather(self, batch: DeviceBatch, start: int, buffer: Tensor, row: Tensor) -> None:
        for name in self._pool:
            column = self._columns[name]
            out = batch.tensors[column.target][start : start + len(row)]
            value = _rows(self._pool[name], column, buffer, row)
            if name in self._steps:
                scale, offset = self._steps[name]
                value = (value.double() * scale + offset).float()
            if column.factor != 1.0:
                value = (value.double() * column.factor).float()
            (out[:, column.place] if column.target == STACK else out).copy_(value)

    def finish(self, batch: DeviceBatch, rows: int) -> DeviceBatch:
        """The batch, of which `rows` are filled."""
        return DeviceBatch({n: t[:rows] for n, t in batch.tensors.items()}, batch.ready)


def _rows(pool: Tensor, column: Column, buffer: Tensor, row: Tensor) -> Tensor:
    """Rows [n, ...] as they are stored, from chunks [buffers, bytes of a chunk] of planes or elements."""
    array = column.index.array
    itemsize, width = array.dtype.itemsize, int(np.prod(column.shape))
    word = WORDS[itemsize]
    if array.codec == "planes":
        planes = pool.view(-1, width)
        first = (buffer * itemsize) * array.chunk_rows + row
        bits = torch.zeros((len(row), width), dtype=word, device=pool.device)
        for b in range(itemsize):
            plane = planes.index_select(0, first + b * array.chunk_rows).to(word)
            bits.bitwise_or_(plane.bitwise_left_shift_(8 * b))
    else:
        bits = pool.view(word).view(-1, width).index_select(0, buffer * array.chunk_rows + row)
    return bits.view(_STORED[array.dtype.name]).view(-1, *column.shape)


def hand_over(batch: DeviceBatch) -> dict[str, Tensor]:
    """Make a batch safe to use on the calling thread's current stream."""
    if batch.ready is not None:
        for tensor in batch.tensors.values():
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(batch.ready)
            tensor.record_stream(current)
    return batch.tensors
