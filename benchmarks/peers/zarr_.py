# pyright: basic
"""zarr-python and a torch DataLoader: a sharded array with zarr's default compressor, read in runs of shuffled chunks.

zarr has no loader; this one reads whole chunks, eight at a time in random order, and permutes their rows, which is
what its guide leads to: read whole chunks, and shard where files would be many. Single rows would decode a chunk each.
https://zarr.readthedocs.io/en/stable/user-guide/performance.html
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

CHUNK_ROWS, SHARD_ROWS, MIX = 1 << 11, 1 << 14, 8


def prepare(source: np.ndarray, folder: Path) -> None:
    """Store the rows."""
    rows, d = source.shape
    options: dict[str, Any] = {"chunks": (CHUNK_ROWS, d), "shards": (SHARD_ROWS, d)}
    array = zarr.create_array(folder, shape=source.shape, dtype="int16", **options)
    for start in range(0, rows, SHARD_ROWS):
        array[start : start + SHARD_ROWS] = source[start : start + SHARD_ROWS].view(np.int16)


class Rows(IterableDataset):
    """Batches of one worker."""

    def __init__(self, folder: Path, batch_size: int, epoch: int) -> None:
        """One epoch of the array in `folder`."""
        self.folder, self.batch_size, self.epoch = folder, batch_size, epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches of the chunks that fall to this worker."""
        array: Any = zarr.open_array(self.folder, mode="r")
        order = np.random.default_rng(self.epoch).permutation(array.shape[0] // CHUNK_ROWS)
        worker = get_worker_info()
        mine = order[worker.id :: worker.num_workers] if worker else order
        rng = np.random.default_rng((self.epoch, worker.id if worker else 0))
        for first in range(0, len(mine), MIX):
            parts = [array[c * CHUNK_ROWS : (c + 1) * CHUNK_ROWS] for c in mine[first : first + MIX]]
            rows = np.concatenate(parts)
            places = rng.permutation(len(rows))
            for start in range(0, len(rows) - self.batch_size + 1, self.batch_size):
                batch = np.take(rows, places[start : start + self.batch_size], axis=0)
                yield torch.from_numpy(batch).view(torch.bfloat16)


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    yield from DataLoader(Rows(run.folder, run.batch_size, run.epoch), batch_size=None, num_workers=run.workers)


if __name__ == "__main__":
    measure.main(prepare, batches)
