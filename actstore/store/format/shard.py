"""One shard object: encoded chunks one after another, the attempt's mark, then zarr's sharding index.

The index is what zarr v3's `sharding_indexed` codec (zarr-specs, codecs/sharding-indexed v1.0) defines with the index
at the end: for every inner chunk in C order two little-endian uint64, offset and length, both 2^64-1 where a chunk is
absent; then the index's crc32c. actstore writes chunks contiguously from offset 0, so that lengths alone locate them.

The mark is 16 bytes between the chunks and the index, which no reader of the array looks at. It is from the id of the
attempt that wrote the shard. S3's version of an object is a hash of its bytes, so two attempts that store the same rows
must not store the same bytes: a conditional put of one would hit the object of the other
(`docs/decisions/0005-commit.md`).
"""

from collections.abc import Sequence

import numpy as np

from actstore.errors import IntegrityError
from actstore.store.format.codec import CRC_BYTES, crc32c

ABSENT = np.uint64(2**64 - 1)
MARK_BYTES = 16


def tail_bytes(chunks: int) -> int:
    """Bytes behind the chunks of a shard that has room for so many: the mark and the index."""
    return MARK_BYTES + 16 * chunks + CRC_BYTES


def stored_bytes(chunk_bytes: int, shards: int, capacity: int) -> int:
    """Bytes of shards with room for `capacity` chunks each, which hold `chunk_bytes` of chunks in all."""
    return chunk_bytes + shards * tail_bytes(capacity)


def tail(lengths: Sequence[int], capacity: int, attempt: str) -> bytes:
    """What follows chunks of these stored lengths; places up to `capacity` stay absent.

    The mark is the first 12 characters of `attempt`, the id of the attempt, and their crc32c.
    """
    index = np.full((capacity, 2), ABSENT, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths])[:-1]
    return b"".join(
        part + crc32c(part).to_bytes(CRC_BYTES, "little") for part in (attempt[:12].encode(), index.tobytes())
    )


def check_tail(data: bytes, lengths: Sequence[int], capacity: int, what: str) -> None:
    """`IntegrityError` unless `data` is a mark and the index of a shard of chunks of these lengths."""
    mark = data[: MARK_BYTES - CRC_BYTES]
    if crc32c(mark) != int.from_bytes(data[len(mark) : MARK_BYTES], "little"):
        raise IntegrityError(f"{what}: the mark of the attempt fails its crc32c; the shard is damaged")
    if data[MARK_BYTES:] != tail(lengths, capacity, "")[CRC_BYTES:]:
        raise IntegrityError(f"{what}: the shard index and the commit record differ")
