"""One shard object: encoded chunks one after another, then zarr's sharding index.

The bytes are what zarr v3's `sharding_indexed` codec (zarr-specs, codecs/sharding-indexed v1.0) defines with the
index at the end: for every inner chunk in C order two little-endian uint64, offset and length, both 2^64-1 where a
chunk is absent; then the index's crc32c. actstore writes chunks contiguously from offset 0, so that lengths alone
locate them.
"""

from collections.abc import Sequence

import numpy as np

from actstore.errors import IntegrityError
from actstore.store.codec import CRC_BYTES, crc32c

ABSENT = np.uint64(2**64 - 1)


def index_bytes(chunks: int) -> int:
    """Size of the index of a shard of so many chunks."""
    return 16 * chunks + CRC_BYTES


def build(chunks: Sequence[bytes], capacity: int) -> bytes:
    """The shard of the given encoded chunks; places from `len(chunks)` up to `capacity` stay absent."""
    index = np.full((capacity, 2), ABSENT, "<u8")
    offset = 0
    for i, chunk in enumerate(chunks):
        index[i] = offset, len(chunk)
        offset += len(chunk)
    table = index.tobytes()
    return b"".join([*chunks, table, crc32c(table).to_bytes(CRC_BYTES, "little")])


def chunk_lengths(data: bytes, capacity: int, what: str) -> list[int]:
    """Lengths of the chunks of a whole shard, 0 where absent; `IntegrityError` unless contiguous and intact."""
    size = index_bytes(capacity)
    if len(data) < size:
        raise IntegrityError(f"{what}: has {len(data)} bytes, its index alone needs {size}")
    table, stored = data[-size:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    if crc32c(table) != stored:
        raise IntegrityError(f"{what}: the shard index fails its crc32c")
    index = np.frombuffer(table, "<u8").reshape(capacity, 2)
    present = index[:, 0] != ABSENT
    lengths = np.where(present, index[:, 1], 0).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if (index[present, 0] != offsets[:-1][present]).any() or offsets[-1] != len(data) - size:
        raise IntegrityError(f"{what}: the shard index does not describe contiguous chunks")
    return lengths.tolist()
