"""One shard from its rows: encode, compress, count; no storage.

Statistics are sums over the values that a reader will decode, taken while the rows are in cache. Shards are made in
buffers that are used again: compressed bytes are not copied, and fresh memory would cost a page fault every 4 KiB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from actstore.store.format import codec, fixed, shard, stats
from actstore.store.format.record import Chunks
from actstore.store.format.spec import ArraySpec


class NotFiniteError(Exception):
    """A value that `fixed` can't store."""

    def __init__(self, row: int) -> None:
        """`row` counts from the first row given."""
        super().__init__(row)
        self.row = row


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A shard ready to be put."""

    size: int
    """Bytes of the object, from the start of the buffer."""
    lengths: list[int]
    """Stored bytes of each chunk."""
    crc32c: list[int]
    """Of each chunk."""
    sums: stats.Sums | None
    """None for provenance arrays."""


def chunks(shards: Sequence[Encoded]) -> Chunks:
    """The chunks of consecutive shards, as a commit record keeps them."""
    return Chunks(
        stored=np.array([n for s in shards for n in s.lengths], np.uint32),
        crc32c=np.array([crc for s in shards for crc in s.crc32c], np.uint32),
    )


def buffer_bytes(array: ArraySpec) -> int:
    """More bytes than any shard of the array has."""
    capacity = array.chunks_per_shard
    return capacity * codec.max_stored(array.chunk_bytes) + shard.tail_bytes(capacity)


def encode_shard(
    array: ArraySpec,
    rows: NDArray[Any],
    out: NDArray[np.uint8],
    attempt: str,
    *,
    with_sums: bool = False,
    calibration: fixed.Calibration | None = None,
) -> Encoded:
    """Encode up to shard_rows rows [n, ...] in stored order to the start of `out`, of `buffer_bytes`.

    `attempt` is the id of the attempt that writes it. `calibration` belongs to a `fixed` site; `NotFiniteError` then
    names the first row without a code.
    """
    lengths: list[int] = []
    crcs: list[int] = []
    sums: list[stats.Sums] = []
    at = 0
    for start in range(0, len(rows), array.chunk_rows):
        chunk = np.ascontiguousarray(rows[start : start + array.chunk_rows])
        if calibration is not None:
            chunk, part = _quantised(chunk, calibration, start)
            sums.append(part)
        elif with_sums:
            sums.append(stats.sums(chunk))
        if len(chunk) < array.chunk_rows:
            padding = np.zeros((array.chunk_rows - len(chunk), *chunk.shape[1:]), chunk.dtype)
            chunk = np.concatenate([chunk, padding])
        length, crc = codec.encode_into(chunk, array.codec, out[at:])
        lengths.append(length)
        crcs.append(crc)
        at += length
    tail = np.frombuffer(shard.tail(lengths, array.chunks_per_shard, attempt), np.uint8)
    out[at : at + len(tail)] = tail
    return Encoded(size=at + len(tail), lengths=lengths, crc32c=crcs, sums=reduce(stats.add, sums) if sums else None)


def _quantised(chunk: NDArray[Any], calibration: fixed.Calibration, start: int) -> tuple[NDArray[np.int16], stats.Sums]:
    bits = stats.as_bits(chunk)
    bad = fixed.first_not_finite(bits)
    if bad is not None:
        raise NotFiniteError(start + bad)
    codes = codec.scratch("codes", 2 * chunk.size).view(np.int16).reshape(chunk.shape)
    values = codec.scratch("values", 4 * chunk.size).view(np.float32).reshape(chunk.shape)
    saturated, clipped_sq = fixed.quantise(bits, calibration, codes, values)
    return codes, replace(stats.sums(values), saturated=saturated, clipped_sq=np.array([clipped_sq]))
