"""One shard object: encoded chunks one after another, then zarr's sharding index.

The bytes are what zarr v3's `sharding_indexed` codec (zarr-specs, codecs/sharding-indexed v1.0) defines with the
index at the end: for every inner chunk in C order two little-endian uint64, offset and length, both 2^64-1 where a
chunk is absent; then the index's crc32c. actstore writes chunks contiguously from offset 0, so that lengths alone
locate them.
"""

from collections.abc import Sequence

import numpy as np

from actstore.errors import IntegrityError
from actstore.store.format.codec import CRC_BYTES, crc32c

ABSENT = np.uint64(2**64 - 1)


def index_bytes(chunks: int) -> int:
    """Size of the index of a shard of so many chunks."""
    return 16 * chunks + CRC_BYTES


def footer(lengths: Sequence[int], capacity: int) -> bytes:
    """The index of a shard of chunks of these stored lengths; places up to `capacity` stay absent."""
    index = np.full((capacity, 2), ABSENT, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths])[:-1]
    table = index.tobytes()
    return table + crc32c(table).to_bytes(CRC_BYTES, "little")


def check_footer(data: bytes, lengths: Sequence[int], capacity: int, what: str) -> None:
    """`IntegrityError` unless `data` is the index of a shard of chunks of these lengths."""
    if data != footer(lengths, capacity):
        raise IntegrityError(f"{what}: the shard index and the commit record differ")
