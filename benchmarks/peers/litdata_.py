# pyright: basic, reportMissingImports=false
"""LitData as its README sets it up: `optimize` into chunks of 64 MB, shuffle on, its own DataLoader.

https://github.com/Lightning-AI/litData

Int16, because the serializer of one-dimensional tensors, which needs no header a row, takes no bf16.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

STEP = 1 << 12


def rows(start: int, source: str) -> Iterator[torch.Tensor]:
    """`STEP` rows of the source."""
    for row in np.load(source, mmap_mode="r")[start : start + STEP]:
        yield torch.from_numpy(row.astype(np.int16))


def prepare(source: np.memmap, folder: Path) -> None:
    """Store the rows."""
    starts = list(range(0, len(source), STEP))
    fn = partial(rows, source=str(source.filename))
    optimize(fn=fn, inputs=starts, output_dir=str(folder), chunk_bytes="64MB", num_workers=os.cpu_count())


_loaders: list[StreamingDataLoader] = []


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    if not _loaders:
        data = StreamingDataset(str(run.folder), shuffle=True, drop_last=True)
        options = {"num_workers": run.workers, "persistent_workers": True}
        _loaders.append(StreamingDataLoader(data, batch_size=run.batch_size, **options))
    for batch in _loaders[0]:
        if len(batch) == run.batch_size:
            yield batch


if __name__ == "__main__":
    measure.main(prepare, batches)
