# pyright: basic, reportMissingImports=false
"""WebDataset as its documentation sets it up: tar shards, shuffled shards and a buffer, batched in workers.

One .bin a sample, all shards shuffled, a buffer of 5,000 samples where the README's example has 1,000, so
that a batch of 4,096 is mixed at all. Workers batch, and `WebLoader` has `batch_size=None`, as the README advises.
https://github.com/webdataset/webdataset
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import webdataset as wds

SHARD_ROWS = 1 << 14
BUFFER = 5000


def prepare(source: np.ndarray, folder: Path) -> None:
    """Store the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=SHARD_ROWS, verbose=0) as writer:
        for i, row in enumerate(source):
            writer.write({"__key__": f"{i:09d}", "bin": row.tobytes()})


def to_row(sample: dict[str, Any]) -> np.ndarray:
    """A row."""
    return np.frombuffer(sample["bin"], np.int16)


def stack(rows: list[np.ndarray]) -> torch.Tensor:
    """A batch."""
    return torch.from_numpy(np.stack(rows)).view(torch.bfloat16)


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    shards = sorted(map(str, run.folder.glob("*.tar")))
    data = wds.WebDataset(shards, shardshuffle=len(shards), seed=run.epoch).shuffle(BUFFER).map(to_row)
    batched = data.batched(run.batch_size, collation_fn=stack, partial=False)
    yield from wds.WebLoader(batched, batch_size=None, num_workers=run.workers)


if __name__ == "__main__":
    measure.main(prepare, batches)
