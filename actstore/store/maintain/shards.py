"""The shards of a committed bucket, as its record describes them: what is checked, copied and replaced."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from actstore.store.format.record import Chunks, CommitRecord, shard_chunks
from actstore.store.format.shard import check_tail, tail_bytes
from actstore.store.format.spec import ArraySpec, StoreSpec, arrays


@dataclass(frozen=True)
class Shard:
    """One committed shard."""

    array: ArraySpec
    key: str
    start: int
    """Place, within the bucket, of its first row."""
    chunks: Chunks

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return int(self.chunks.stored.sum(dtype=np.int64)) + tail_bytes(self.array.chunks_per_shard)

    def read(
        self, read: Callable[[int, int], bytes | memoryview], where: str
    ) -> Iterator[tuple[bytes | memoryview, int, str]]:
        """Each chunk with its committed crc32c and its name for messages; its bytes are the caller's to check.

        `read(offset, length)` reads the object. At the end `IntegrityError` if its index is not that of these chunks.
        """
        offset = 0
        for length, crc in zip(self.chunks.stored.tolist(), self.chunks.crc32c.tolist(), strict=True):
            yield read(offset, length), crc, f"{where} chunk at byte {offset}"
            offset += length
        capacity = self.array.chunks_per_shard
        check_tail(bytes(read(offset, tail_bytes(capacity))), self.chunks.stored.tolist(), capacity, where)


def shards(spec: StoreSpec, committed: CommitRecord) -> list[Shard]:
    """All shards of a committed bucket."""
    first, _ = spec.bucket_range(committed.bucket)
    return [
        Shard(array, array.shard_key(first // array.shard_rows + i), i * array.shard_rows, chunks)
        for array in arrays(spec).values()
        for i, chunks in enumerate(shard_chunks(array, committed))
    ]
